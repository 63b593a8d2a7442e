"""Suites of scenes for comparing estimators: as configured, harder, and with model mismatch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from physics.geometry import PlanarArray
from physics.scene import SceneConfig

CHOOSERS = "the scenes that choose a search's winner"  # shown if there are no other recorded scenes


@dataclass(frozen=True)
class Suite:
    """The differences of a suite's scenes from the configured ones.

    ``told`` says whether the classical estimators are given the changed model; a network always
    stays as it was trained. Otherwise they keep the configured model and field of view and only
    know the maximum number of sources: the suite tests this mismatch.
    """

    description: str
    changes: dict[str, Any] = field(default_factory=dict)
    told: bool = False
    offset: tuple[float, float] | None = None  # offset of the array's centre, in spacings

    def scene(self, configured: SceneConfig) -> SceneConfig:
        """Return the configuration from which scenes are drawn."""
        values = configured.model_dump() | self.changes
        values["max_sources"] = max(values["max_sources"], values["min_sources"])
        return SceneConfig.model_validate(values)

    def array(self, configured: PlanarArray) -> PlanarArray:
        """Return the surface used to simulate the scenes."""
        if self.offset is None:
            return configured
        return PlanarArray(
            configured.n_horizontal,
            configured.n_vertical,
            configured.spacing,
            configured.wavelength,
            (self.offset[0] * configured.spacing, self.offset[1] * configured.spacing),
        )


# Configured hardware errors are switched off, so that only those of the suite apply.
_IDEAL: dict[str, Any] = {
    "element_jitter": 0.0,
    "phase_error_deg": 0.0,
    "amplitude_error_db": 0.0,
    "dropout": 0.0,
    "true_wavefront": None,
    "error_levels": "fixed",
    "faultless_share": 0.0,
}

SUITES: dict[str, Suite] = {
    "nominal": Suite("scenes as configured"),
    "ideal": Suite("scenes as configured, without hardware errors", _IDEAL),
    "jitter": Suite(
        "elements displaced by 15 mm (standard deviation)", _IDEAL | {"element_jitter": 0.015}
    ),
    "phase-error": Suite("element phases off by 20 degrees", _IDEAL | {"phase_error_deg": 20.0}),
    "dropout": Suite("one element in ten dead", _IDEAL | {"dropout": 0.1}),
    "wavefront": Suite(
        "paraxial waves, whatever model is configured", _IDEAL | {"true_wavefront": "paraxial"}
    ),
    "low-snr": Suite("SNR from -15 to 0 dB", {"snr_db": (-15.0, 0.0)}),
    "near": Suite("sources at 0.5 to 2 m", {"range_m": (0.5, 2.0)}),
    "many": Suite("4 or 5 sources", {"min_sources": 4, "max_sources": 5}),
    "origin-paraxial": Suite(
        "the origin's scenes: paraxial waves, constant symbols, Rayleigh channel, array off its "
        "centre by half a spacing; the classical estimators are told",
        {
            "wavefront": "paraxial",
            "true_wavefront": None,
            "source_mode": "constant",
            "k_factor_db": -100.0,
        },
        told=True,
        offset=(-0.5, -0.5),
    ),
}
