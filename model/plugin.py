"""User-defined code, named in the configuration by its import path.

There are three kinds: a network (``network.family: custom``), additional terms of the loss
(``loss.extra``) and a simulator of scenes (``data.simulator``). Each is a callable of a protocol
below. Every process that reads the configuration must be able to import it, including every worker
of a cluster.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from model.faults import Sizes, first_fault
from physics.config import Adjustable, FrozenModel
from physics.geometry import PlanarArray
from physics.scene import SceneConfig, Scenes
from physics.simulate import simulate

if TYPE_CHECKING:
    from model.config import TrialConfig
    from model.custom import CustomConfig
    from model.prediction import Prediction, SourceNetwork

Option = bool | int | float | str | None
ImportPath = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="package.module:name of something that can be imported",
    ),
]


class PluginError(ValueError):
    """An import path that cannot be resolved, or an object that violates its protocol."""


class NetworkFactory(Protocol):
    """Makes a network; a subclass of :class:`model.prediction.SourceNetwork` is one itself."""

    def __call__(
        self, config: CustomConfig, scene: SceneConfig, array: PlanarArray
    ) -> SourceNetwork:
        """The network, with fresh weights drawn from torch's global generator."""
        ...


class LossTerm(Protocol):
    """An additional term of the loss."""

    def __call__(self, prediction: Prediction, scenes: Scenes, **options: Option) -> Tensor:
        """A real scalar that can be differentiated: the mean over the B scenes."""
        ...


class Simulator(Protocol):
    """Makes scenes: :func:`physics.simulate` is one."""

    def __call__(
        self,
        n_scenes: int,
        config: SceneConfig,
        array: PlanarArray,
        *,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> Scenes:
        """Make scenes that depend only on the generator's state and the arguments.

        Splits, epochs and trials differ only in the generator's seed: drawing from any other source
        of randomness leaks scenes between splits or makes trials incomparable.
        """
        ...


class ExtraTerm(FrozenModel):
    """A term of the user's own in the loss."""

    term: ImportPath = Field(
        description="package.module:function, called with prediction and scenes"
    )
    weight: Adjustable[float] = Field(1.0, ge=0)
    options: dict[str, Option] = Field({}, description="additional arguments of the function")

    def __call__(self, prediction: Prediction, scenes: Scenes) -> Tensor:
        """The value of the term.

        Raises:
            PluginError: it cannot be imported, or does not return a real scalar.
        """
        found: Any = load_plugin(self.term)(prediction, scenes, **self.options)
        if not isinstance(found, Tensor) or found.ndim or found.is_complex():
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)[:80]
            raise PluginError(
                f"{self.term}: gave {what}; expected a real tensor without dimensions, the mean "
                "over the scenes"
            )
        return found


def load_plugin(path: str) -> Callable[..., Any]:
    """The callable named by an import path.

    Raises:
        PluginError: no such module, a module that fails on import, or no such callable.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # A user's module may raise anything on import; report it to the user.
        advice = (
            "; start from its folder, or put that on PYTHONPATH"
            if isinstance(error, ModuleNotFoundError)
            else ""
        )
        raise PluginError(
            f"{path}: cannot import {module_name}: {type(error).__name__}: {error}{advice}"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        near = get_close_matches(name, dir(module), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise PluginError(f"{path}: {module_name} has no {name}{hint}")
    if not callable(found):
        raise PluginError(f"{path}: is {type(found).__name__}, which cannot be called")
    return found


def plugins_of(config: TrialConfig) -> list[str]:
    """The import paths that a configuration names."""
    network = [config.network.builder] if config.network.family == "custom" else []
    simulator = [config.data.simulator] if config.data.simulator else []
    return [*network, *(extra.term for extra in config.loss.extra.values()), *simulator]


def simulator_of(path: str | None) -> Simulator:
    """The simulator named in a configuration, or :func:`physics.simulate` if there is none.

    Raises:
        PluginError: see :func:`load_plugin`.
    """
    return simulate if path is None else load_plugin(path)


def check_scenes(
    path: str,
    scenes: Scenes,
    n_scenes: int,
    scene: SceneConfig,
    array: PlanarArray,
    *,
    values: bool = True,
) -> None:
    """Check that a user-defined simulator returned what was requested.

    Args:
        path: of the simulator, for messages.
        scenes: what it returned.
        n_scenes: requested number of scenes.
        scene: M, L and K of the scenes.
        array: the surface, N elements.
        values: also check the values, which waits once for the scenes' device.

    Raises:
        PluginError: no scenes, a tensor of another shape or dtype, and with ``values`` NaN or Inf,
            a number of sources out of bounds, a source without a range or a negative power.
    """
    if not isinstance(scenes, Scenes):
        raise PluginError(f"{path}: made {type(scenes).__name__}; expected physics.Scenes")
    sizes = Sizes(n_scenes, scene.n_snapshots, scene.n_antennas, array.size, scene.max_sources)
    fault = first_fault(scenes, sizes, values=values)
    if fault is not None:
        raise PluginError(f"{path}: made {fault}")
