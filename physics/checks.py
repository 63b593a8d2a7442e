"""Input checks that the package's public functions share."""

from __future__ import annotations

import torch
from torch import Tensor

from physics.transfer import sent


def check_finite(name: str, value: Tensor) -> None:
    """Raise ValueError, naming the first bad entry, unless every entry is finite."""
    real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    if bool(torch.isfinite(real.sum())):  # fast path: a sum with NaN or Inf is never finite
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        first = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {bad} non-finite value(s), the first at index {first}; "
            "expected finite input: drop or repair these snapshots"
        )


def as_fraction(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A weight as a tensor with the dtype and device of ``like``, without synchronising.

    Raises:
        ValueError: a weight outside [0, 1], or NaN.
    """
    inside = ((value >= 0) & (value <= 1)).all() if isinstance(value, Tensor) else 0 <= value <= 1
    if not inside:
        raise ValueError(f"{name} is {value}; expected a number in [0, 1]")
    if isinstance(value, Tensor):
        return sent(value, like.device).to(like.dtype)
    return like.new_full((), value)


def check_measurement(y: Tensor, H: Tensor, codes: Tensor) -> None:
    """Check the measurement passed to a public function.

    Args:
        y: (…, L, M) complex.
        H: (…, M, N) complex.
        codes: (…, L, N) complex.

    Raises:
        TypeError: something that is not a tensor.
        ValueError: a real or mixed dtype, shapes that do not fit, mixed devices, an empty axis,
            NaN or Inf.
    """
    for name, value, shape in (
        ("y", y, "(..., L, M)"),
        ("H", H, "(..., M, N)"),
        ("codes", codes, "(..., L, N)"),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is {type(value).__name__}; expected a complex torch tensor {shape}: "
                "wrap arrays with torch.as_tensor"
            )
        if not value.is_complex():
            raise ValueError(
                f"{name} has dtype {value.dtype}; expected complex64 or complex128: "
                "join a trailing [re, im] axis with torch.view_as_complex"
            )
        if value.ndim < 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if len({y.dtype, H.dtype, codes.dtype}) > 1:
        raise ValueError(
            f"y is {y.dtype}, H {H.dtype} and codes {codes.dtype}; expected one dtype: "
            "convert with .to(y.dtype)"
        )
    if len({y.device, H.device, codes.device}) > 1:
        raise ValueError(
            f"y is on {y.device}, H on {H.device} and codes on {codes.device}; expected one device"
        )
    n_snapshots, n_antennas = y.shape[-2:]
    n_elements = H.shape[-1]
    if 0 in (n_snapshots, n_antennas, n_elements):
        raise ValueError(
            f"y has shape {tuple(y.shape)} and H {tuple(H.shape)}; "
            "expected at least one snapshot, antenna and element"
        )
    if H.shape[-2] != n_antennas or codes.shape[-2:] != (n_snapshots, n_elements):
        raise ValueError(
            f"shapes do not fit: y {tuple(y.shape)} as (..., L, M), H {tuple(H.shape)} as "
            f"(..., M, N), codes {tuple(codes.shape)} as (..., L, N); with this y and H expected "
            f"H (..., {n_antennas}, N) and codes (..., {n_snapshots}, {n_elements})"
        )
    try:
        torch.broadcast_shapes(y.shape[:-2], H.shape[:-2], codes.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"leading dimensions of y {tuple(y.shape)}, H {tuple(H.shape)} and codes "
            f"{tuple(codes.shape)} do not broadcast"
        ) from None
    for name, value in (("y", y), ("H", H), ("codes", codes)):
        check_finite(name, value)
