"""The trial as a Ray Tune trainable: an actor that takes one trial after another."""

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

# Keys of the configuration that Ray hands to an actor.
NUMBER, CONFIG, DEVICE, STUDY = "number", "config", "device", "study"
HOME = "home"  # where its checkpoints go
RESUME = "resume"  # a checkpoint to go on from
DONOR = "donor"  # checkpoint of another trial, to begin with where there is none of its own
UNTIL = "until"  # epoch after which the trial makes room, to go on later
BEQUEATHS = "bequeaths"  # whether others may begin with what it has there
GIVE_UP = "give_up"  # why the trial is to end as failed, if it is
CHECKPOINT = "checkpoint"  # of a result: what was kept of the epoch, before anybody hears of it


def allocated_gpus() -> str:
    """Numbers of the node's GPUs that Ray gave to this process, as in 0 or 0,1; else nothing."""
    if not ray.is_initialized():
        return ""
    return ",".join(ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


class TrialActor(tune.Trainable):
    """Runs trials on the resources that Ray gave it, a step an epoch.

    It keeps its checkpoints itself: Ray's own way takes a second message for each, which the GPU
    waits for, and copies what lies in its place already.
    """

    _run: TrialRun | None = None
    _out: OSError | None = None  # why what the trial goes on from could not be brought here

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial; it is built at its first step, or here from its checkpoint."""
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
                self._out = error  # what is raised here comes to the driver without its words
        self._gauges.show({"epoch": self._run.epoch})

    def _begin(self, trial: TrialConfig, previous: str | None, donor: str | None) -> None:
        """Bring here what the trial goes on from or begins with, and read it."""
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
        """One epoch, in the words of Ray Tune."""
        assert self._run is not None
        if self._out is not None:
            raise self._out
        self._kept.forget()  # the last epoch is in the ledger, or nobody would ask for another
        skipped = self._run.skipped_steps
        result = self._run.failure(self._give_up) if self._give_up else self._run.step()
        if not result["failed"] and not result.get("repeated"):
            result[CHECKPOINT] = self._kept.write(result["epoch"], self._run.save)
        self._brought.close()  # it has been read; until now memory may not have been enough for it
        self._gauges.count("skipped_steps", self._run.skipped_steps - skipped)
        self._gauges.count("solver_fallbacks", result.get("solver_fallbacks", 0))
        over = result["failed"] or result["finished"]
        result["paused"] = not over and self._until is not None and result["epoch"] >= self._until
        result["done"] = over or result["paused"]
        result["training_iteration"] = result["epoch"]
        result |= place_of(result, self._device, self._gpus)
        if ray.is_initialized():
            # Tells nodes apart that share a host; `ray list nodes` knows it.
            result["node_id"] = ray.get_runtime_context().get_node_id()
        if gpus := allocated_gpus():
            result["gpu"] = gpus
        if not result["failed"]:
            self._gauges.show(result)
        return result

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial and leave nothing of the last one behind."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Free memory and GPU."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._brought.close()
            self._gauges.end()

    def __repr__(self) -> str:
        # Ray reads this once, when the actor starts, and shows it in the dashboard ever
        # after. The actor outlives its trials: a trial's number here would soon be false.
        return f"TrialActor({self._study}, {self._device}, pid {os.getpid()})"
