"""The steering vector: the only code that converts a position to array phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from physics.geometry import PlanarArray, direction, elements_on
from physics.precision import in_full_precision

Wavefront = Literal["spherical", "fresnel", "paraxial", "planar"]


@in_full_precision
def steering_vector(
    position: Tensor,
    array: PlanarArray,
    wavefront: Wavefront = "spherical",
    displacement: Tensor | None = None,
) -> Tensor:
    """Steering vector of a point source seen by the array.

    ``a_n = exp(-j k d_n) / sqrt(N)`` where ``d_n`` is the path difference to the origin. With
    ``u`` the unit direction, ``p_n`` the element and ``q = 1/r`` it is

    - ``spherical``: ``|p - p_n| - r``, exact; evaluated as ``t / (1 + sqrt(1 + q t))`` with
      ``t = q |p_n|^2 - 2 u.p_n``, which does not cancel and is finite at ``r = inf``;
    - ``fresnel``: ``-u.p_n + q (|p_n|^2 - (u.p_n)^2) / 2``, the full second order;
    - ``paraxial``: ``-u.p_n + q |p_n|^2 / 2``, second order on boresight only;
    - ``planar``: ``-u.p_n``.

    Args:
        position: (…, 3) real: azimuth [rad], elevation [rad], range [m] (``inf`` allowed).
        array: the surface.
        wavefront: one of the four models above.
        displacement: (…, N, 3) shift of each element [m], broadcast against ``position``'s
            leading dimensions with one more axis for the elements.

    Returns:
        (…, N) complex of the precision of ``position``, unit norm.

    Raises:
        ValueError: unknown wavefront, or a last dimension that is not 3.

    Source: Cui and Dai, "Channel estimation for extremely large-scale MIMO: far-field or
    near-field?", IEEE Trans. Commun. 70(4), 2022, eqs. (5)-(8), for a planar array.
    """
    elements, u = _checked(position, array, wavefront)
    if displacement is None:
        u_p = u @ elements.mT
        p_squared = elements.square().sum(-1)
    else:
        elements = elements + displacement
        u_p = (elements @ u.unsqueeze(-1)).squeeze(-1)
        p_squared = elements.square().sum(-1)
    path, _ = _path(u_p, p_squared, position[..., 2:].reciprocal(), wavefront)
    return _response(path, array)


@in_full_precision
def steering_derivatives(
    position: Tensor, array: PlanarArray, wavefront: Wavefront = "spherical"
) -> tuple[Tensor, Tensor]:
    """Steering vectors and their derivatives, for Newton steps and Fisher information.

    With ``a_n = exp(-j k d_n) / sqrt(N)`` the derivative is ``-j k (dd_n/d eta) a_n``; of the
    spherical path ``d`` it is ``dd/du_p = -1/(1 + q d)`` and
    ``dd/dq = (|p|^2 - d^2) / (2 (1 + q d))``, which do not cancel as ``q`` goes to 0.

    Args:
        position: (…, 3) real: azimuth [rad], elevation [rad], range [m] (``inf`` allowed).
        array: the surface.
        wavefront: as for :func:`steering_vector`.

    Returns:
        a (…, N) and da (…, 3, N) complex: with respect to azimuth [1/rad], elevation [1/rad] and
        **inverse** range [m].

    Raises:
        ValueError: unknown wavefront, or a last dimension that is not 3.
    """
    elements, u = _checked(position, array, wavefront)
    azimuth, elevation = position[..., 0], position[..., 1]
    sin_az, cos_az = torch.sin(azimuth), torch.cos(azimuth)
    sin_el, cos_el = torch.sin(elevation), torch.cos(elevation)
    along_azimuth = torch.stack([cos_el * cos_az, torch.zeros_like(u[..., 0]), -u[..., 0]], dim=-1)
    along_elevation = torch.stack([-sin_el * sin_az, cos_el, -sin_el * cos_az], dim=-1)
    turned = torch.stack([u, along_azimuth, along_elevation], dim=-2) @ elements.mT  # (…, 3, N)
    q = position[..., 2:].reciprocal()
    p_squared = elements.square().sum(-1)
    path, slopes = _path(turned[..., 0, :], p_squared, q, wavefront)
    by_u, by_q = slopes()
    a = _response(path, array)
    slope = torch.stack(
        [by_u * turned[..., 1, :], by_u * turned[..., 2, :], by_q.expand_as(path)], dim=-2
    )
    # -j k slope a = k slope (Im a - j Re a)
    da = torch.complex(a.imag.unsqueeze(-2) * slope, -a.real.unsqueeze(-2) * slope)
    return a, da * array.wavenumber


def _checked(position: Tensor, array: PlanarArray, wavefront: Wavefront) -> tuple[Tensor, Tensor]:
    """Validate the arguments; return elements (N, 3) and directions (…, 3)."""
    if position.shape[-1:] != (3,):
        raise ValueError(
            f"position has shape {tuple(position.shape)}; expected (..., 3) with azimuth [rad], "
            "elevation [rad] and range [m] in the last dimension"
        )
    if wavefront not in get_args(Wavefront):
        raise ValueError(f"wavefront {wavefront!r} unknown; choose from {get_args(Wavefront)}")
    elements = elements_on(array, position.device, position.dtype)
    return elements, direction(position[..., 0], position[..., 1])


def _path(
    u_p: Tensor, p_squared: Tensor, q: Tensor, wavefront: Wavefront
) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Path difference d (…, N) [m], and a function for its derivatives by u.p and by q."""
    if wavefront == "planar":
        return -u_p, lambda: (-torch.ones_like(u_p), torch.zeros_like(u_p))
    if wavefront == "paraxial":
        return 0.5 * q * p_squared - u_p, lambda: (-torch.ones_like(u_p), 0.5 * p_squared)
    if wavefront == "fresnel":
        bent = 0.5 * (p_squared - u_p.square())
        return q * bent - u_p, lambda: (-1.0 - q * u_p, bent)
    twice = torch.sub(q * p_squared, u_p, alpha=2.0)
    root = (1.0 + q * twice).clamp_min(0.0).sqrt()
    path = twice / (1.0 + root)

    def slopes() -> tuple[Tensor, Tensor]:
        safe = root.clamp_min(torch.finfo(root.dtype).eps)  # 0 where the source is at the element
        return -safe.reciprocal(), 0.5 * (p_squared - path.square()) / safe

    return path, slopes


def _response(path: Tensor, array: PlanarArray) -> Tensor:
    phase = -array.wavenumber * path
    # Like torch.polar, which computes sines and cosines one by one on a CPU.
    return torch.complex(torch.cos(phase), torch.sin(phase)) * array.size**-0.5
