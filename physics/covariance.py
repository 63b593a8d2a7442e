"""Covariances of the surface, stored as a factor and a diagonal loading, never as N x N."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from physics.checks import as_fraction
from physics.columns import Block, Columns, joined, serves
from physics.precision import in_full_precision
from physics.products import energy_beyond
from physics.scaling import column_energy, divide, divisor, energy, multiply, peak, power
from physics.subspace import dominant_energy, dominant_weights
from physics.tikhonov import Solver, tikhonov_solve


class LowRankCovariance:
    """Hermitian positive semi-definite matrix ``R = F F^H + loading I`` with ``F = C diag(s)``.

    Args:
        columns: C (…, N, r) complex: the factor itself, or steering vectors of sources.
        loading: (…) real, at least 0, or None for none.
        amplitudes: s (…, r) real, at least 0, or None for ones. Scaling and blending change only
            these: the columns, and the products cached for them, are shared. Normalising scales the
            columns themselves where there are no amplitudes and the columns require a gradient.

    The methods cost O(N r^2) at most; only :meth:`dense` forms N x N.
    """

    def __init__(
        self,
        columns: Tensor,
        loading: Tensor | None = None,
        amplitudes: Tensor | None = None,
    ) -> None:
        if loading is not None and loading.is_complex():
            raise ValueError(f"loading is {loading.dtype}; expected a real tensor (...)")
        if amplitudes is not None and (
            amplitudes.is_complex() or amplitudes.shape[-1:] != columns.shape[-1:]
        ):
            raise ValueError(
                f"amplitudes are {amplitudes.dtype} of shape {tuple(amplitudes.shape)}; expected "
                f"a real tensor (..., {columns.shape[-1]}), one for each column"
            )
        self._set(Columns(Block(columns)), amplitudes, loading, False)

    @classmethod
    def _of(
        cls, columns: Columns, amplitudes: Tensor | None, loading: Tensor | None, at_trace_n: bool
    ) -> LowRankCovariance:
        """Build from existing columns; ``at_trace_n`` says whether the trace is known to be N."""
        made = cls.__new__(cls)
        made._set(columns, amplitudes, loading, at_trace_n)
        return made

    def _set(
        self, columns: Columns, amplitudes: Tensor | None, loading: Tensor | None, at_trace_n: bool
    ) -> None:
        self._columns, self._amplitudes, self._loading = columns, amplitudes, loading
        self._at_trace_n = at_trace_n
        self._factor: Tensor | None = None
        self._gram: Tensor | None = None
        self._norms: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return (
            f"LowRankCovariance(batch={tuple(self.batch_shape)}, size={self.size}, "
            f"rank={self.rank}, dtype={self.dtype}, device={self.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the columns."""
        return self._columns.first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the columns."""
        return self._columns.first.device

    @property
    def size(self) -> int:
        """N."""
        return self._columns.first.shape[-2]

    @property
    def rank(self) -> int:
        """Number r of columns of the factor."""
        return sum(self._columns.ranks)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading shape."""
        weights = self.amplitudes.shape[:-1]
        return torch.broadcast_shapes(self._columns.batch_shape, weights, self.loading.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether the factor requires a gradient."""
        weighted = self._amplitudes is not None and self._amplitudes.requires_grad
        return weighted or self._columns.requires_grad

    @property
    def loading(self) -> Tensor:
        """Diagonal loading (…) real."""
        if self._loading is None:
            columns = self._columns.first
            return columns.real.new_zeros(columns.shape[:-2])
        return self._loading

    @property
    def columns(self) -> Tensor:
        """C (…, N, r)."""
        return self._columns.together()

    @property
    def amplitudes(self) -> Tensor:
        """s (…, r)."""
        if self._amplitudes is None:
            return torch.ones(self.rank, dtype=self.dtype.to_real(), device=self.device)
        return self._amplitudes

    @property
    def factor(self) -> Tensor:
        """F (…, N, r), formed once."""
        if self._factor is None or not self._keeps(self._factor):
            self._factor = self._weighted(self.columns, dim=-1)
        return self._factor

    def _weighted(self, product: Tensor, dim: int) -> Tensor:
        """Turn a product of the columns, which lie along ``dim``, into one of the factor."""
        if self._amplitudes is None:
            return product
        return multiply(product, self._amplitudes.unsqueeze(-3 - dim))

    def _keeps(self, product: Tensor) -> bool:
        return serves(product, self.requires_grad)

    def detach(self) -> LowRankCovariance:
        """The same matrix, cut from the graph."""
        amplitudes = None if self._amplitudes is None else self._amplitudes.detach()
        loading = None if self._loading is None else self._loading.detach()
        return self._of(self._columns.detach(), amplitudes, loading, self._at_trace_n)

    def to(self, *args: Any, **kwargs: Any) -> LowRankCovariance:
        """Move the factor by ``Tensor.to``; the loading follows in the matching real dtype."""
        factor = self.factor.to(*args, **kwargs)
        return LowRankCovariance(factor, self.loading.to(factor.device, factor.dtype.to_real()))

    @in_full_precision
    def gram(self) -> Tensor:
        """F^H F (…, r, r), computed once."""
        if self._gram is None or not self._keeps(self._gram):
            self._gram = self._columns.gram()
            if self._amplitudes is not None:
                s = self._amplitudes
                self._gram = multiply(self._gram, s.unsqueeze(-1) * s.unsqueeze(-2))
        return self._gram

    @in_full_precision
    def dense(self) -> Tensor:
        """The matrix itself (…, N, N)."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.factor @ self.factor.mH + self.loading[..., None, None] * eye

    def trace(self) -> Tensor:
        """tr R (…) real."""
        energy = self._factor_energy()
        return energy if self._loading is None else energy + self.size * self._loading

    def _factor_energy(self) -> Tensor:
        """||F||_F^2 (…); it follows from the loading where the trace is N."""
        if self._at_trace_n:
            return self.size * (1.0 - self.loading)
        if self.requires_grad:
            return energy(self.factor)
        return self.gram().diagonal(dim1=-2, dim2=-1).real.sum(-1)

    def normalized(self, *, moderate: bool = False) -> LowRankCovariance:
        """R scaled to trace N; the zero matrix becomes the identity.

        Args:
            moderate: the caller knows that no product of two entries over- or underflows;
                otherwise the columns are first scaled to a largest modulus of 1.
        """
        if self._at_trace_n:
            return self
        unit = self if moderate else self._without_scale()
        trace = unit.trace()
        nothing = trace <= 0
        scale = self.size / trace.masked_fill(nothing, 1.0)
        if unit._loading is None:
            loading = nothing.to(trace.dtype)
        else:
            loading = (unit._loading * scale).masked_fill(nothing, 1.0)
        if unit._amplitudes is not None or not unit.requires_grad:
            return unit._scaled(scale.sqrt(), loading, True)
        # Scale the columns here, so that no amplitude carries a gradient through later products.
        rows = multiply(unit.factor.mT, scale.sqrt()[..., None, None])
        return self._of(Columns(Block(rows.mT)), None, loading, True)

    def reweighted(self, amplitudes: Tensor) -> LowRankCovariance:
        """``C diag(s)^2 C^H`` with the same columns, other amplitudes s (…, r) and no loading."""
        return self._of(self._columns, amplitudes, None, False)

    def _scaled(self, root: Tensor, loading: Tensor, at_trace_n: bool) -> LowRankCovariance:
        """The same columns with their amplitudes times ``root`` (…), and another loading."""
        amplitudes = root.unsqueeze(-1).expand(*root.shape, self.rank)
        if self._amplitudes is not None:
            amplitudes = amplitudes * self._amplitudes
        return self._of(self._columns, amplitudes, loading, at_trace_n)

    def shrunk(self, shrinkage: float | Tensor) -> LowRankCovariance:
        """``(1 - rho) R + rho tr(R)/N I``, which keeps the trace.

        Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", J. Multivariate Anal. 88(2), 2004.
        """
        if isinstance(shrinkage, float) and shrinkage == 0.0:
            return self
        rho = as_fraction("shrinkage", shrinkage, self.loading)
        loading = (1.0 - rho) * self.loading + rho * self.trace() / self.size
        return self._scaled((1.0 - rho).sqrt(), loading, self._at_trace_n)

    def mixed(self, other: LowRankCovariance, share: Tensor) -> LowRankCovariance:
        """``(1 - share) R + share S`` of two matrices, each first scaled to trace N.

        Args:
            other: S.
            share: weight of S in [0, 1], shape (…).
        """
        own, other = self.normalized(), other.normalized()
        parts = [
            R.amplitudes * weight.sqrt().unsqueeze(-1)
            for R, weight in ((own, 1.0 - share), (other, share))
        ]
        loading = (1.0 - share) * own.loading + share * other.loading
        return self._of(own._columns + other._columns, joined(parts, dim=-1), loading, True)

    def loaded(self, loading: float | Tensor) -> LowRankCovariance:
        """``R + loading tr(R)/N I``: diagonal loading relative to the mean diagonal."""
        raised = self.loading + loading * self.trace() / self.size
        return self._of(self._columns, self._amplitudes, raised, False)

    @in_full_precision
    def inner(self, other: LowRankCovariance) -> Tensor:
        """Frobenius inner product ``tr(R S)`` (…) real.

        ``||F^H G||^2 + a ||G||^2 + b ||F||^2 + a b N`` for ``R = F F^H + a I, S = G G^H + b I``.
        """
        return (
            (energy(self.gram()) if other is self else self._cross_energy(other))
            + self.loading * other._factor_energy()
            + other.loading * self._factor_energy()
            + self.size * self.loading * other.loading
        )

    def _squared_norms(self) -> tuple[Tensor, Tensor]:
        """||F F^H||^2 and ||R||^2 (…) at trace N, computed once."""
        wanted = self.requires_grad or self.loading.requires_grad
        if self._norms is None or not serves(self._norms[1], wanted):
            own = energy(self.gram())
            self._norms = own, own + self.size * self.loading * (2.0 - self.loading)
        return self._norms

    def _cross_energy(self, other: LowRankCovariance) -> Tensor:
        """||F^H G||^2 (…)."""
        energies = column_energy(self.project(other.columns.mT))
        return (energies * other.amplitudes.square()).sum(-1)

    @in_full_precision
    def matmul(self, x: Tensor) -> Tensor:
        """R x for x (…, N, p)."""
        return self.factor @ (self.factor.mH @ x) + self.loading[..., None, None] * x

    @in_full_precision
    def solve(self, x: Tensor) -> Tensor:
        """R^-1 x for x (…, N, p), by Woodbury's identity on the r x r capacitance matrix.

        Raises:
            ValueError: a loading that is not positive; the matrix is singular then.
        """
        self._require_loading("solve")
        delta = self.loading[..., None, None]
        z = torch.cholesky_solve(self.factor.mH @ x, self._capacitance_cholesky())
        return (x - self.factor @ z) / delta

    @in_full_precision
    def quadratic(self, vectors: Tensor) -> Tensor:
        """``v^H R v`` (…, G) of row vectors (…, G, N)."""
        projected = column_energy(self.project(vectors))
        return projected + self.loading[..., None] * power(vectors).sum(-1)

    @in_full_precision
    def inverse_quadratic(self, vectors: Tensor) -> Tensor:
        """``v^H R^-1 v`` (…, G) of row vectors (…, G, N), by Woodbury's identity.

        Raises:
            ValueError: a loading that is not positive.
        """
        self._require_loading("inverse_quadratic")
        z = self.project(vectors).conj()  # F^H v
        whitened = torch.linalg.solve_triangular(self._capacitance_cholesky(), z, upper=False)
        norm = power(vectors).sum(-1)
        tiny = torch.finfo(norm.dtype).eps * norm
        return torch.maximum(norm - column_energy(whitened), tiny) / self.loading[..., None]

    def _require_loading(self, what: str) -> None:
        if not bool((self.loading > 0).all()):
            raise ValueError(
                f"{what} needs a positive loading in every batch item, got a smallest of "
                f"{float(self.loading.min())}; load the covariance first: R.loaded(1e-3)"
            )

    def _capacitance_cholesky(self) -> Tensor:
        gram = self.gram()
        eye = torch.eye(self.rank, dtype=gram.dtype, device=gram.device)
        capacitance = gram + self.loading[..., None, None] * eye
        cholesky, info = torch.linalg.cholesky_ex(capacitance)
        if bool((info != 0).any()):
            # The loading is below the rounding of the Gram matrix: raise it to that rounding.
            rounding = self.rank * torch.finfo(self.loading.dtype).eps * energy(self.factor)
            raised = torch.where(info != 0, rounding, torch.zeros_like(rounding))
            cholesky = torch.linalg.cholesky(capacitance + raised[..., None, None] * eye)
        return cholesky

    @in_full_precision
    def eigenvalues(self) -> Tensor:
        """The r largest eigenvalues (…, r), descending; the others equal the loading."""
        values = torch.linalg.eigvalsh(self.gram()).flip(-1).clamp_min(0.0)
        return values + self.loading[..., None]

    @in_full_precision
    def dominant_energy(
        self, projected: Tensor, n_sources: int | Tensor, at_most: int | None = None
    ) -> Tensor:
        """``||U_K^H v||^2`` (…, G) from the result of :meth:`project` for the vectors v.

        See :func:`physics.subspace.dominant_energy`; the scale of R must be moderate.
        """
        return dominant_energy(self.gram(), projected, n_sources, at_most)

    @in_full_precision
    def subspace_energy(self, vectors: Tensor, n_sources: int | Tensor) -> Tensor:
        """``||U_K^H v||^2`` (…, G) of row vectors (…, G, N) and the dominant subspace U_K."""
        unit = self._without_scale()
        return unit.dominant_energy(unit.project(vectors), n_sources)

    @in_full_precision
    def project(self, vectors: Tensor) -> Tensor:
        """``conj(F^H v)`` (…, r, G) of row vectors (…, G, N).

        Vectors without leading dimensions, such as a grid's, take a single matrix product.
        """
        return self._weighted(self._columns.project(vectors), dim=-2)

    @in_full_precision
    def dominant_weights(
        self, n_sources: int | Tensor, at_most: int | None = None, *, trusting: bool = False
    ) -> Tensor:
        """W (…, r, at_most) of ``U_K = F W``, an orthonormal basis of the dominant subspace.

        See :func:`physics.subspace.dominant_weights`; the scale of R must be moderate.
        """
        return dominant_weights(self.gram(), n_sources, at_most, trusting=trusting)

    @in_full_precision
    def combined(self, weights: Tensor) -> Tensor:
        """Vectors F W as rows (…, K, N), for weights W (…, r, K)."""
        return self._columns.combined(self._weighted(weights, dim=-2))

    @in_full_precision
    def signal_subspace(self, n_sources: int) -> Tensor:
        """Orthonormal basis U_K (…, N, K) of the dominant subspace, largest first.

        Raises:
            ValueError: K outside 0..r.
        """
        if not 0 <= n_sources <= self.rank:
            raise ValueError(
                f"n_sources is {n_sources}; a covariance of rank {self.rank} has a signal "
                f"subspace of 0..{self.rank} dimensions"
            )
        unit = self._without_scale()
        _, v = torch.linalg.eigh(unit.gram())
        dominant = unit.factor @ v[..., self.rank - n_sources :].flip(-1)
        q, _ = torch.linalg.qr(dominant)
        return q

    def _without_scale(self) -> LowRankCovariance:
        """The same subspaces, with the factor scaled so that its square cannot overflow."""
        scale = divisor(torch.maximum(peak(self.factor), self.loading.detach().sqrt()))
        loading = None if self._loading is None else self._loading / scale / scale
        return LowRankCovariance(divide(self.factor, scale[..., None, None]), loading)


@in_full_precision
def nmse(
    estimate: LowRankCovariance, truth: LowRankCovariance, projected: Tensor | None = None
) -> Tensor:
    """Normalised mean-square error ``||R^ - R||_F^2 / ||R||_F^2`` (…) of trace-normalised matrices.

    Both matrices are Hermitian by construction and are scaled to trace N here. With
    ``R^ = F F^H + a I`` and ``R = G G^H + b I`` of trace N, the loadings add only
    ``-N (a - b)^2`` to ``||F F^H - G G^H||^2 = ||F^H F||^2 - 2 ||F^H G||^2 + ||G^H G||^2``.

    Args:
        estimate: R^.
        truth: R.
        projected: ``estimate.project(truth.columns.mT)`` of both at trace N, if already computed.
    """
    if projected is not None:
        # ``projected`` was computed with the columns at their present scale: keep that scale.
        estimate, truth = estimate.normalized(moderate=True), truth.normalized(moderate=True)
    else:
        estimate, truth = estimate.normalized(), truth.normalized()
    if projected is None:
        projected = estimate.project(truth.columns.mT)
    own, norm = truth._squared_norms()
    error = energy_beyond(estimate.gram(), projected, truth.amplitudes.square())
    error = error + own.sub((estimate.loading - truth.loading).square(), alpha=truth.size)
    return error.clamp_min(0.0) / norm


def source_covariance(steering: Tensor, power: Tensor) -> LowRankCovariance:
    """``sum_k p_k a_k a_k^H`` of incoherent sources, scaled to trace N.

    Args:
        steering: (…, K, N) complex steering vectors as rows.
        power: (…, K) real, at least 0; 0 for absent sources. All zero gives the identity.
    """
    largest = power.amax(-1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    sources = LowRankCovariance(steering.mT, amplitudes=(power / largest).sqrt())
    return sources.normalized(moderate=True)  # steering vectors have unit norm


def covariance_of(snapshots: Tensor) -> LowRankCovariance:
    """``(1/L) sum_l a_l a_l^H`` of snapshots (…, L, N), scaled to trace N.

    The mean is not removed: with constant symbols it is the signal.
    """
    return LowRankCovariance(snapshots.mT).normalized()


def sample_covariance(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    regularization: float = 1e-3,
    solver: Solver = "auto",
) -> LowRankCovariance:
    """R_samp of the surface's signal from one regularised least-squares fit per snapshot.

    ``R_samp = (1/L) sum_l a_l a_l^H`` with ``a_l`` from :func:`physics.tikhonov_solve`, scaled to
    trace N and not mean-centred. Zero snapshots or a zero channel give the identity.

    Args:
        y: (…, L, M) complex.
        H: (…, M, N) complex.
        codes: (…, L, N) complex.
        regularization: lambda, relative to tr(Phi^H Phi)/N.
        solver: see :func:`physics.tikhonov_solve`.

    Raises:
        ValueError: non-finite or misshapen input.
    """
    snapshots, _ = tikhonov_solve(y, H, codes, regularization=regularization, solver=solver)
    return covariance_of(snapshots)
