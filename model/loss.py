"""The training loss: every term in factored form, without N x N matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from model.plugin import ExtraTerm
from model.pointing import OwnCells, SharedCells, heat_loss, match_slots
from model.prediction import Prediction
from physics.config import Adjustable, FrozenModel
from physics.covariance import LowRankCovariance, nmse, source_covariance
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import column_energy, energy, power
from physics.scene import SceneConfig, Scenes
from physics.steering import Wavefront, steering_vector
from physics.subspace import orthonormal_weights
from physics.transfer import sent

Phase = Literal["warmup", "main", "final"]

# Fraction of a weight used in each phase: 0.02/0.05/0.07 and 0.05/0.10/0.12 at default weights.
_SCHEDULE: dict[Phase, dict[str, float]] = {
    "warmup": {"subspace_align": 0.4, "peak_contrast": 0.5},
    "main": {"subspace_align": 1.0, "peak_contrast": 1.0},
    "final": {"subspace_align": 1.4, "peak_contrast": 1.2},
}

_TERMS = ("cov_pred", "subspace_align", "peak_contrast", "existence", "position")
MISSED = 0.1  # expected number of sources per scene outside all slots, in the likelihood
TermName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class LossConfig(FrozenModel):
    """Weights of the loss terms; the NMSE of R_blend has weight 1."""

    cov_pred: Adjustable[float] = Field(0.03, ge=0, description="NMSE of R_pred alone")
    subspace_align: Adjustable[float] = Field(
        0.05, ge=0, description="alignment of R_blend's signal subspace with the sources"
    )
    peak_contrast: Adjustable[float] = Field(
        0.1, ge=0, description="MUSIC energy at the sources relative to decoys"
    )
    existence: Adjustable[float] = Field(0.1, ge=0, description="whether slots hold a source")
    position: Adjustable[float] = Field(0.1, ge=0, description="where the matched slots point")
    decoys: Adjustable[int] = Field(
        64,
        ge=1,
        description="dictionary cells that peak_contrast draws as decoys in each step; "
        "evaluation uses all cells",
    )
    schedule: Adjustable[bool] = Field(
        True,
        description="scale subspace_align by 0.4/1/1.4 and peak_contrast by 0.5/1/1.2 in the "
        "warm-up, main and final phase",
    )
    final_fraction: Adjustable[float] = Field(
        0.2, ge=0, lt=1, description="share of steps in the final phase"
    )
    extra: dict[TermName, ExtraTerm] = Field(
        {}, description="additional terms of your own, by name"
    )

    @field_validator("extra")
    @classmethod
    def _no_name_twice(cls, extra: dict[str, ExtraTerm]) -> dict[str, ExtraTerm]:
        taken = [name for name in extra if name in ("total", "nmse", *_TERMS)]
        if taken:
            raise ValueError(f"{taken[0]} is a term of the loss already; choose another name")
        return extra

    def weights(self, phase: Phase) -> dict[str, float]:
        """The weight of every term in a phase of the training."""
        scale = _SCHEDULE[phase] if self.schedule else {}
        weights = {"nmse": 1.0} | {t: getattr(self, t) * scale.get(t, 1.0) for t in _TERMS}
        return weights | {name: extra.weight for name, extra in self.extra.items()}

    def phase(self, step: int, total_steps: int, warmup_steps: int) -> Phase:
        """The phase of an optimiser step."""
        if step < warmup_steps:
            return "warmup"
        return "final" if step >= (1.0 - self.final_fraction) * total_steps else "main"


@dataclass(frozen=True)
class LossValue:
    """The loss and its unweighted terms, each a scalar tensor."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Counts:
    """Numbers by which the terms of a batch are divided."""

    scenes: int
    occupied: Tensor  # scalar: scenes that hold a source
    sources: Tensor  # scalar
    matched: Tensor  # scalar: slots matched to a source

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.scenes + other.scenes,
            self.occupied + other.occupied,
            self.sources + other.sources,
            self.matched + other.matched,
        )


class ScenesLoss:
    """Loss of a batch: covariance terms on R_blend and set-prediction terms on the slots.

    Terms (see docs/conventions.md for the weights' names and schedule):

    - ``nmse``: ||R_blend - R_true||^2 / ||R_true||^2, both at trace N, over scenes with sources;
    - ``cov_pred``: the same for R_pred, so that R_samp cannot hide a poor prediction;
    - ``subspace_align``: ``1 - ||U_K^H Q||^2 / K``, with U_K the dominant subspace of R_blend and
      Q an orthonormal basis of the sources' steering vectors;
    - ``peak_contrast``: cross-entropy of identifying a source's steering vector among the decoys of
      the dictionary by its energy in U_K, at temperature 0.1; decoys that overlap a source of the
      scene by more than a half are excluded;
    - ``existence``: binary cross-entropy of the slots after matching, and of the map over
      directions where there is one;
    - ``position``: cross-entropy of a matched slot's pointer to the cells around its source, plus
      the Huber distance of its position or direction and, for slots with cells of their own, the
      quantile losses of the ellipsoid (:mod:`model.pointing`);
    - those of ``loss.extra``, at their weights in every phase (:mod:`model.plugin`).

    Every term is a sum over scenes, sources or slots divided by their number. Given the numbers of
    a larger batch, the loss of a part is its contribution to the whole: the losses of all parts add
    up to the loss of the batch.

    Args:
        config: weights.
        array: the surface.
        wavefront: model of the steering vectors.
        dictionary: (G, N) complex steering vectors of the network's cells.
        cell_size: (3,) size of a cell [rad, rad, 1/m].
        directions: (A, E, 2), if the network has a map over them.
    """

    temperature = 0.1

    def __init__(
        self,
        config: LossConfig,
        array: PlanarArray,
        wavefront: Wavefront,
        dictionary: Tensor,
        cell_size: Tensor,
        directions: Tensor | None = None,
        cell_share: Tensor | None = None,
    ) -> None:
        self.config, self.array, self.wavefront = config, array, wavefront
        self.dictionary, self.directions = dictionary, directions
        n_cells = dictionary.shape[0]
        even = torch.full_like(dictionary[:, 0].real, 1.0 / n_cells)
        self.cell_share = even if cell_share is None else cell_share
        self.cell_size = cell_size.clamp_min(torch.finfo(cell_size.dtype).tiny)

    @in_full_precision
    def __call__(
        self,
        prediction: Prediction,
        blended: LowRankCovariance,
        scenes: Scenes,
        phase: Phase = "main",
        decoys: Tensor | None = None,
        whole: Counts | None = None,
    ) -> LossValue:
        """Loss of the prediction and of ``blended``, built as the R_blend of inference.

        Args:
            prediction: of B scenes.
            blended: their R_blend.
            scenes: their truth.
            phase: of the training.
            decoys: (G', N) of a training step, see :meth:`draw_decoys`; None uses every cell.
            whole: counts of the batch that these scenes are part of; None: they are the batch.
        """
        steering = steering_vector(scenes.position, self.array, self.wavefront)  # (B, K, N)
        truth = source_covariance(steering, scenes.power)
        present = scenes.present
        weights = self.config.weights(phase)

        blended = blended.normalized()
        predicted = prediction.covariance
        projected = blended.project(steering)  # (B, r, K)
        # Factor of the terms that are means over scenes.
        share = 1.0 if whole is None else len(scenes) / whole.scenes
        # R_pred always has trace N, so its error is meaningless for an empty scene.
        occupied = present.any(-1)
        n_occupied = occupied.sum() if whole is None else whole.occupied
        terms = {
            "nmse": _mean_of(nmse(blended, truth, projected), occupied, n_occupied),
            "cov_pred": _mean_of(
                nmse(predicted, truth, predicted.project(steering)), occupied, n_occupied
            ),
        }
        if weights["subspace_align"] or weights["peak_contrast"]:
            decoys = self.dictionary if decoys is None else decoys
            signal = blended.dominant_weights(scenes.n_sources, steering.shape[-2], trusting=True)
            seen = signal.mT @ projected  # (B, K, K)
            subspace = blended.combined(signal)  # (B, K, N)
            terms["subspace_align"] = self._subspace(
                seen,
                *orthonormal_weights(steering.masked_fill(~present.unsqueeze(-1), 0.0).mT),
                n_occupied,
            )
            terms["peak_contrast"] = self._contrast(
                column_energy(seen),
                column_energy(_inner_products(decoys, subspace)),
                power(_inner_products(decoys, steering)),
                present,
                None if whole is None else whole.sources,
            )
        if weights["existence"] or weights["position"]:
            pointing = self._pointing(prediction, scenes, steering)
            slot, source = match_slots(prediction, pointing.score(), present)
            terms["existence"] = self._existence(prediction, slot) * share
            if prediction.heat is not None and self.directions is not None:
                terms["existence"] = terms["existence"] + heat_loss(
                    prediction.heat,
                    self.directions,
                    scenes.position,
                    present,
                    None if whole is None else whole.sources,
                )
            matched = slot.sum() if whole is None else whole.matched
            terms["position"] = _mean_of(pointing.loss(source), slot, matched)
        for name, extra in self.config.extra.items():
            if weights[name]:
                terms[name] = extra(prediction, scenes) * share
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return LossValue(total, {name: value.detach() for name, value in terms.items()})

    @in_full_precision
    @torch.no_grad()
    def counts(self, scenes: Scenes, prediction: Prediction | None = None) -> Counts:
        """Numbers by which the terms of these scenes are divided.

        Args:
            scenes: of the batch.
            prediction: given for a network whose slots may not match every source
                (:attr:`SourceNetwork.gated`); None counts every source as matched.
        """
        present = scenes.present
        sources = present.sum()
        matched = sources
        if prediction is not None:
            steering = steering_vector(scenes.position, self.array, self.wavefront)
            score = self._pointing(prediction, scenes, steering).score()
            matched = match_slots(prediction, score, present)[0].sum()
        return Counts(len(scenes), present.any(-1).sum(), sources, matched)

    @in_full_precision
    @torch.no_grad()
    def nll(self, prediction: Prediction, scenes: Scenes, config: SceneConfig) -> Tensor:
        """Negative log-likelihood (B,) of scenes [nat], independent of the loss weights.

        Each slot holds a source or none, with a density over the source's position; further sources
        are uniform over the field, MISSED of them per scene on average. Densities are relative to
        the uniform one, so that a source costs the same for every network if no slot matches it, or
        only one that would cost more. A value below zero is better than knowing only the number.

        Args:
            prediction: of B scenes.
            scenes: their true sources.
            config: gives the field over which sources are uniform.

        Source: for a Poisson multi-Bernoulli density, Pinto, Xia, Svensson and Wymeersch, "An
        uncertainty-aware performance measure for multi-object tracking", IEEE Signal Processing
        Letters 28, 2021; slots and sources are paired by :func:`match_slots`.
        """
        steering = steering_vector(scenes.position, self.array, self.wavefront)
        pointing = self._pointing(prediction, scenes, steering)
        slot, source = match_slots(prediction, pointing.score(), scenes.present)
        empty = functional.softplus(prediction.existence).double()
        held = functional.softplus(-prediction.existence).double()
        missed = empty - math.log(MISSED)
        named = held - pointing.log_density(source, config.extent)
        costs = torch.where(slot, torch.minimum(named, missed), empty)
        n_left = scenes.n_sources - slot.sum(-1)
        return costs.sum(-1) - n_left * math.log(MISSED) + MISSED

    def draw_decoys(self, phase: Phase, generator: torch.Generator) -> Tensor | None:
        """Steering vectors (G', N) of the decoys of a training step.

        Args:
            phase: of the training; None is returned if its weights need no decoys.
            generator: CPU generator of the training.
        """
        weights = self.config.weights(phase)
        n_cells = self.dictionary.shape[0]
        if not (weights["subspace_align"] or weights["peak_contrast"]):
            return None
        if self.config.decoys >= n_cells:
            return self.dictionary
        drawn = torch.randperm(n_cells, generator=generator)[: self.config.decoys]
        return self.dictionary.index_select(0, sent(drawn, self.dictionary.device))

    def _subspace(
        self,
        seen: Tensor,  # (B, K, K) conj(U^H A) of the signal subspace and the steering vectors
        basis: Tensor,  # (B, K, K) T of an orthonormal basis A T of their span
        n_bases: Tensor,  # (B,)
        n_occupied: Tensor,
    ) -> Tensor:
        occupied = (n_bases > 0).to(basis.real.dtype)
        loss = occupied - energy(seen @ basis.conj()) / n_bases.clamp_min(1)
        return loss.sum() / n_occupied.clamp_min(1)

    def _contrast(
        self,
        at_source: Tensor,  # (B, K) energy in the signal subspace
        at_decoy: Tensor,  # (B, G')
        overlap: Tensor,  # (B, K, G')
        present: Tensor,  # (B, K) bool
        n_sources: Tensor | None,
    ) -> Tensor:
        near = ((overlap > 0.5) & present.unsqueeze(-1)).any(-2)
        level = torch.logsumexp(
            (at_decoy / self.temperature).masked_fill(near, -torch.inf), dim=-1, keepdim=True
        )
        # a random subset of the decoys represents all of them
        level = level + math.log(self.dictionary.shape[0] / at_decoy.shape[-1])
        loss = functional.softplus(level - at_source / self.temperature)
        loss = torch.where(present, loss, 0.0)
        n_sources = present.sum() if n_sources is None else n_sources
        return loss.sum() / n_sources.clamp_min(1)

    def _existence(self, prediction: Prediction, slot: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            prediction.existence, slot.to(prediction.existence.dtype)
        )

    def _pointing(
        self, prediction: Prediction, scenes: Scenes, steering: Tensor
    ) -> SharedCells | OwnCells:
        if prediction.cells is not None:
            return OwnCells(prediction, prediction.cells, scenes.position)
        overlap = overlap_of(self.dictionary, steering)
        return SharedCells(prediction, overlap, scenes.position, self.cell_size, self.cell_share)


def _mean_of(value: Tensor, counts: Tensor, count: Tensor) -> Tensor:
    """Sum of the values selected by the mask ``counts``, divided by ``count``."""
    return torch.where(counts, value, torch.zeros_like(value)).sum() / count.clamp_min(1)


def overlap_of(cells: Tensor, steering: Tensor) -> Tensor:
    """``|a_g^H a_k|^2`` (B, G, K) of cells (G, N) and sources (B, K, N)."""
    return power(_inner_products(cells, steering)).mT


def _inner_products(cells: Tensor, steering: Tensor) -> Tensor:
    """``a_g^H a_k`` (B, K, G) of cells (G, N) and sources (B, K, N)."""
    return (steering.flatten(0, 1) @ cells.mH).unflatten(0, steering.shape[:2])
