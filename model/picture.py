"""A located scene as a drawing: seen from above and from the side, to scale."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from model.config import TrialConfig

_HEIGHT, _MARGIN, _TABLE = 340.0, 46.0, 25.0  # pixels
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.t{font-weight:600}.g{stroke:#ddd;fill:none}"
    ".v{stroke:#bbb;stroke-dasharray:4 4;fill:none}.r{stroke:#222;stroke-width:5}.n{fill:#777}"
)


class _Panel:
    """A plane of the scene, with one lateral axis to the right and the distance z upwards."""

    def __init__(self, left: float, axis: str, centre: float, scale: float, bottom: float) -> None:
        self.left, self.axis, self.centre, self.scale, self.bottom = (
            left, axis, centre, scale, bottom,
        )  # fmt: skip

    def at(self, across: float, z: float) -> tuple[float, float]:
        """Pixels of a point [m]."""
        return self.centre + self.scale * across, self.bottom - self.scale * z


def draw_scene(scene: dict[str, Any], config: TrialConfig) -> str:
    """SVG of a scene's sources, the projections of their 90 % ellipsoids, the surface and its view.

    Args:
        scene: as from :mod:`model.locate`: file, scene and sources.
        config: of the network, for the surface and the field of view.
    """
    sources = scene["sources"]
    reach = max([config.scene.range_m[1], *(s["range_m"] for s in sources)])
    bottom = 40.0 + _HEIGHT
    array = config.array
    panels = []
    left = _MARGIN
    for title, axis, view, count in (
        ("from above", "x", config.scene.azimuth_deg, array.n_horizontal),
        ("from the side", "y", config.scene.elevation_deg, array.n_vertical),
    ):
        sines = [math.sin(math.radians(angle)) for angle in view]
        low = min(-0.15, *sines, *(s[f"{axis}_m"] / reach for s in sources))
        high = max(0.15, *sines, *(s[f"{axis}_m"] / reach for s in sources))
        scale = _HEIGHT / reach
        centre = left - low * _HEIGHT
        panel = _Panel(left, axis, centre, scale, bottom)
        half = 0.5 * (count - 1) * array.spacing
        panels.append(_panel(panel, title, view, half, reach, sources))
        left += (high - low) * _HEIGHT + _MARGIN
    width = max(left, 720.0)
    head = f"{scene['file']}, scene {scene['scene']}: {len(sources)} sources"
    top = bottom + 50.0
    lines = [
        f'<circle cx="{_MARGIN + 5}" cy="{top + _TABLE * k - 4}" r="5" fill="{_colour(k)}"/>'
        f'<text x="{_MARGIN + 18}" y="{top + _TABLE * k}">{html.escape(_words(source))}</text>'
        for k, source in enumerate(sources)
    ]
    height = top + _TABLE * max(1, len(sources)) + 10
    none = f'<text x="{_MARGIN}" y="{top}">no source was found</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="t" x="{_MARGIN}" y="18">{html.escape(head)}</text>'
        + "".join(panels)
        + ("".join(lines) or none)
        + "</svg>\n"
    )


def _panel(
    panel: _Panel,
    title: str,
    view: Sequence[float],
    half: float,
    reach: float,
    sources: list[dict[str, Any]],
) -> str:
    parts = [f'<text x="{panel.left}" y="36">{title}: z over {panel.axis}, metres</text>']
    step = 10.0 ** math.floor(math.log10(reach / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if reach / (factor * step) <= 6)
    first, last = (math.radians(angle) for angle in view)
    for index in range(1, math.floor(reach / step + 1e-9) + 1):
        radius = index * step
        start = panel.at(radius * math.sin(first), radius * math.cos(first))
        end = panel.at(radius * math.sin(last), radius * math.cos(last))
        r = radius * panel.scale
        parts.append(
            f'<path class="g" d="M{start[0]:.1f} {start[1]:.1f}A{r:.1f} {r:.1f} 0 0 1 '
            f'{end[0]:.1f} {end[1]:.1f}"/><text class="n" x="{end[0] + 4:.1f}" '
            f'y="{end[1] + 12:.1f}">{radius:g}</text>'
        )
    origin = panel.at(0.0, 0.0)
    for angle in (first, last):
        end = panel.at(reach * math.sin(angle), reach * math.cos(angle))
        parts.append(
            f'<line class="v" x1="{origin[0]:.1f}" y1="{origin[1]:.1f}" '
            f'x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
        )
    (x1, y1), (x2, _) = panel.at(-half, 0.0), panel.at(half, 0.0)
    parts.append(f'<line class="r" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y1:.1f}"/>')
    parts.append(f'<text class="n" x="{x2 + 6:.1f}" y="{y1 + 14:.1f}">surface</text>')
    for k, source in enumerate(sources):
        x, y = panel.at(source[f"{panel.axis}_m"], source["z_m"])
        parts.append(_shadow(panel, source, (x, y), _colour(k)))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_colour(k)}">'
            f"<title>{html.escape(_words(source))}</title></circle>"
        )
    return "".join(parts)


def _shadow(panel: _Panel, source: dict[str, Any], centre: tuple[float, float], colour: str) -> str:
    """Outline of the ellipsoid projected on the panel's plane."""
    ellipsoid = source["ellipsoid_90"]
    if ellipsoid is None:
        return ""
    own = "xyz".index(panel.axis)
    a = b = c = 0.0  # of the ellipsoid's matrix, on this plane
    for length, axis in zip(ellipsoid["half_axes_m"], ellipsoid["directions"], strict=True):
        u, v = length * axis[own], length * axis[2]
        a, b, c = a + u * u, b + u * v, c + v * v
    middle, radius = 0.5 * (a + c), math.hypot(0.5 * (a - c), b)
    long, short = math.sqrt(middle + radius), math.sqrt(max(0.0, middle - radius))
    turn = -math.degrees(0.5 * math.atan2(2 * b, a - c))  # pixels count downwards
    return (
        f'<ellipse cx="0" cy="0" rx="{long * panel.scale:.1f}" ry="{short * panel.scale:.1f}" '
        f'transform="translate({centre[0]:.1f} {centre[1]:.1f}) rotate({turn:.1f})" '
        f'fill="{colour}" fill-opacity=".15" stroke="{colour}" stroke-opacity=".6"/>'
    )


def _words(source: dict[str, Any]) -> str:
    def off(name: str, unit: str, digits: int) -> str:
        value = source.get(name)
        return "" if value is None else f" ± {value:.{digits}f}{unit}"

    return (
        f"azimuth {source['azimuth_deg']:.1f}°{off('azimuth_std_deg', '°', 1)}, "
        f"elevation {source['elevation_deg']:.1f}°{off('elevation_std_deg', '°', 1)}, "
        f"range {source['range_m']:.2f} m{off('range_std_m', ' m', 2)}, "
        f"probability {source['probability']:.2f}, power {source['power']:.2f}"
    )


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
