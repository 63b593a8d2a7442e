"""Near-field physics of a reconfigurable surface: tensors in, tensors out."""

from physics.baselines import estimate_n_sources, music, mvdr
from physics.blend import BlendConfig, blend
from physics.bounds import crb, scene_crb
from physics.candidates import CandidateConfig, Candidates, find_candidates
from physics.channel import rician_channel
from physics.codebook import dft_codebook, draw_codes, hadamard_codebook, quantize, random_codes
from physics.covariance import (
    LowRankCovariance,
    covariance_of,
    nmse,
    sample_covariance,
)
from physics.detections import Detections
from physics.geometry import ArrayConfig, PlanarArray, direction, from_cartesian, to_cartesian
from physics.nomp import NompConfig, NompResult, estimate_snr_db, nomp, polish
from physics.pursuit import PursuitConfig
from physics.scene import SceneConfig, Scenes
from physics.simulate import simulate
from physics.somp import somp
from physics.spectrum import (
    PolarGrid,
    find_peaks,
    music_spectrum,
    mvdr_spectrum,
)
from physics.steering import steering_derivatives, steering_vector
from physics.tikhonov import SolveReport, TikhonovConfig, tikhonov_solve

__all__ = [
    "ArrayConfig",
    "BlendConfig",
    "CandidateConfig",
    "Candidates",
    "Detections",
    "LowRankCovariance",
    "NompConfig",
    "NompResult",
    "PlanarArray",
    "PolarGrid",
    "PursuitConfig",
    "SceneConfig",
    "Scenes",
    "SolveReport",
    "TikhonovConfig",
    "blend",
    "covariance_of",
    "crb",
    "dft_codebook",
    "direction",
    "draw_codes",
    "estimate_n_sources",
    "estimate_snr_db",
    "find_candidates",
    "find_peaks",
    "from_cartesian",
    "hadamard_codebook",
    "music",
    "music_spectrum",
    "mvdr",
    "mvdr_spectrum",
    "nmse",
    "nomp",
    "polish",
    "quantize",
    "random_codes",
    "rician_channel",
    "sample_covariance",
    "scene_crb",
    "simulate",
    "somp",
    "steering_derivatives",
    "steering_vector",
    "tikhonov_solve",
    "to_cartesian",
]
