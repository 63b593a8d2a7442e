"""From a prediction to sources: MUSIC peaks of R_blend, as many as the slots predict."""

from __future__ import annotations

import torch

from model.prediction import Prediction
from physics.covariance import LowRankCovariance
from physics.detections import Detections
from physics.geometry import PlanarArray
from physics.spectrum import PolarGrid, find_peaks, music_spectrum
from physics.steering import Wavefront


@torch.no_grad()
def detect(
    prediction: Prediction,
    blended: LowRankCovariance,
    grid: PolarGrid,
    array: PlanarArray,
    wavefront: Wavefront,
) -> Detections:
    """The highest peaks of the MUSIC spectrum of R_blend, highest first.

    Args:
        prediction: of B scenes; slots with an existence probability above 1/2 are counted.
        blended: their R_blend.
        grid: where the spectrum is computed; peaks are interpolated between its points.
        array: the surface.
        wavefront: model of the steering vectors.

    Returns:
        For each scene, as many sources as it has such slots, limited by the number of peaks.
    """
    if wavefront == "planar":  # a plane wave has no range: all range cells hold the same peak
        grid = PolarGrid(grid.azimuth, grid.elevation, grid.inverse_range[:1])
    counts = (prediction.existence > 0).sum(-1)
    most = max(1, int(counts.max())) if len(counts) else 1
    spectrum = music_spectrum(blended, grid, counts.clamp_min(1), array, wavefront)
    position, height = find_peaks(spectrum, grid, most)
    wanted = torch.arange(most, device=counts.device) < counts.unsqueeze(-1)
    present = wanted & (height > 0)
    return Detections(torch.where(present.unsqueeze(-1), position, 1.0), present)
