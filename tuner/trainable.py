"""The trial as a Ray Tune trainable: an actor that runs one trial after another."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import ray
from ray import tune

from model.config import TrialConfig
from tuner.checkpoints import TrialCheckpoints, see_data, starting_points
from tuner.gauges import trial_gauges
from tuner.trial import TrialRun, place_of

# Keys of the configuration that Ray passes to an actor.
NUMBER, CONFIG, DEVICE, STUDY = "number", "config", "device", "study"
HOME = "home"  # folder or URI of the trial's checkpoints
RESUME = "resume"  # checkpoint to resume from
DONOR = "donor"  # checkpoint of another trial to start from if the trial has none
UNTIL = "until"  # epoch after which the trial pauses
BEQUEATHS = "bequeaths"  # whether other trials may start from its checkpoints there
GIVE_UP = "give_up"  # reason for which the trial must end as failed, if any
CHECKPOINT = "checkpoint"  # key of a result: the epoch's checkpoint, written before reporting


def allocated_gpus() -> str:
    """Return the ids of the GPUs that Ray assigned to this process, as in 0 or 0,1; else empty."""
    if not ray.is_initialized():
        return ""
    return ",".join(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


class TrialActor(tune.Trainable):
    """Runs trials on the resources that Ray assigned, one epoch per step.

    It writes its checkpoints itself: Ray's mechanism needs a second message for each one, for which
    the GPU waits, and copies files that are already in place.
    """

    _run: TrialRun | None = None
    _out: OSError | None = None  # error on fetching the checkpoint to start from

    def setup(self, config: dict[str, Any]) -> None:
        """Set up a trial, which is built at its first step, or here if it has a checkpoint."""
        self._brought = ExitStack()
        self._study = str(config[STUDY])
        self._gauges = trial_gauges()
        self._gauges.begin(self._study, int(config[NUMBER]))
        self._device = str(config[DEVICE])
        given = self.trial_resources
        self._gpus = float(given.required_resources.get("GPU", 0.0)) if given else 0.0
        trial = TrialConfig.model_validate(config[CONFIG])
        self._until: int | None = config.get(UNTIL)
        self._bequeaths = bool(config.get(BEQUEATHS))
        self._give_up: str | None = config.get(GIVE_UP)
        self._kept = TrialCheckpoints(config[HOME])
        self._run = TrialRun(trial, self._device)
        self._out = None
        if not self._give_up:
            try:
                self._begin(trial, config.get(RESUME), config.get(DONOR))
            except OSError as error:
                self._out = error  # an error raised here would lose its message
        self._gauges.show({"epoch": self._run.epoch})

    def _begin(self, trial: TrialConfig, previous: str | None, donor: str | None) -> None:
        """Fetch and load the checkpoint that the trial resumes or starts from."""
        self._kept.reach()
        if trial.data.shards is not None:
            see_data(trial.data.shards)
        own, given = self._brought.enter_context(starting_points(previous, donor))
        self._run = TrialRun(trial, self._device, own, given)
        if own or given:
            self._run.build()
        if self._bequeaths:
            self._kept.spare()
        elif self._run.epoch:
            self._kept.follow(previous)

    def step(self) -> dict[str, Any]:
        """Run one epoch and return the result for Ray Tune."""
        assert self._run is not None
        if self._out is not None:
            raise self._out
        self._kept.forget()  # this call implies that the last epoch is in the ledger
        skipped = self._run.skipped_steps
        result = self._run.failure(self._give_up) if self._give_up else self._run.step()
        if not result["failed"] and not result.get("repeated"):
            result[CHECKPOINT] = self._kept.write(result["epoch"], self._run.save)
        self._brought.close()  # loaded now; before the step, loading could fail for lack of memory
        self._gauges.count("skipped_steps", self._run.skipped_steps - skipped)
        self._gauges.count("solver_fallbacks", result.get("solver_fallbacks", 0))
        over = result["failed"] or result["finished"]
        result["paused"] = not over and self._until is not None and result["epoch"] >= self._until
        result["done"] = over or result["paused"]
        result["training_iteration"] = result["epoch"]
        result |= place_of(result, self._device, self._gpus)
        if ray.is_initialized():
            # Distinguishes nodes on the same host; listed by `ray list nodes`.
            result["node_id"] = ray.get_runtime_context().get_node_id()
        if gpus := allocated_gpus():
            result["gpu"] = gpus
        if not result["failed"]:
            self._gauges.show(result)
        return result

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Set up another trial after releasing the last one."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Release memory and the GPU."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._brought.close()
            self._gauges.end()

    def __repr__(self) -> str:
        # Ray reads this once, when the actor starts, and shows it in the dashboard from then on.
        # The actor runs many trials, so a trial's number here would soon be outdated.
        return f"TrialActor({self._study}, {self._device}, pid {os.getpid()})"
