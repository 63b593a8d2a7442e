"""Checks whether an array suits a field of view, which reveals mistakes of units."""

from __future__ import annotations

import math

from physics.geometry import PlanarArray
from physics.scene import SceneConfig

_AMBIGUOUS = 1.01  # wavelengths; a larger change of path between elements is ambiguous


def array_notes(array: PlanarArray, scene: SceneConfig) -> list[str]:
    """Notes for the user on an array before a training starts, one line each.

    Args:
        array: the surface.
        scene: the field of view.
    """
    notes = []
    spacing = array.spacing / array.wavelength
    axes = {
        "azimuth": (array.n_horizontal, scene.azimuth_deg),
        "elevation": (array.n_vertical, scene.elevation_deg),
    }
    for name, (count, bounds) in axes.items():
        low, high = (math.sin(math.radians(bound)) for bound in bounds)
        if count > 1 and spacing * (high - low) > _AMBIGUOUS:
            notes.append(
                f"array: elements {spacing:.3g} wavelengths apart repeat themselves within "
                f"scene.{name}_deg=[{bounds[0]:g}, {bounds[1]:g}] (grating lobes); at most "
                f"array.spacing={array.wavelength / (high - low):.3g} m for these "
                f"{array.wavelength:.3g} m of wavelength, or a narrower field"
            )
    sides = [n * array.spacing for n in (array.n_horizontal, array.n_vertical)]
    aperture = math.hypot(*sides)
    if aperture < array.wavelength:
        notes.append(
            f"array: {aperture:.3g} m across, and a wavelength of {array.wavelength:.3g} m: it "
            "tells no directions apart; both are in metres (a wavelength is 0.2998 over GHz)"
        )
    far = 2.0 * aperture**2 / array.wavelength
    if scene.wavefront != "planar" and scene.range_m[0] > far:
        notes.append(
            f"array: at {scene.range_m[0]:g} m and farther (scene.range_m) waves are plane to a "
            f"surface {aperture:.3g} m across, whose near field ends at {far:.3g} m: hardly any "
            "range can be told; is all in metres?"
        )
    return notes
