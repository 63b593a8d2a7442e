"""A network, a loss term and a simulator of one's own, named in examples/extension.yaml.

python -m tuner.run --config examples/extension.yaml --local
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.custom import CustomConfig
from model.features import Features
from model.plugin import Option
from model.prediction import Prediction, SourceNetwork
from physics import PlanarArray, SceneConfig, Scenes, simulate
from physics.precision import full_precision


class SpectrumNetwork(SourceNetwork):
    """Reads the spectra over the dictionary with one hidden layer; each slot points at cells."""

    def __init__(self, config: CustomConfig, scene: SceneConfig, array: PlanarArray) -> None:
        super().__init__(config, scene, array)
        n_cells, rank = self.dictionary.shape[0], config.rank
        hidden = int(config.options.get("hidden") or 64)
        self.body = nn.Sequential(
            nn.Linear(len(config.spectra) * n_cells, hidden), nn.GELU(), nn.Dropout(config.dropout)
        )
        self.pointer = nn.Linear(hidden, rank * n_cells)
        self.existence = nn.Linear(hidden, rank)
        self.log_power = nn.Linear(hidden, rank)

    def forward(self, features: Features) -> Prediction:
        """Predict B scenes."""
        hidden = self.body(features.spectrum.flatten(1))
        score = self.pointer(hidden).unflatten(-1, (-1, self.dictionary.shape[0]))
        existence, log_power = self.existence(hidden), self.log_power(hidden)
        with full_precision():  # what leaves a network is never in half precision
            prior = features.spectrum.mean(1, keepdim=True)
            log_pointer = torch.log_softmax(score.float() + prior, dim=-1)  # (B, r, G)
            pointer = log_pointer.exp()
            column = pointer.to(self.dictionary.dtype) @ self.dictionary  # (B, r, N)
            power = torch.softmax(log_power.float(), dim=-1)
            factor = (column * power.sqrt().unsqueeze(-1)).mT
        return Prediction(factor, existence.float(), log_pointer, pointer @ self.cells)


def few_slots(prediction: Prediction, scenes: Scenes, **options: Option) -> Tensor:
    """How far the expected number of sources is from the true one, squared."""
    expected = torch.sigmoid(prediction.existence).sum(-1)
    return (expected - scenes.n_sources).square().mean()


def nearby(
    n_scenes: int,
    config: SceneConfig,
    array: PlanarArray,
    *,
    generator: torch.Generator,
    device: torch.device | str,
) -> Scenes:
    """Scenes whose sources all stand in the nearer half of the field of view."""
    near, far = config.range_m
    closer = config.model_copy(update={"range_m": (near, (near + far) / 2.0)})
    return simulate(n_scenes, closer, array, generator=generator, device=device)
