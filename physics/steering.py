"""The steering vector: the one place that turns a position into array phases."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from physics.geometry import PlanarArray, direction
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

    - ``spherical``: ``|p - p_n| - r``, exact; evaluated as
      ``(q |p_n|^2 - 2 u.p_n) / (1 + sqrt(1 - 2 q u.p_n + q^2 |p_n|^2))``, which does not cancel
      and is finite at ``r = inf``;
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
    if position.shape[-1:] != (3,):
        raise ValueError(
            f"position has shape {tuple(position.shape)}; expected (..., 3) with azimuth [rad], "
            "elevation [rad] and range [m] in the last dimension"
        )
    if wavefront not in get_args(Wavefront):
        raise ValueError(f"wavefront {wavefront!r} unknown; choose from {get_args(Wavefront)}")
    elements = array.elements.to(device=position.device, dtype=position.dtype)
    u = direction(position[..., 0], position[..., 1])
    if displacement is None:
        u_p = u @ elements.mT
        p_squared = elements.square().sum(-1)
    else:
        elements = elements + displacement
        u_p = (elements @ u.unsqueeze(-1)).squeeze(-1)
        p_squared = elements.square().sum(-1)
    q = position[..., 2:].reciprocal()
    if wavefront == "planar":
        path = -u_p
    elif wavefront == "paraxial":
        path = 0.5 * q * p_squared - u_p
    elif wavefront == "fresnel":
        path = 0.5 * q * (p_squared - u_p.square()) - u_p
    else:
        root = (1.0 - 2.0 * q * u_p + q.square() * p_squared).clamp_min(0.0).sqrt()
        path = (q * p_squared - 2.0 * u_p) / (1.0 + root)
    amplitude = torch.full_like(path, array.size**-0.5)
    return torch.polar(amplitude, -array.wavenumber * path)
