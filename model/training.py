"""The training loop of one trial: epochs in, metrics out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.adjustment import first_difference, lasting, undivided
from model.ahead import Look, ahead_of, delayed
from model.blending import blended_covariance, jittered_beta
from model.checkpoint import Checkpoint, CheckpointError, check_shapes, has_checkpoint
from model.compiling import compiled
from model.config import TrialConfig, score
from model.cost import trial_flops
from model.data import Batch, open_source
from model.decision import Decision
from model.features import Features, compute_features
from model.loss import Counts, ScenesLoss
from model.memory import keep_freed_memory
from model.network import build_network
from model.optimizer import (
    WeightAverage,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from model.precision import AmpPolicy
from model.prediction import Prediction
from model.steps import Prepared, Taken, Tally
from model.validation import score_validation
from physics.covariance import LowRankCovariance
from physics.pursuit import pursuit_grid

log = logging.getLogger(__name__)

Metrics = dict[str, float | int | bool]
Report = Callable[[int, Metrics], None]


class TrialDiverged(RuntimeError):
    """The training no longer produces finite values; the trial has failed."""


class Trainer:
    """Trains one configuration, an epoch at a time.

    All random numbers come from generators seeded with (seed, epoch), so that a trainer restored
    between two epochs continues exactly as if it had not been interrupted: bit for bit on a CPU.

    The objective is the metric named by ``config.objective``, on the validation scenes with the
    averaged weights, and the lowest of the epochs so far. No loss weight enters it. The weights of
    that epoch are kept, so that the saved weights are the scored ones.

    Args:
        config: the trial.
        device: where to train.

    Raises:
        DataError: shards that cannot be used.
        ValueError: a precision that the device does not support.
    """

    def __init__(self, config: TrialConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(config.training.threads)
            keep_freed_memory()
        self.array = config.array.build()
        self.grid = pursuit_grid(config.scene, self.array)
        self._seed_epoch(0)
        self.network = build_network(config.network, config.scene, self.array).to(self.device)
        self._forward: Callable[[Features], Prediction] = self.network
        if config.training.compile:
            self._forward = compiled(self.network, config.training.threads)
        self.source = open_source(config, self.device, self.network.dictionary)
        self.average = WeightAverage(self.network, config.training.ema_decay)
        self.optimizer = make_optimizer(self.network, config.training, self.device)
        self.amp = AmpPolicy(config.precision, self.device)
        self.loss = ScenesLoss(
            config.loss,
            self.array,
            config.scene.wavefront,
            self.network.dictionary,
            self.network.cell_size,
            self.network.directions,
            self.network.cell_share,
        )
        self.steps_per_epoch = self.source.n_batches(config.training.batch_size)
        self.total_steps = self.steps_per_epoch * config.training.epochs
        self.epoch = 0
        self.step = 0
        self.skipped_steps = 0
        self.best_objective = math.inf
        self.best_epoch: int | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.decision = self.best_decision = Decision(config.decision.goal)
        self._skipped_in_a_row = 0
        self._ahead = ahead_of(self.device)
        self._jitter = torch.Generator()
        self._untrained: float | None = None
        self._flops: int | None = None

    @property
    def early_stopped(self) -> bool:
        """Whether the objective has not improved for ``patience`` epochs."""
        patience = self.config.training.patience
        return (
            patience is not None
            and self.best_epoch is not None
            and self.epoch - self.best_epoch >= patience
        )

    @property
    def finished(self) -> bool:
        """Whether the budget is used or the training has stopped early."""
        return self.epoch >= self.config.training.epochs or self.early_stopped

    def run_epoch(self) -> Metrics:
        """Train one epoch and validate.

        Returns:
            The metrics that the trial reports, all finite; see docs/conventions.md.

        Raises:
            TrialDiverged: ``max_skipped_steps`` non-finite steps in a row, an epoch without any
                finite step, or a validation that is not finite.
            RuntimeError: the training is finished.
        """
        if self.finished:
            raise RuntimeError(
                f"training is finished after epoch {self.epoch} of {self.config.training.epochs}"
            )
        if self._untrained is None:
            self._untrained = self._objective(self.validate())
        if self._flops is None:
            features = self._features(self.source.validation()[slice(0, 1)])
            self._flops = trial_flops(self.config, self.network, features)
        started = time.perf_counter()
        self._seed_epoch(self.epoch + 1)
        train = self._train_epoch()
        elapsed = time.perf_counter() - started
        validation = self.validate()
        self.epoch += 1
        objective = self._objective(validation)
        if not math.isfinite(objective):
            raise TrialDiverged(
                f"the objective ({self.config.objective}) is {objective} after epoch "
                f"{self.epoch}; lower the learning rate"
            )
        if objective < self.best_objective:
            self.best_objective, self.best_epoch = objective, self.epoch
            self.best_weights = {k: v.clone() for k, v in self.average.weights.items()}
            self.best_decision = self.decision
        return {
            "epoch": self.epoch,
            "objective": self.best_objective,
            **validation,
            **train.metrics(),
            "untrained_objective": self._untrained,
            "skipped_steps": self.skipped_steps,
            "flops": self._flops,
            "scenes_per_second": train.n_scenes / elapsed,
            "epoch_seconds": time.perf_counter() - started,
            "early_stopped": self.early_stopped,
        }

    def _objective(self, validation: dict[str, float]) -> float:
        """The value to minimise, computed from validation metrics."""
        return score(self.config.objective, validation)

    def _seed_epoch(self, epoch: int) -> None:
        """Seed weights (epoch 0), dropout and jitter for an epoch."""
        sequence = np.random.SeedSequence(self.config.seed, spawn_key=(epoch,))
        seed, jitter = (int(s >> np.uint64(1)) for s in sequence.generate_state(2, np.uint64))
        torch.manual_seed(seed)
        self._jitter = torch.Generator().manual_seed(jitter)

    def _features(self, batch: Batch, *, trusting: bool = False) -> Features:
        scenes = batch.scenes
        return compute_features(
            scenes.y,
            scenes.H,
            scenes.codes,
            batch.snr_db,
            dictionary=self.network.dictionary,
            tikhonov=self.config.tikhonov,
            unit_modulus=batch.unit_modulus,
            candidates=batch.candidates,
            spectra=self.config.network.spectra,
            spectrum=None if batch.images is None else batch.images.spectrum,
            trusting=trusting,
        )

    def _train_epoch(self) -> Tally:
        training = self.config.training
        self.network.train()
        batches = self.source.train_batches(self.epoch, training.batch_size, self.config.seed)
        tally = Tally()
        # Features do not depend on the weights: the next batch's are queued on the device before a
        # step, and the next step before the host reads the outcome of this one.
        prepared = delayed(map(self._prepared, batches), self._ahead)
        for step in delayed(map(self._train_step, prepared), self._ahead):
            outcome = tally.add(step)
            if outcome.skipped:
                self._count_skip(step.number, outcome.norm)
            else:
                self._skipped_in_a_row = 0
        # A gradient scaler overflows while it adapts its scale, so finite losses are enough then.
        if not (tally.n_finite if self.amp.scaler.is_enabled() else tally.norms):
            raise TrialDiverged(
                f"no step of epoch {self.epoch + 1} was finite; lower the learning rate"
            )
        return tally

    def _count_skip(self, number: int, norm: float) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        log.warning(
            "step %d of %d skipped: gradient norm %s (%d in a row)",
            number,
            self.total_steps,
            norm,
            self._skipped_in_a_row,
        )
        if self._skipped_in_a_row >= self.config.training.max_skipped_steps:
            raise TrialDiverged(
                f"{self._skipped_in_a_row} non-finite steps in a row in epoch {self.epoch + 1}; "
                "lower training.learning_rate or check the data"
            )

    def _prepared(self, batch: Batch) -> Prepared:
        """Split a batch into parts and queue the computation of their features on the device."""
        size = -(-len(batch) // self.config.training.accumulation)
        parts = [batch[slice(start, start + size)] for start in range(0, len(batch), size)]
        trusting = self._ahead > 0
        return Prepared.of(parts, [self._features(part, trusting=trusting) for part in parts])

    def _train_step(self, batch: Prepared) -> Taken:
        """One optimiser step, skipped if its loss or gradient norm is not finite."""
        training = self.config.training
        fallbacks = batch.fallbacks.read()
        if any(fallbacks) and self._ahead:  # the SVD is needed, for which the host waits
            mended = [
                self._features(part) if failed else seen
                for part, seen, failed in zip(batch.parts, batch.features, fallbacks, strict=True)
            ]
            batch = replace(batch, features=mended)
        rate = learning_rate(training, self.step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        warmup = training.warmup_steps(self.total_steps)
        phase = self.config.loss.phase(self.step, self.total_steps, warmup)
        # Drawn for the whole batch, so that its parts add up to the same step as the whole.
        beta = jittered_beta(len(batch), self.config.blend, self._jitter)
        n_parts = len(batch.parts)
        betas = beta.split(len(batch.parts[0])) if beta is not None else [None] * n_parts
        decoys = self.loss.draw_decoys(phase, self._jitter)
        whole = self._counts(batch) if n_parts > 1 else None
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        for part, features, drawn in zip(batch.parts, batch.features, betas, strict=True):
            with self.amp.autocast():
                prediction = self._forward(features)
            blended = blended_covariance(prediction, features, self.config.blend, drawn)
            value = self.loss(prediction, blended, part.scenes, phase, decoys, whole)
            self.amp.backward(value.total)
            for name, term in ({"total": value.total.detach()} | value.terms).items():
                terms[name] = terms[name] + term if name in terms else term
        self.amp.unscale(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.gradient_clip)
        values = torch.stack([*terms.values(), norm.detach()])
        self.amp.step(self.optimizer, torch.isfinite(values[0]) & torch.isfinite(values[-1]))
        self.average.update(self.network)
        self.step += 1
        return Taken(self.step, rate, len(batch), int(sum(fallbacks)), tuple(terms), Look(values))

    def _counts(self, batch: Prepared) -> Counts:
        """Numbers by which the loss of all parts together is divided."""
        if not self.network.gated:
            return reduce(add, (self.loss.counts(part.scenes) for part in batch.parts))
        # Matched sources are known only after a prediction, with the dropout of the step to come.
        devices = [self.device] if self.device.type == "cuda" else []
        counts = []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for part, features in zip(batch.parts, batch.features, strict=True):
                with self.amp.autocast():
                    prediction = self.network(features)
                counts.append(self.loss.counts(part.scenes, prediction))
        return reduce(add, counts)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Score the averaged weights on the validation scenes.

        Returns:
            nmse_pred, nmse_blend, nll (of the slots, [nat] per scene: :meth:`ScenesLoss.nll`), and
            for the reported sources count_accuracy (how often their number is right), f1 (within
            5 degrees, 5 degrees and 1 m) and gospa [m]. Slots with cells of their own are reported
            with the threshold that is best for these scenes; for slots of a dictionary, sources are
            the peaks of MUSIC on a coarse grid.
        """
        self.network.eval()
        raw = {k: p.detach().clone() for k, p in self.network.named_parameters()}
        self._set_weights(self.average.weights)
        try:
            metrics, decision = score_validation(
                self._predict,
                self.source.validation(),
                self.loss,
                self.config,
                self.array,
                self.grid,
            )
        finally:
            self._set_weights(raw)
        self.decision = decision or self.decision
        return metrics

    def _predict(self, batch: Batch) -> tuple[Prediction, LowRankCovariance]:
        """Prediction and R_blend as in inference."""
        features = self._features(batch)
        with self.amp.autocast():
            prediction = self.network(features)
        return prediction, blended_covariance(prediction, features, self.config.blend)

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write everything needed to continue, atomically replacing an existing checkpoint."""
        moments = {
            f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }
        Checkpoint(
            config=self.config,
            tensors={
                "network": dict(self.network.named_parameters()),
                "average": self.average.weights,
                "best": self.best_weights,
                "optimizer": moments,
            },
            state={
                "epoch": self.epoch,
                "step": self.step,
                "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self._skipped_in_a_row,
                "average_steps": self.average.steps,
                "best_objective": self.best_objective if self.best_epoch else None,
                "best_epoch": self.best_epoch,
                "best_decision": asdict(self.best_decision),
                "untrained_objective": self._untrained,
                "scaler": self.amp.state_dict(),
            },
        ).save(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of the same configuration.

        Raises:
            CheckpointError: missing, damaged, of another format, or of another configuration.
        """
        checkpoint = Checkpoint.load(folder, self.device)
        saved, wanted = undivided(checkpoint.config), undivided(self.config)
        if saved != wanted:
            raise CheckpointError(
                f"{folder}: the checkpoint is of another configuration: "
                f"{first_difference(saved, wanted)}; go on with the configuration that it began "
                "with, or train in another folder"
            )
        self._take_over(checkpoint)
        state = checkpoint.state
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.best_weights = checkpoint.tensors.get("best", {})
        self.best_epoch = state["best_epoch"]
        self.best_objective = math.inf if self.best_epoch is None else state["best_objective"]
        self.best_decision = Decision(**state["best_decision"])

    def inherit(self, folder: Path) -> None:
        """Start from the weights, moments and averages of another trial, at that trial's epoch.

        This trial keeps its own seed and adjustable fields (:mod:`model.adjustment`), and the best
        epoch is chosen among the epochs that it trains itself.

        Raises:
            CheckpointError: missing, damaged, of another format, or of a configuration whose
                weights do not fit this one.
        """
        checkpoint = Checkpoint.load(folder, self.device)
        saved, wanted = lasting(checkpoint.config), lasting(self.config)
        if saved != wanted:
            raise CheckpointError(
                f"{folder}: weights of another kind: {first_difference(saved, wanted)}"
            )
        self._take_over(checkpoint)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Restore the state that the next step needs."""
        state = checkpoint.state
        check_shapes(checkpoint.tensors["network"], dict(self.network.named_parameters()))
        self._set_weights(checkpoint.tensors["network"])
        self.average.load(checkpoint.tensors["average"], state["average_steps"])
        self._load_moments(checkpoint.tensors.get("optimizer", {}))
        self.amp.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._untrained = state["untrained_objective"]

    def _load_moments(self, moments: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in moments.items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        state["state"] = entries
        self.optimizer.load_state_dict(state)


def train(
    config: TrialConfig,
    *,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    checkpoint: Path | None = None,
    donor: Path | None = None,
    until: int | None = None,
) -> Metrics:
    """Train a configuration to the end of its budget.

    Args:
        config: the trial.
        device: where to train.
        report: called after every epoch with (epoch, metrics); an exception ends the training.
        checkpoint: folder that is saved to after every epoch, and resumed from if it exists.
        donor: checkpoint of another trial, from whose weights training starts otherwise.
        until: epoch after which to stop before the end.

    Returns:
        The metrics of the last epoch; only ``epoch`` and ``objective`` if the checkpoint was
        already finished.

    Raises:
        TrialDiverged, DataError, CheckpointError: see :class:`Trainer`.
    """
    trainer = Trainer(config, device)
    if checkpoint is not None and has_checkpoint(checkpoint):
        trainer.load(checkpoint)
    elif donor is not None:
        trainer.inherit(donor)
    metrics: Metrics = {"epoch": trainer.epoch, "objective": trainer.best_objective}
    while not trainer.finished and trainer.epoch != until:
        metrics = trainer.run_epoch()
        if checkpoint is not None:
            trainer.save(checkpoint)
        if report is not None:
            report(trainer.epoch, metrics)
    return metrics
