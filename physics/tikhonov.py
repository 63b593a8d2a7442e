"""Regularised least squares per snapshot, from y to the signal on the surface."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from physics.checks import check_measurement
from physics.config import Adjustable, FrozenModel
from physics.precision import in_full_precision
from physics.scaling import divide, divisor, energy, peak, power

Solver = Literal["auto", "dual", "lstsq", "gram", "svd"]

_CHUNK_BYTES = 4 * 2**20  # workspace of a chunk of scenes if one Cholesky per scene is not enough


class TikhonovConfig(FrozenModel):
    """Regularised least squares of R_samp and of the network's ridge solutions."""

    regularization: Adjustable[float] = Field(
        1e-3, ge=0, description="ridge parameter lambda, relative to tr(Phi^H Phi)/N"
    )
    solver: Solver = Field(
        "auto",
        description="auto: the fastest suitable solver; scenes on which a solver fails are "
        "solved again by SVD",
    )


@dataclass(frozen=True)
class SolveReport:
    """How a batch was solved.

    Attributes:
        solver: the method that ran (``auto`` resolved).
        unit_modulus: whether all codes were treated as unit modulus, so that one factorisation
            served all snapshots of a scene.
        fell_back: (…) bool, scenes that were solved again by SVD.
        n_fallbacks: their number.
    """

    solver: Solver
    unit_modulus: bool
    fell_back: Tensor
    n_fallbacks: int


def is_unit_modulus(codes: Tensor) -> bool:
    """Whether all codes (…, L, N) have modulus 1 to within rounding."""
    if codes.numel() == 0:
        return True
    tolerance = 16 * torch.finfo(codes.dtype.to_real()).eps
    lowest, highest = power(codes).aminmax()
    return bool((lowest >= 1.0 - tolerance) & (highest <= 1.0 + tolerance))


def tikhonov_solve(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    regularization: float = 1e-3,
    solver: Solver = "auto",
) -> tuple[Tensor, SolveReport]:
    """Ridge solution of every snapshot.

    ``a_l = argmin_a ||y_l - Phi_l a||^2 + alpha_l ||a||^2`` with ``Phi_l = H diag(c_l)`` and
    ``alpha_l = lambda tr(Phi_l^H Phi_l)/N``. All solvers give the same answer:

    - ``dual``: ``a = Phi^H (Phi Phi^H + alpha I)^-1 y``, M x M only. With unit-modulus codes
      ``Phi Phi^H = H H^H`` for every snapshot: one Cholesky factorisation per scene;
    - ``lstsq``: QR of the augmented ``[Phi; sqrt(alpha) I]``;
    - ``gram``: Cholesky of the N x N normal equations;
    - ``svd``: ``V diag(s / (s^2 + alpha)) U^H y``;
    - ``auto``: ``dual``.

    Scenes whose factorisation fails or loses all significant digits, or whose solution is not
    finite, are solved again by ``svd``; the report lists them. A zero channel gives zeros, and
    lambda = 0 the pseudo-inverse.

    Args:
        y: (…, L, M) complex measurements.
        H: (…, M, N) complex channel.
        codes: (…, L, N) complex codes.
        regularization: lambda, at least 0.
        solver: one of the above.

    Returns:
        a (…, L, N) complex, and the report.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: unknown solver, negative lambda, non-finite or misshapen input.

    Source: Tikhonov, 1963; the dual form is Saunders, Gammerman and Vovk, "Ridge regression
    learning algorithm in dual variables", ICML 1998, eq. (8).
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver {solver!r} unknown; choose from {get_args(Solver)}")
    if not 0 <= regularization < float("inf"):
        raise ValueError(
            f"regularization is {regularization}; expected a finite number of at least 0, "
            "such as 1e-3"
        )
    check_measurement(y, H, codes)
    return solve_unchecked(y, H, codes, regularization, solver)


@in_full_precision
def solve_unchecked(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    regularization: float,
    solver: Solver = "auto",
    unit_modulus: bool | None = None,
) -> tuple[Tensor, SolveReport]:
    """:func:`tikhonov_solve` without its checks.

    It never raises on bad numbers: NaN and Inf count as zeros, and their scenes as fallbacks.

    Args:
        unit_modulus: whether the codes are known to have unit modulus; None checks them.
    """
    tried = _Attempt.of(y, H, codes, regularization, solver, unit_modulus)
    a, failed = tried.a, tried.failed
    n_failed = int(failed.sum())  # the only value that the host reads from the device
    if n_failed:
        a = a.clone()
        again, _ = _in_chunks("svd", *(zero_non_finite(t[failed]) for t in tried.operands))
        a[failed] = zero_non_finite(again)
    report = SolveReport(
        tried.solver, tried.unit_modulus, failed.reshape(tried.batch_shape), n_failed
    )
    return a.reshape(*tried.batch_shape, *a.shape[-2:]), report


@in_full_precision
def solve_trusting(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    regularization: float,
    solver: Solver = "auto",
    unit_modulus: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`solve_unchecked` that does not wait to check whether the SVD is needed.

    With the solvers ``auto`` and ``dual``, and where ``unit_modulus`` is given, the host reads no
    value from the device.

    Returns:
        a (…, L, N) complex, and (…) bool the scenes that ``solve_unchecked`` would have solved
        again: a is undefined there.
    """
    tried = _Attempt.of(y, H, codes, regularization, solver, unit_modulus)
    a = tried.a.reshape(*tried.batch_shape, *tried.a.shape[-2:])
    return a, tried.failed.reshape(tried.batch_shape)


@dataclass(frozen=True)
class _Attempt:
    """Solutions of B scenes by the requested solver, and where it failed."""

    a: Tensor  # (B, L, N)
    failed: Tensor  # (B,) bool
    operands: tuple[Tensor, Tensor, Tensor, Tensor]  # y, H, codes and (B, L) alpha, scaled
    batch_shape: torch.Size
    solver: Solver
    unit_modulus: bool

    @classmethod
    def of(
        cls,
        y: Tensor,
        H: Tensor,
        codes: Tensor,
        regularization: float,
        solver: Solver,
        unit_modulus: bool | None,
    ) -> _Attempt:
        batch_shape = torch.broadcast_shapes(y.shape[:-2], H.shape[:-2], codes.shape[:-2])
        n_scenes, n_elements = math.prod(batch_shape), H.shape[-1]
        y, H, codes = (
            t.expand(*batch_shape, *t.shape[-2:]).reshape(n_scenes, *t.shape[-2:])
            for t in (y, H, codes)
        )
        # The solution is linear in y, so the scales of H and codes are applied to y.
        H_scale = divisor(peak(H))[:, None, None]
        H = divide(H, H_scale)
        if unit_modulus is None:
            unit_modulus = is_unit_modulus(codes)
        if unit_modulus:
            y = divide(y, H_scale)
            kernel = H @ H.mH  # of the dual form; every solver uses its trace
            trace = kernel.diagonal(dim1=-2, dim2=-1).real.sum(-1, keepdim=True)
        else:
            code_scale = divisor(peak(codes, 1)).unsqueeze(-1)  # (B, L, 1)
            codes = divide(codes, code_scale)
            # In double precision, so that dividing by one scale first cannot overflow.
            both = H_scale.double() * code_scale.double()
            y = divide(y.to(torch.complex128), both).to(y.dtype)
            column_power = power(H).sum(-2)  # (B, N)
            trace = (power(codes) @ column_power.unsqueeze(-1)).squeeze(-1)
        # A zero channel or code has the solution 0, which any positive alpha gives.
        alpha = torch.where(trace > 0, regularization * trace / n_elements, torch.ones_like(trace))
        operands = (y, H, codes, alpha.expand(y.shape[:2]))

        resolved: Solver = "dual" if solver == "auto" else solver
        if n_scenes == 0:
            a = y.new_zeros(*y.shape[:-1], n_elements)
            failed = torch.zeros(0, dtype=torch.bool, device=y.device)
        elif resolved == "dual" and unit_modulus:
            a, failed = _dual_shared(y, H, codes, kernel, alpha)
        elif resolved == "dual":
            a, failed = _in_chunks(resolved, *operands)
        else:  # LAPACK raises for the whole batch if one scene contains NaN
            a, failed = _in_chunks(resolved, *(zero_non_finite(t) for t in operands))
            for operand in operands:
                failed = failed | ~torch.isfinite(operand).flatten(1).all(-1)
        # One pass suffices: a sum is finite only where every term is.
        failed = failed | ~torch.isfinite(torch.view_as_real(a).flatten(1).sum(1))
        return cls(a, failed, operands, batch_shape, resolved, unit_modulus)


def zero_non_finite(value: Tensor) -> Tensor:
    """Replace NaN and Inf with zeros."""
    return torch.nan_to_num(value, 0.0, 0.0, 0.0)


def _factorize(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of each matrix, and where it is unreliable.

    A squared pivot as small as the rounding error of the largest one has no significant digits even
    if the factorisation succeeded, as happens for a rank-deficient kernel with little loading.
    """
    cholesky, info = torch.linalg.cholesky_ex(kernel)
    pivot = cholesky.diagonal(dim1=-2, dim2=-1).real.square()
    rounding = kernel.shape[-1] * torch.finfo(pivot.dtype).eps
    lost = pivot.amin(-1) <= rounding * pivot.amax(-1)
    return cholesky, (info != 0) | lost


def _substitute(cholesky: Tensor, right: Tensor) -> Tensor:
    """Solve with a Cholesky factor, many times faster than cholesky_solve on small matrices."""
    half = torch.linalg.solve_triangular(cholesky, right, upper=False)
    return torch.linalg.solve_triangular(cholesky.mH, half, upper=True)


def _dual_shared(
    y: Tensor, H: Tensor, codes: Tensor, kernel: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Dual form for unit-modulus codes: factorises ``H H^H + alpha I`` (M x M) once per scene."""
    kernel.diagonal(dim1=-2, dim2=-1).add_(alpha)
    cholesky, failed = _factorize(kernel)
    z = _substitute(cholesky, y.mT)  # (B, M, L)
    # H and codes are conjugated without a copy, and the product is computed in place.
    return (z.mH @ H).mul_(codes).conj_physical_(), failed


def _in_chunks(
    solver: Solver, y: Tensor, H: Tensor, codes: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a solver that forms Phi_l over chunks of scenes of bounded workspace."""
    n_snapshots, n_antennas = y.shape[-2:]
    n_elements = H.shape[-1]
    if solver in ("lstsq", "gram"):
        chunk = y.shape[0]  # the reference solvers process the whole batch at once
    else:
        per_row = n_antennas if solver == "dual" else n_snapshots
        chunk = max(1, _CHUNK_BYTES // (per_row * n_antennas * n_elements * y.element_size()))
    run = {"dual": _dual, "svd": _svd, "lstsq": _lstsq, "gram": _gram}[solver]
    parts = [
        run(y[i : i + chunk], H[i : i + chunk], codes[i : i + chunk], alpha[i : i + chunk])
        for i in range(0, y.shape[0], chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _dual(y: Tensor, H: Tensor, codes: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Dual form for any codes: one M x M factorisation per snapshot.

    ``Phi_l Phi_l^H = sum_n |c_ln|^2 h_n h_n^H`` for all l is one product of real matrices,
    (L x N) times (N x 2 M^2): half the work of the complex one, and Phi_l is never formed.
    """
    n_antennas = H.shape[-2]
    columns = H.mT.contiguous()  # (B, N, M)
    outer = columns.unsqueeze(-1) * columns.conj().unsqueeze(-2)  # (B, N, M, M)
    kernel = power(codes) @ torch.view_as_real(outer).flatten(-3)
    kernel = torch.view_as_complex(kernel.unflatten(-1, (n_antennas, n_antennas, 2)))
    kernel.diagonal(dim1=-2, dim2=-1).add_(alpha.unsqueeze(-1))
    cholesky, failed = _factorize(kernel)
    z = _substitute(cholesky, y.unsqueeze(-1)).squeeze(-1)  # (B, L, M)
    return (z @ H.conj()) * codes.conj(), failed.any(-1)


def _phi(H: Tensor, codes: Tensor) -> Tensor:
    return H.unsqueeze(-3) * codes.unsqueeze(-2)  # (B, L, M, N)


def _svd(y: Tensor, H: Tensor, codes: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    phi = _phi(H, codes)
    u, s, vh = torch.linalg.svd(phi, full_matrices=False)
    cutoff = torch.finfo(s.dtype).eps * max(phi.shape[-2:]) * s[..., :1]
    denominator = s.square() + alpha.unsqueeze(-1)
    tiny = torch.finfo(s.dtype).tiny
    gain = torch.where(
        (s > cutoff) & (denominator > tiny), s / denominator.clamp_min(tiny), torch.zeros_like(s)
    )
    projected = gain * (u.mH @ y.unsqueeze(-1)).squeeze(-1)
    a = (vh.mH @ projected.unsqueeze(-1)).squeeze(-1)
    return a, torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)


def _lstsq(y: Tensor, H: Tensor, codes: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    phi = _phi(H, codes)
    n_elements = phi.shape[-1]
    eye = torch.eye(n_elements, dtype=H.dtype, device=H.device)
    augmented = torch.cat([phi, alpha.sqrt()[..., None, None] * eye], dim=-2)
    target = torch.cat([y, y.new_zeros(*y.shape[:-1], n_elements)], dim=-1)
    a = torch.linalg.lstsq(augmented, target.unsqueeze(-1)).solution.squeeze(-1)
    # QR assumes an augmented matrix of full rank, which fails if sqrt(alpha) is rounding.
    rounding = torch.finfo(alpha.dtype).eps ** 2 * energy(phi)
    return a, (alpha <= rounding).any(-1)


def _gram(y: Tensor, H: Tensor, codes: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    phi = _phi(H, codes)
    eye = torch.eye(phi.shape[-1], dtype=H.dtype, device=H.device)
    normal = phi.mH @ phi + alpha[..., None, None] * eye
    cholesky, failed = _factorize(normal)
    a = _substitute(cholesky, phi.mH @ y.unsqueeze(-1)).squeeze(-1)
    return a, failed.any(-1)
