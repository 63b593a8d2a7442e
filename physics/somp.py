"""Simultaneous orthogonal matching pursuit on a grid: the pursuit of NOMP without refinement."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from physics.geometry import PlanarArray
from physics.nomp import NompConfig, NompResult, nomp
from physics.order import Criterion
from physics.scene import SceneConfig

# Points whose gain is computed exactly: neighbours on a fine grid are many, and much alike.
_EXACT = 512


def somp(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    snr_db: float | Tensor | None = None,
    oversampling: float = 3.0,
    criterion: Criterion = "bic",
) -> NompResult:
    """Find sources at points of a grid: pick, fit all amplitudes by least squares, choose how many.

    Each pick takes the grid point that lowers the energy of the residual most, summed over the
    snapshots. These have a dictionary each, as their codes differ; what they share is the support.
    Constant symbols make one system of all snapshots, and this is orthogonal matching pursuit.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront, source mode and the most sources, as in
            :func:`physics.nomp`.
        snr_db: (B,) or one for all [dB]; None where it is not known: what the sources leave then
            counts as noise, and so does what the grid misses.
        oversampling: grid points per width of a beam (:func:`physics.pursuit.pursuit_grid`). The
            memory of a pick and its time grow with its third power.
        criterion: that chooses the number of sources.

    Returns:
        The sources, strongest first, without a covariance: the fit's says nothing of the grid.

    Raises:
        TypeError, ValueError: as :func:`physics.nomp`, or an ``oversampling`` that is not positive.

    Source: Tropp, Gilbert and Strauss, "Algorithms for simultaneous sparse approximation. Part I:
    Greedy pursuit", Signal Processing 86(3), 2006, with the sum of squared correlations where they
    sum magnitudes.
    """
    config = NompConfig(
        criterion=criterion,
        oversampling=oversampling,
        candidates=_EXACT,
        new_iterations=0,
        joint_iterations=0,
        final_iterations=0,
    )
    result = nomp(y, H, codes, array=array, scene=scene, snr_db=snr_db, config=config)
    return replace(result, detections=replace(result.detections, covariance=None))
