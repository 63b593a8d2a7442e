"""Ray metrics of the trials: gauges and counters, labelled by study and trial.

In Prometheus they are named ``ray_ristune_<name>``, counters ``ray_ristune_<name>_total``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util.metrics import Counter, Gauge

from tuner.trial import trial_name

PREFIX = "ristune_"
LABELS = ("study", "trial")

# The names are those of the metrics that trials report.
GAUGES = {
    "objective": "what the study minimises: the best epoch so far",
    "nmse_pred": "normalised mean-square error of R_pred on the validation scenes",
    "nmse_blend": "normalised mean-square error of R_blend on the validation scenes",
    "f1": "F1 of the located sources on the validation scenes",
    "gospa": "GOSPA on the validation scenes, in metres",
    "epoch": "finished epochs",
    "scenes_per_second": "training scenes a second in the last epoch",
    "grad_norm": "mean gradient norm of the last epoch",
    "gpu_memory_bytes": "largest GPU memory allocated in the last epoch, in bytes",
}
COUNTERS = {
    "skipped_steps": "optimiser steps skipped because something was not finite",
    "solver_fallbacks": "scenes that the solver's SVD fallback served",
}

# Ray drops a gauge that was not set for two of its report intervals, each of a second or more,
# while an epoch may last minutes.
_REFRESH_SECONDS = 1.0


class TrialGauges:
    """Publishes the metrics of one trial after another and refreshes those of the current one."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(PREFIX + name, description=text, tag_keys=LABELS)
            for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(PREFIX + name, description=text, tag_keys=LABELS)
            for name, text in COUNTERS.items()
        }
        self._lock = threading.Lock()
        self._labels: dict[str, str] = {}
        self._shown: dict[str, float] = {}
        threading.Thread(target=self._keep_alive, name="trial-gauges", daemon=True).start()

    def begin(self, study: str, number: int) -> None:
        """Switch to another trial, with no gauges set yet."""
        with self._lock:
            self._labels = {"study": study, "trial": trial_name(number)}
            self._shown = {}

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Set the gauges of the trial; non-finite values are omitted."""
        values = {name: float(metrics[name]) for name in GAUGES if name in metrics}
        with self._lock:
            self._shown = {name: value for name, value in values.items() if math.isfinite(value)}
        self.refresh()

    def count(self, name: str, new: int) -> None:
        """Increase a counter."""
        if new > 0:
            self._counters[name].inc(new, tags=self._labels)

    def end(self) -> None:
        """Clear the gauges of the trial; its counters stay."""
        with self._lock:
            self._shown = {}

    def refresh(self) -> None:
        """Set all gauges again."""
        with self._lock:
            for name, value in self._shown.items():
                self._gauges[name].set(value, tags=self._labels)

    def _keep_alive(self) -> None:
        while True:
            time.sleep(_REFRESH_SECONDS)
            self.refresh()


@cache
def trial_gauges() -> TrialGauges:
    """Return the gauges of this process, as Ray allows each metric once per process."""
    return TrialGauges()
