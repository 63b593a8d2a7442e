"""Least-squares fit of sources to a measurement: variable projection, Levenberg-Marquardt."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import power
from physics.scene import SourceMode
from physics.steering import Wavefront, steering_derivatives

_DAMPING = 1e-2  # of the first step, relative to the diagonal
_DAMPING_RANGE = (1e-7, 1e7)
_HOPELESS = 10.0  # damping (steps under a tenth of Newton's) from which a failed step is final


@dataclass(frozen=True)
class Measurement:
    """Snapshots as linear maps of the surface's signal, grouped by shared amplitudes.

    ``y_g = E_g sum_k b_gk a(p_k) + n_g``: with constant symbols all snapshots form one group of
    L M rows, with fluctuating ones each snapshot is a group of M rows with its own amplitudes.
    """

    y: Tensor  # (B, G, R) complex
    response: Tensor  # (B, G R, N) complex: the rows of E
    array: PlanarArray
    wavefront: Wavefront

    @classmethod
    def of(
        cls,
        y: Tensor,
        H: Tensor,
        codes: Tensor,
        array: PlanarArray,
        wavefront: Wavefront,
        source_mode: SourceMode,
    ) -> Measurement:
        """Build from y (B, L, M), H (B, M, N) and codes (B, L, N)."""
        response = (codes.unsqueeze(-2) * H.unsqueeze(-3)).flatten(1, 2)  # (B, L M, N)
        grouped = y.flatten(1).unsqueeze(1) if source_mode == "constant" else y
        return cls(grouped, response, array, wavefront)

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Measurement:
        """A subset of the scenes."""
        return replace(self, y=self.y[index], response=self.response[index])

    @property
    def n_rows(self) -> int:
        """Number of complex observations per scene, L M."""
        return self.y.shape[1] * self.y.shape[2]

    @property
    def energy(self) -> Tensor:
        """||y||^2 (B,)."""
        return power(self.y).sum((-2, -1))

    def rows(self, vectors: Tensor) -> Tensor:
        """``E v`` (B, G, P, R) of vectors (B, P, N) on the surface."""
        n_groups = self.y.shape[1]
        seen = vectors @ self.response.mT  # (B, P, G R)
        return seen.unflatten(-1, (n_groups, -1)).transpose(1, 2)

    def back_projected(self, residual: Tensor) -> Tensor:
        """``E_g^H r_g`` (B, G, N) of residuals (B, G, R)."""
        n_groups = residual.shape[1]
        rows = self.response.unflatten(1, (n_groups, -1))  # (B, G, R, N)
        return (residual.conj().unsqueeze(-2) @ rows).squeeze(-2).conj()


@dataclass(frozen=True)
class Fit:
    """Sources fitted to a measurement, with the amplitudes eliminated."""

    coordinates: Tensor  # (B, K, 3) azimuth, elevation [rad], inverse range [1/m]
    amplitude: Tensor  # (B, G, K) complex
    cost: Tensor  # (B,) energy of the residual
    residual: Tensor  # (B, G, R) complex
    gram: Tensor  # (B, G, K, K) of the sources' signals
    seen: Tensor  # (B, G, K) inner products of the sources' signals with y

    @property
    def position(self) -> Tensor:
        """(B, K, 3) azimuth, elevation [rad], range [m]."""
        return position_of(self.coordinates)

    def where(self, condition: Tensor, other: Fit) -> Fit:
        """This fit in the scenes where the condition (B,) holds, the other one elsewhere."""

        def pick(one: Tensor, two: Tensor) -> Tensor:
            return torch.where(condition.view(-1, *(1,) * (one.ndim - 1)), one, two)

        return Fit(
            **{f.name: pick(getattr(self, f.name), getattr(other, f.name)) for f in fields(Fit)}
        )


def position_of(coordinates: Tensor) -> Tensor:
    """Convert azimuth, elevation, inverse range (…, 3) to azimuth, elevation, range, or back."""
    return torch.cat([coordinates[..., :2], coordinates[..., 2:].reciprocal()], dim=-1)


def position_blocks(covariance: Tensor, range_: Tensor, unknown: Tensor) -> Tensor:
    """Covariance block (B, K, 3, 3) of each source's azimuth, elevation and range.

    Args:
        covariance: (B, 3 K, 3 K) of azimuth, elevation and inverse range, ordered by source.
        range_: (B, K) [m]; ``dr = -r^2 dq``.
        unknown: (B, 3 K) bool: coordinates of infinite variance.
    """
    n_sources = range_.shape[-1]
    blocks = covariance.unflatten(-1, (n_sources, 3)).unflatten(-3, (n_sources, 3))
    own = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, 1)
    turn = torch.stack([torch.ones_like(range_), torch.ones_like(range_), -range_.square()], -1)
    own = own * turn.unsqueeze(-1) * turn.unsqueeze(-2)
    lost = unknown.unflatten(-1, (n_sources, 3))
    own = torch.where(lost.unsqueeze(-1) | lost.unsqueeze(-2), torch.zeros_like(own), own)
    return own + torch.diag_embed(torch.where(lost, torch.inf, 0.0).to(own.dtype))


def coordinate_covariance(matrix: Tensor, noise_power: Tensor) -> Tensor:
    """``sigma^2 / 2`` times the inverse of the Gauss-Newton matrix (B, 3 K, 3 K).

    This is the covariance of the errors of azimuth, elevation and inverse range, ordered by source.
    Where the data hardly distinguish coordinates, a loading makes the variance huge instead of NaN.
    """
    kind = torch.finfo(matrix.dtype)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    system = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    loading = 1e2 * kind.eps + (diagonal <= 0)
    inverse = torch.linalg.pinv(system + torch.diag_embed(loading), hermitian=True)
    inverse = inverse * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return 0.5 * noise_power[:, None, None] * inverse


def loaded_cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of Gram matrices (…, K, K) loaded by the rounding of their diagonal.

    Coincident sources then share their amplitude, and absent ones (zero rows) get amplitude zero.
    """
    kind = torch.finfo(gram.dtype)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real
    level = 30 * kind.eps * diagonal.amax(-1, keepdim=True) + kind.tiny
    loaded = gram + torch.diag_embed(level.expand_as(diagonal)).to(gram.dtype)
    factor: Tensor = torch.linalg.cholesky_ex(loaded)[0]
    return factor


def normal_equations(
    measurement: Measurement, coordinates: Tensor, present: Tensor | None = None
) -> tuple[Fit, Tensor, Tensor]:
    """The fit at given coordinates, with the Gauss-Newton matrix and gradient of its cost.

    With amplitudes eliminated, the Jacobian of the residual is ``-P D`` (Kaufman, "A variable
    projection method for solving separable nonlinear least squares problems", BIT 15, 1975): D
    holds the derivatives of the sources' signals and P projects away the signals themselves.
    ``Re(D^H P D)`` times ``2 / sigma^2`` is also the Fisher information of the coordinates.

    Args:
        measurement: B scenes.
        coordinates: (B, K, 3) azimuth, elevation [rad], inverse range [1/m].
        present: (B, K) bool, which of them hold a source; all if left out.

    Returns:
        the fit, ``Re(D^H P D)`` (B, 3 K, 3 K) and ``Re(D^H r)`` (B, 3 K), ordered by source, then
        by coordinate.
    """
    n_sources = coordinates.shape[-2]
    a, da = steering_derivatives(position_of(coordinates), measurement.array, measurement.wavefront)
    vectors = torch.cat([a, da.flatten(-3, -2)], dim=-2)
    if present is not None:
        occupied = torch.cat([present, present.repeat_interleave(3, dim=-1)], dim=-1)
        vectors = vectors * occupied.unsqueeze(-1)
    signals = measurement.rows(vectors)
    atoms, slopes = signals[..., :n_sources, :], signals[..., n_sources:, :]
    conjugate = atoms.conj().resolve_conj()
    gram = conjugate @ atoms.mT
    seen = (conjugate @ measurement.y.unsqueeze(-1)).squeeze(-1)
    cholesky = loaded_cholesky(gram)
    amplitude = torch.cholesky_solve(seen.unsqueeze(-1), cholesky).squeeze(-1)
    residual = measurement.y - (amplitude.unsqueeze(-2) @ atoms).squeeze(-2)
    D, matrix = gauss_newton(atoms, slopes, amplitude, cholesky)
    gradient = (
        (torch.view_as_real(D) * torch.view_as_real(residual).unsqueeze(-3)).sum((-2, -1)).sum(1)
    )
    cost = power(residual).sum((-2, -1))
    return Fit(coordinates, amplitude, cost, residual, gram, seen), matrix, gradient


def gauss_newton(
    atoms: Tensor, slopes: Tensor, amplitude: Tensor, cholesky: Tensor
) -> tuple[Tensor, Tensor]:
    """D^T (B, G, 3 K, R) and ``Re(D^H P D)`` (B, 3 K, 3 K).

    Args:
        atoms: (B, G, K, R) signals of unit sources.
        slopes: (B, G, 3 K, R) their derivatives.
        amplitude: (B, G, K) complex.
        cholesky: (B, G, K, K) factor of the signals' Gram matrix.
    """
    D = slopes * amplitude.repeat_interleave(3, dim=-1).unsqueeze(-1)
    inside = torch.linalg.solve_triangular(cholesky, atoms.conj() @ D.mT, upper=False)
    return D, _real_gram(D) - _real_gram(inside.mT)


def _real_gram(rows: Tensor) -> Tensor:
    """``Re sum_g C_g^H C_g`` (B, P, P) of rows C^T (B, G, P, R), by one real matrix product."""
    flat = torch.view_as_real(rows.transpose(1, 2).contiguous()).flatten(2)  # (B, P, 2 G R)
    return flat @ flat.mT


@in_full_precision
def refine(
    measurement: Measurement,
    coordinates: Tensor,
    bounds: Tensor,
    n_iterations: int,
    present: Tensor | None = None,
) -> tuple[Fit, Tensor]:
    """Joint Levenberg-Marquardt refinement of all sources of every scene.

    Steps that do not lower a scene's cost are undone and its damping is raised; coordinates at a
    bound that the gradient pushes outwards are held there. It stops early when no scene improves
    any more.

    Args:
        measurement: B scenes.
        coordinates: (B, K, 3) start: azimuth, elevation [rad], inverse range [1/m].
        bounds: (2, 3) least and greatest value of each coordinate.
        n_iterations: maximum number of steps.
        present: (B, K) bool, which of them hold a source; all if left out.

    Returns:
        the fit and ``Re(D^H P D)`` (B, 3 K, 3 K) there.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", J.
    SIAM 11(2), 1963; Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear
    least squares problems whose variables separate", SIAM J. Numer. Anal. 10(2), 1973.
    """
    low, high = bounds[0], bounds[1]
    best, matrix, gradient = normal_equations(measurement, coordinates.clamp(low, high), present)
    kind = torch.finfo(best.cost.dtype)
    damping = torch.full_like(best.cost, _DAMPING)
    for _ in range(n_iterations):
        step = _step(best.coordinates, matrix, gradient, damping, low, high)
        moved = (best.coordinates + step).clamp(low, high)
        fit, new_matrix, new_gradient = normal_equations(measurement, moved, present)
        better = fit.cost < best.cost
        settled = fit.cost > best.cost * (1.0 - 10 * kind.eps)  # also where the step failed
        damping = torch.where(better, damping * 0.2, damping * 5.0).clamp(*_DAMPING_RANGE)
        best = fit.where(better, best)
        matrix = torch.where(better[:, None, None], new_matrix, matrix)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        if bool((settled & (better | (damping >= _HOPELESS))).all()):
            break
    return best, matrix


def _step(
    coordinates: Tensor,  # (B, K, 3)
    matrix: Tensor,  # (B, 3 K, 3 K)
    gradient: Tensor,  # (B, 3 K), in the direction in which the cost falls
    damping: Tensor,  # (B,)
    low: Tensor,  # (3,)
    high: Tensor,  # (3,)
) -> Tensor:
    flat, n_sources = coordinates.flatten(-2), coordinates.shape[-2]
    held = ((flat <= low.repeat(n_sources)) & (gradient < 0)) | (
        (flat >= high.repeat(n_sources)) & (gradient > 0)
    )
    free = (~held).to(matrix.dtype)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    kind = torch.finfo(matrix.dtype)
    level = diagonal.amax(-1, keepdim=True) * kind.eps + kind.tiny
    # Marquardt's scaling; a coordinate that does not affect the data stays where it is.
    scale = (diagonal + level).rsqrt() * free
    system = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    system = system + torch.diag_embed(damping.unsqueeze(-1) + 1.0 - free)
    cholesky, info = torch.linalg.cholesky_ex(system)
    step = torch.cholesky_solve((gradient * scale).unsqueeze(-1), cholesky).squeeze(-1) * scale
    step = torch.where((info == 0).unsqueeze(-1) & torch.isfinite(step), step, 0.0)
    return step.unflatten(-1, (n_sources, 3))
