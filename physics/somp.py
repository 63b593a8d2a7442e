"""Simultaneous orthogonal matching pursuit on a grid: the pursuit of NOMP without refinement."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from physics.geometry import PlanarArray
from physics.nomp import NompConfig, NompResult, nomp
from physics.order import Criterion
from physics.scene import SceneConfig

# Number of points with an exactly computed gain: a fine grid has many, very similar neighbours.
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
    snapshots. Each snapshot has its own dictionary, as the codes differ; they share the support.
    With constant symbols all snapshots form one system, and this is orthogonal matching pursuit.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront, source mode and maximum number of sources, as in
            :func:`physics.nomp`.
        snr_db: (B,) or one for all [dB]; None where it is unknown: the residual, including the
            energy that the grid misses, then counts as noise.
        oversampling: grid points per beam width (:func:`physics.pursuit.pursuit_grid`). The memory
            and time of a pick grow with its third power.
        criterion: information criterion that chooses the number of sources.

    Returns:
        The sources, strongest first, without a covariance: the fit's ignores the grid's error.

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
