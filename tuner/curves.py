"""The curves of one estimator on the evaluation page."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from physics.bootstrap import bootstrap_interval
from physics.geometry import to_cartesian
from physics.metrics import normalized_errors
from tuner.scoreboard import in_band, pooled_median, snr_bands

if TYPE_CHECKING:
    from tuner.scoreboard import Score, Truth

_QUANTILES = 101


def ratio_by_snr(score: Score, truth: Truth) -> list[dict[str, Any]]:
    """Return the median |error| / CRB of the gated hits by SNR band, with a bootstrap interval."""
    rows = []
    bands = snr_bands(truth)
    for band in bands:
        chosen = in_band(truth, band, last=band == bands[-1])
        mask = truth.gated & chosen.unsqueeze(-1)
        median = pooled_median(score.error, truth.crb_std, mask)
        row: dict[str, Any] = {"low_db": band[0], "high_db": band[1], "median": None}
        if median == median:  # NaN without any hit
            values = normalized_errors(score.error, truth.crb_std)[chosen]
            values = torch.where(mask[chosen].unsqueeze(-1), values, torch.nan).flatten(1)
            row["median"] = median
            medians = functools.partial(_medians, values)
            row["interval"] = list(bootstrap_interval(medians, len(values), n_resamples=200))
        rows.append(row)
    return rows


def _medians(values: Tensor, index: Tensor) -> Tensor:
    return torch.stack([values[rows].nanmedian() for rows in index.to(values.device)])


def error_quantiles(score: Score, truth: Truth) -> dict[str, Any]:
    """Return quantiles of the distance [m] from each true source to the nearest detection.

    Sources of scenes without any detection count as infinitely far (None).
    """
    scenes = truth.scenes
    true, found = (
        to_cartesian(scenes.position.double()),
        to_cartesian(score.found.position.double()),
    )
    distance = torch.linalg.vector_norm(true.unsqueeze(2) - found.unsqueeze(1), dim=-1)
    distance = distance.masked_fill(~score.found.present.unsqueeze(1), torch.inf)
    nearest = distance.amin(-1)[scenes.present].sort().values
    if not len(nearest):
        return {"share": [], "distance_m": []}
    share = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
    values = nearest.cpu()[(share * (len(nearest) - 1)).round().long()]
    return {
        "share": share.tolist(),
        "distance_m": [v if v < float("inf") else None for v in values.tolist()],
    }
