"""Covariances of the surface, kept as a factor and a diagonal loading; never N x N."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from physics.config import FrozenModel
from physics.precision import in_full_precision
from physics.scaling import divide, divisor, energy, multiply, peak
from physics.tikhonov import Solver, tikhonov_solve


class BlendConfig(FrozenModel):
    """How the predicted and the measured covariance are blended."""

    beta: float = Field(0.30, ge=0, le=1, description="weight of R_samp in R_blend")
    jitter: float = Field(0.05, ge=0, le=1, description="beta +- jitter while training")
    shrinkage: float = Field(0.0, ge=0, le=1, description="R_samp shrunk to identity by this")


class LowRankCovariance:
    """Hermitian positive semi-definite matrix ``R = F F^H + loading I``.

    Args:
        factor: F (…, N, r) complex, or its columns in several blocks (…, N, r_i) of one leading
            shape. Products are taken block by block, so that backward leaves out blocks that
            need no gradient, such as R_samp's in a blend.
        loading: (…) real, at least 0, or None for none.

    The methods cost O(N r^2) at most; only :meth:`dense` forms N x N.
    """

    def __init__(self, factor: Tensor | tuple[Tensor, ...], loading: Tensor | None = None) -> None:
        blocks = (factor,) if isinstance(factor, Tensor) else factor
        for block in blocks:
            if not block.is_complex() or block.ndim < 2:
                raise ValueError(
                    f"factor is {block.dtype} of shape {tuple(block.shape)}; "
                    "expected a complex tensor (..., N, r)"
                )
            if 0 in block.shape[-2:]:
                raise ValueError(
                    f"factor has shape {tuple(block.shape)}; expected at least one row and "
                    "column (a zero column stands for rank 0)"
                )
        if loading is None:
            loading = blocks[0].real.new_zeros(blocks[0].shape[:-2])
        elif loading.is_complex():
            raise ValueError(f"loading is {loading.dtype}; expected a real tensor (...)")
        self._blocks = blocks
        self.loading = loading
        self._at_trace_n = False
        self._factor: Tensor | None = None
        self._gram: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"LowRankCovariance(batch={tuple(self.batch_shape)}, size={self.size}, "
            f"rank={self.rank}, dtype={self.factor.dtype}, device={self.factor.device})"
        )

    @property
    def factor(self) -> Tensor:
        """F (…, N, r), put together once."""
        if len(self._blocks) == 1:
            return self._blocks[0]
        if self._factor is None or not self._serves(self._factor):
            self._factor = torch.cat(self._blocks, dim=-1)
        return self._factor

    def _serves(self, kept: Tensor) -> bool:
        """Whether a kept product may be used here; one made without a graph lacks the gradient."""
        wanted = torch.is_grad_enabled() and any(block.requires_grad for block in self._blocks)
        return kept.requires_grad or not wanted

    @property
    def size(self) -> int:
        """N."""
        return self._blocks[0].shape[-2]

    @property
    def rank(self) -> int:
        """Columns of the factor, r."""
        return sum(block.shape[-1] for block in self._blocks)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading shape."""
        return torch.broadcast_shapes(self._blocks[0].shape[:-2], self.loading.shape)

    @classmethod
    def of_trace_n(cls, factor: Tensor, total: Tensor) -> LowRankCovariance:
        """A factor that is known to be at trace N, or zero where ``total`` (…) is.

        As in :meth:`normalized`, zero becomes the identity.
        """
        loading = (total == 0).to(factor.dtype.to_real())
        return cls(factor, loading)._marked(True)

    def detach(self) -> LowRankCovariance:
        """The same matrix, cut from the graph."""
        same = LowRankCovariance(self.factor.detach(), self.loading.detach())
        return same._marked(self._at_trace_n)

    def _marked(self, at_trace_n: bool) -> LowRankCovariance:
        """This matrix, remembered as being at trace N so that it is not scaled again."""
        self._at_trace_n = at_trace_n
        return self

    def to(self, *args: Any, **kwargs: Any) -> LowRankCovariance:
        """Move the factor by ``Tensor.to``; the loading follows in the matching real dtype."""
        factor = self.factor.to(*args, **kwargs)
        return LowRankCovariance(factor, self.loading.to(factor.device, factor.dtype.to_real()))

    @in_full_precision
    def gram(self) -> Tensor:
        """F^H F (…, r, r), computed once."""
        if self._gram is None or not self._serves(self._gram):
            blocks = self._blocks
            upper = {
                (i, j): blocks[i].mH @ blocks[j] for j in range(len(blocks)) for i in range(j + 1)
            }
            rows = [
                [upper[i, j] if i <= j else upper[j, i].mH for j in range(len(blocks))]
                for i in range(len(blocks))
            ]
            self._gram = torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)
        return self._gram

    @in_full_precision
    def dense(self) -> Tensor:
        """The matrix itself (…, N, N)."""
        eye = torch.eye(self.size, dtype=self.factor.dtype, device=self.factor.device)
        return self.factor @ self.factor.mH + self.loading[..., None, None] * eye

    def trace(self) -> Tensor:
        """tr R (…) real."""
        return self._factor_energy() + self.size * self.loading

    def _factor_energy(self) -> Tensor:
        """||F||_F^2 (…), which follows from the loading where the trace is N."""
        if self._at_trace_n:
            return self.size * (1.0 - self.loading)
        return energy(self.factor)

    def normalized(self) -> LowRankCovariance:
        """R scaled to trace N. The zero matrix, which says nothing, becomes the identity."""
        if self._at_trace_n:
            return self
        scale = divisor(torch.maximum(peak(self.factor), self.loading.detach().sqrt()))
        factor = divide(self.factor, scale[..., None, None])
        loading = self.loading / scale / scale
        trace = energy(factor) + self.size * loading
        known = trace > 0
        scale = self.size / torch.where(known, trace, torch.ones_like(trace))
        loading = torch.where(known, loading * scale, torch.ones_like(loading))
        factor = multiply(factor, scale.sqrt()[..., None, None])
        return LowRankCovariance(factor, loading)._marked(True)

    def shrunk(self, shrinkage: float | Tensor) -> LowRankCovariance:
        """``(1 - rho) R + rho tr(R)/N I``, which keeps the trace.

        Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", J. Multivariate Anal. 88(2), 2004.
        """
        if isinstance(shrinkage, float) and shrinkage == 0.0:
            return self
        rho = _fraction("shrinkage", shrinkage, self.loading)
        mean = self.trace() / self.size
        factor = multiply(self.factor, (1.0 - rho).sqrt()[..., None, None])
        shrunk = LowRankCovariance(factor, (1.0 - rho) * self.loading + rho * mean)
        return shrunk._marked(self._at_trace_n)

    def loaded(self, loading: float | Tensor) -> LowRankCovariance:
        """``R + loading tr(R)/N I``: diagonal loading relative to the mean diagonal."""
        mean = self.trace() / self.size
        return LowRankCovariance(self.factor, self.loading + loading * mean)

    @in_full_precision
    def inner(self, other: LowRankCovariance) -> Tensor:
        """Frobenius inner product ``tr(R S)`` (…) real.

        ``||F^H G||^2 + a ||G||^2 + b ||F||^2 + a b N`` for ``R = F F^H + a I, S = G G^H + b I``.
        """
        return (
            (energy(self.gram()) if other is self else energy(self.project(other.factor.mT)))
            + self.loading * other._factor_energy()
            + other.loading * self._factor_energy()
            + self.size * self.loading * other.loading
        )

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
        norm = vectors.abs().square().sum(-1)
        energy = torch.view_as_real(self.project(vectors)).square().sum((-3, -1))
        return energy + self.loading[..., None] * norm

    @in_full_precision
    def inverse_quadratic(self, vectors: Tensor) -> Tensor:
        """``v^H R^-1 v`` (…, G) of row vectors (…, G, N), by Woodbury's identity.

        Raises:
            ValueError: a loading that is not positive.
        """
        self._require_loading("inverse_quadratic")
        z = self.project(vectors).conj()  # F^H v
        whitened = torch.linalg.solve_triangular(self._capacitance_cholesky(), z, upper=False)
        norm = vectors.abs().square().sum(-1)
        explained = whitened.abs().square().sum(-2)
        tiny = torch.finfo(norm.dtype).eps * norm
        return torch.maximum(norm - explained, tiny) / self.loading[..., None]

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
            # A loading below the rounding of the Gram matrix: raise it there to that rounding.
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
    def signal_weights(self, n_sources: int | Tensor) -> Tensor:
        """Hermitian S (…, r, r) such that ``F S F^H`` projects on the dominant subspace.

        With ``F^H F = V Lambda V^H`` it is ``S = V_K Lambda_K^-1 V_K^H`` for the K largest
        eigenvalues, so that ``||U_K^H a||^2 = (F^H a)^H S (F^H a)`` without ever forming U_K.
        The gradient is safe at repeated eigenvalues (see :class:`_SignalWeights`).

        Args:
            n_sources: K, one for all or (…) one for each batch item; at most r counts.
        """
        gram = self.gram()
        counts = torch.as_tensor(n_sources, device=gram.device)
        batch = torch.broadcast_shapes(counts.shape, gram.shape[:-2])
        gram, counts = gram.expand(*batch, *gram.shape[-2:]), counts.expand(batch)
        weights: Tensor = _SignalWeights.apply(gram, counts)
        return weights

    @in_full_precision
    def subspace_energy(self, vectors: Tensor, n_sources: int | Tensor) -> Tensor:
        """``||U_K^H v||^2`` (…, G) of row vectors (…, G, N) and the dominant subspace U_K."""
        unit = self._without_scale()
        return weighted_energy(unit.project(vectors), unit.signal_weights(n_sources))

    @in_full_precision
    def project(self, vectors: Tensor) -> Tensor:
        """``conj(F^H v)`` (…, r, G) of row vectors (…, G, N).

        Vectors without leading dimensions, such as a grid's, make one plain matrix product.
        """
        parts = []
        for block in self._blocks:
            if vectors.ndim == 2:
                rows = block.mT.reshape(-1, self.size)
                part = (rows @ vectors.mH).unflatten(0, (*block.shape[:-2], block.shape[-1]))
            else:
                part = block.mT @ vectors.mH
            parts.append(part)
        return torch.cat(parts, dim=-2)

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
        """The same subspaces from a factor of largest modulus 1; its square cannot overflow."""
        scale = divisor(peak(self.factor))
        return LowRankCovariance(
            divide(self.factor, scale[..., None, None]), self.loading / scale / scale
        )


class _SignalWeights(torch.autograd.Function):
    """S = f(G) with f(lambda) = 1/lambda on the K largest eigenvalues and 0 on the others.

    The derivative of a matrix function (Daleckii and Krein, 1965) weighs ``V^H dG V`` with the
    divided differences of f. Inside the signal block they are ``-1/(lambda_i lambda_j)``, regular
    however close the eigenvalues lie; only across the gap ``1/(lambda_i (lambda_i - lambda_j))``
    can blow up, and there ``1/d`` is broadened to ``d / (d^2 + eps^2)``.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, n_sources: Tensor) -> Tensor:
        # eigh raises on NaN; such items go through as NaN instead, and only they.
        finite = torch.isfinite(torch.view_as_real(gram)).flatten(-3).all(-1)[..., None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        values, vectors = torch.linalg.eigh(torch.where(finite, gram, eye))
        vectors = torch.where(finite, vectors, torch.full_like(vectors, torch.nan))
        rank = gram.shape[-1]
        order = torch.arange(rank, device=gram.device)
        eps = torch.finfo(values.dtype).eps
        floor = (values[..., -1:] * rank * eps).clamp_min(torch.finfo(values.dtype).tiny)
        signal = (order >= rank - n_sources.unsqueeze(-1)) & (values > floor)
        inverse = torch.where(signal, 1.0 / values.clamp_min(floor), torch.zeros_like(values))
        ctx.save_for_backward(values, vectors, inverse, signal, floor)
        return (vectors * inverse.unsqueeze(-2)) @ vectors.mH

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, vectors, inverse, signal, floor = ctx.saved_tensors
        inside = -inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
        # In units of the largest eigenvalue, so that no square over- or underflows.
        unit = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
        gap = (values.unsqueeze(-1) - values.unsqueeze(-2)) / unit.unsqueeze(-1)
        broadening = (8.0 * floor / unit).unsqueeze(-1)
        across = gap / (gap.square() + broadening.square()) / unit.unsqueeze(-1)
        one_sided = signal.unsqueeze(-1) != signal.unsqueeze(-2)
        difference = inverse.unsqueeze(-1) - inverse.unsqueeze(-2)
        divided = inside + torch.where(one_sided, difference * across, torch.zeros_like(across))
        hermitian = 0.5 * (grad + grad.mH)
        core = vectors.mH @ hermitian @ vectors
        return vectors @ (core * divided) @ vectors.mH, None


def _fraction(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A weight in [0, 1] as a tensor; a clear error instead of the root of a negative number."""
    fraction = torch.as_tensor(value, device=like.device, dtype=like.dtype)
    inside = (fraction >= 0) & (fraction <= 1) if isinstance(value, Tensor) else 0 <= value <= 1
    if not (bool(inside.all()) if isinstance(inside, Tensor) else inside):
        raise ValueError(f"{name} is {value}; expected a number in [0, 1]")
    return fraction


def blend(
    predicted: LowRankCovariance, measured: LowRankCovariance, beta: float | Tensor
) -> LowRankCovariance:
    """``R_blend = (1 - beta) R_pred + beta R_samp``, both brought to trace N first.

    Args:
        predicted: R_pred.
        measured: R_samp.
        beta: weight of R_samp in [0, 1], one for all or (…).

    Raises:
        ValueError: beta outside [0, 1].
    """
    predicted, measured = predicted.normalized(), measured.normalized()
    weight = _fraction("beta", beta, predicted.loading)
    batch = torch.broadcast_shapes(predicted.batch_shape, measured.batch_shape, weight.shape)
    parts = (
        multiply(predicted.factor, (1.0 - weight).sqrt()[..., None, None]),
        multiply(measured.factor, weight.sqrt()[..., None, None]),
    )
    blocks = tuple(part.expand(*batch, *part.shape[-2:]) for part in parts)
    loading = (1.0 - weight) * predicted.loading + weight * measured.loading
    return LowRankCovariance(blocks, loading)._marked(True)


def nmse(
    estimate: LowRankCovariance, truth: LowRankCovariance, cross: Tensor | None = None
) -> Tensor:
    """Normalised mean-square error ``||R^ - R||_F^2 / ||R||_F^2`` (…) of trace-normalised matrices.

    Both sides are Hermitian by construction and are brought to trace N here. With
    ``R^ = F F^H + a I`` and ``R = G G^H + b I`` of trace N, the loadings add only
    ``-N (a - b)^2`` to ``||F F^H - G G^H||^2 = ||F^H F||^2 - 2 ||F^H G||^2 + ||G^H G||^2``.

    Args:
        estimate: R^.
        truth: R.
        cross: ``||F^H G||^2`` (…) of the matrices at trace N, where it is known already.
    """
    estimate, truth = estimate.normalized(), truth.normalized()
    if cross is None:
        cross = energy(estimate.project(truth.factor.mT))
    own = energy(truth.gram())
    error = energy(estimate.gram()) - 2.0 * cross + own
    error = error - truth.size * (estimate.loading - truth.loading).square()
    norm = own + truth.size * truth.loading * (2.0 - truth.loading)
    return error.clamp_min(0.0) / norm


@in_full_precision
def weighted_energy(projected: Tensor, weights: Tensor) -> Tensor:
    """``(F^H v)^H S (F^H v)`` (…, G) of Hermitian S (…, r, r).

    Args:
        projected: ``conj(F^H v)`` (…, r, G), as :meth:`LowRankCovariance.project` gives it.
        weights: S, as :meth:`LowRankCovariance.signal_weights` gives it.
    """
    product = torch.view_as_real(weights.mT @ projected) * torch.view_as_real(projected)
    return product.sum((-3, -1))


def source_covariance(steering: Tensor, power: Tensor) -> LowRankCovariance:
    """``sum_k p_k a_k a_k^H`` of incoherent sources, scaled to trace N.

    Args:
        steering: (…, K, N) complex steering vectors in rows.
        power: (…, K) real, at least 0; absent sources have none. Without any it is the identity.
    """
    total = power.sum(-1, keepdim=True)
    share = power / divisor(total) * steering.shape[-1]  # steering vectors have unit norm
    return LowRankCovariance.of_trace_n(
        multiply(steering.mT, share.sqrt().unsqueeze(-2)), total.squeeze(-1)
    )


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
    """R_samp of the surface's signal by one regularised least-squares fit per snapshot.

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
