"""Least-squares fit of sources to a measurement: variable projection, Levenberg-Marquardt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import multiply, power
from physics.scene import SourceMode
from physics.steering import Wavefront, steering_derivatives, steering_vector

_DAMPING = 1e-2  # of the first step, relative to the diagonal
_DAMPING_RANGE = (1e-7, 1e7)


@dataclass(frozen=True)
class Measurement:
    """Snapshots as linear maps of the surface's signal, grouped by who shares an amplitude.

    ``y_g = E_g sum_k b_gk a(p_k) + n_g``: with constant symbols all snapshots make one group of
    L M rows, with fluctuating ones each snapshot is a group of M rows with amplitudes of its own.
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
        """From y (B, L, M), H (B, M, N) and codes (B, L, N)."""
        response = (codes.unsqueeze(-2) * H.unsqueeze(-3)).flatten(1, 2)  # (B, L M, N)
        grouped = y.flatten(1).unsqueeze(1) if source_mode == "constant" else y
        return cls(grouped, response, array, wavefront)

    def __len__(self) -> int:
        return self.y.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Measurement:
        """Some of the scenes."""
        return replace(self, y=self.y[index], response=self.response[index])

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
    """Sources fitted to a measurement, amplitudes eliminated."""

    coordinates: Tensor  # (B, K, 3) azimuth, elevation [rad], inverse range [1/m]
    amplitude: Tensor  # (B, G, K) complex
    cost: Tensor  # (B,) energy of the residual
    residual: Tensor  # (B, G, R) complex

    @property
    def position(self) -> Tensor:
        """(B, K, 3) azimuth, elevation [rad], range [m]."""
        angles, q = self.coordinates[..., :2], self.coordinates[..., 2:]
        return torch.cat([angles, q.reciprocal()], dim=-1)


def solve_amplitudes(measurement: Measurement, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Amplitudes of atoms (B, G, K, R) by least squares.

    Atoms that coincide share theirs: the Gram matrix is loaded at its rounding.

    Returns:
        amplitude (B, G, K), residual (B, G, R) and the Gram matrix's Cholesky factor
        (B, G, K, K).
    """
    gram = atoms.conj() @ atoms.mT
    seen = (atoms.conj() @ measurement.y.unsqueeze(-1)).squeeze(-1)
    cholesky = loaded_cholesky(gram)
    amplitude = torch.cholesky_solve(seen.unsqueeze(-1), cholesky).squeeze(-1)
    residual = measurement.y - (amplitude.unsqueeze(-2) @ atoms).squeeze(-2)
    return amplitude, residual, cholesky


def loaded_cholesky(gram: Tensor) -> Tensor:
    """Cholesky factor of a Gram matrix loaded at 30 times the rounding of its diagonal."""
    kind = torch.finfo(gram.dtype)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real
    level = 30 * kind.eps * diagonal.amax(-1, keepdim=True) + kind.tiny
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(level.expand_as(diagonal)).to(gram.dtype))[0]


def evaluate(measurement: Measurement, coordinates: Tensor) -> Fit:
    """The fit of given coordinates (B, K, 3) = azimuth, elevation, inverse range."""
    atoms = measurement.rows(_steering(measurement, coordinates))
    amplitude, residual, _ = solve_amplitudes(measurement, atoms)
    return Fit(coordinates, amplitude, power(residual).sum((-2, -1)), residual)


def _steering(measurement: Measurement, coordinates: Tensor) -> Tensor:
    position = torch.cat([coordinates[..., :2], coordinates[..., 2:].reciprocal()], dim=-1)
    return steering_vector(position, measurement.array, measurement.wavefront)


def normal_equations(
    measurement: Measurement, coordinates: Tensor
) -> tuple[Fit, Tensor, Tensor]:
    """The fit at coordinates, with the Gauss-Newton matrix and gradient of its cost.

    With amplitudes eliminated, the Jacobian of the residual is ``-P D`` (Kaufman, 1975): D holds
    the derivatives of the sources' signals and P projects away the sources' own. The matrix
    ``Re(D^H P D)`` is also the Fisher information of the coordinates, times sigma^2 / 2.

    Returns:
        the fit, ``Re(D^H P D)`` (B, 3 K, 3 K) and ``Re(D^H P r)`` (B, 3 K), for coordinates in
        the order of the sources.
    """
    n_sources = coordinates.shape[-2]
    position = torch.cat([coordinates[..., :2], coordinates[..., 2:].reciprocal()], dim=-1)
    a, da = steering_derivatives(position, measurement.array, measurement.wavefront)
    seen = measurement.rows(torch.cat([a, da.flatten(-3, -2)], dim=-2))
    atoms, slopes = seen[..., :n_sources, :], seen[..., n_sources:, :]
    amplitude, residual, cholesky = solve_amplitudes(measurement, atoms)
    D = slopes * amplitude.repeat_interleave(3, dim=-1).unsqueeze(-1)  # (B, G, 3 K, R)
    inside = torch.linalg.solve_triangular(cholesky, atoms.conj() @ D.mT, upper=False)
    matrix = _real_gram(D.transpose(-1, -2)) - _real_gram(inside)
    gradient = (D.conj() @ residual.unsqueeze(-1)).real.squeeze(-1).sum(1)
    fit = Fit(coordinates, amplitude, power(residual).sum((-2, -1)), residual)
    return fit, matrix, gradient


def _real_gram(columns: Tensor) -> Tensor:
    """``Re sum_g C_g^H C_g`` (B, P, P) of (B, G, R, P): one product of real matrices."""
    rows = torch.view_as_real(columns.resolve_conj().contiguous())  # (B, G, R, P, 2)
    flat = rows.movedim(-2, 1).flatten(2)  # (B, P, G R 2)
    return flat @ flat.mT


@in_full_precision
def refine(
    measurement: Measurement,
    coordinates: Tensor,
    bounds: Tensor,
    n_iterations: int,
    *,
    tolerance: float | None = None,
) -> Fit:
    """Joint Levenberg-Marquardt refinement of all sources of every scene.

    Steps that do not lower a scene's cost are undone and its damping is raised; coordinates at a
    bound that the gradient pushes outwards are held there.

    Args:
        measurement: B scenes.
        coordinates: (B, K, 3) start: azimuth, elevation [rad], inverse range [1/m].
        bounds: (2, 3) least and greatest value of each coordinate.
        n_iterations: the most steps to take.
        tolerance: stop when no scene's cost fell by more than this share in a step; the rounding
            of the dtype if left out.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", J.
    SIAM 11(2), 1963; Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear
    least squares problems whose variables separate", SIAM J. Numer. Anal. 10(2), 1973.
    """
    low, high = bounds[0], bounds[1]
    coordinates = coordinates.clamp(low, high)
    best, matrix, gradient = normal_equations(measurement, coordinates)
    kind = torch.finfo(best.cost.dtype)
    tolerance = 10 * kind.eps if tolerance is None else tolerance
    damping = torch.full_like(best.cost, _DAMPING)
    for _ in range(n_iterations):
        step = _step(best.coordinates, matrix, gradient, damping, low, high)
        moved = (best.coordinates + step).clamp(low, high)
        fit, new_matrix, new_gradient = normal_equations(measurement, moved)
        better = fit.cost < best.cost
        gain = torch.where(better, 1.0 - fit.cost / best.cost.clamp_min(kind.tiny), 0.0)
        damping = torch.where(better, damping * 0.2, damping * 5.0).clamp(*_DAMPING_RANGE)
        best = _where(better, fit, best)
        matrix = torch.where(better[:, None, None], new_matrix, matrix)
        gradient = torch.where(better[:, None], new_gradient, gradient)
        if not bool((gain > tolerance).any()) and not bool((~better & (damping < 1e2)).any()):
            break
    return best


def _where(condition: Tensor, one: Fit, other: Fit) -> Fit:
    pick = condition[:, None, None]
    return Fit(
        torch.where(pick, one.coordinates, other.coordinates),
        torch.where(pick, one.amplitude, other.amplitude),
        torch.where(condition, one.cost, other.cost),
        torch.where(pick, one.residual, other.residual),
    )


def _step(
    coordinates: Tensor,
    matrix: Tensor,
    gradient: Tensor,
    damping: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    flat = coordinates.flatten(-2)
    n_sources = coordinates.shape[-2]
    # gradient is that of -cost / 2: it points where the cost falls
    held = ((flat <= low.repeat(n_sources)) & (gradient < 0)) | (
        (flat >= high.repeat(n_sources)) & (gradient > 0)
    )
    free = (~held).to(matrix.dtype)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    kind = torch.finfo(matrix.dtype)
    level = diagonal.amax(-1, keepdim=True) * kind.eps + kind.tiny
    # Marquardt's scaling; what the data do not see at all stays where it is.
    scale = (diagonal + level).rsqrt() * free
    scaled = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    held_diagonal = torch.diag_embed(1.0 - free)
    system = scaled + damping[:, None, None] * eye + held_diagonal
    cholesky, info = torch.linalg.cholesky_ex(system)
    step = torch.cholesky_solve((gradient * scale).unsqueeze(-1), cholesky).squeeze(-1) * scale
    step = torch.where((info == 0).unsqueeze(-1) & torch.isfinite(step), step, 0.0)
    return step.unflatten(-1, (n_sources, 3))
