"""Inference: from a measurement to sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment, nnls
from torch import Tensor

from model.blending import blended_covariance
from model.checkpoint import (
    WEIGHTS,
    CheckpointError,
    exported,
    load_weights,
    read_config,
    read_decision,
)
from model.config import TrialConfig
from model.decision import Decision, judge
from model.decode import detect
from model.features import Features, compute_features
from model.front_end import CandidateSearch
from model.network import build_network
from model.prediction import Prediction, SourceNetwork
from model.shipped import shipped
from physics.checks import check_measurement
from physics.covariance import LowRankCovariance
from physics.detections import Detections
from physics.nomp import estimate_snr_db
from physics.scaling import divide, divisor, peak
from physics.spectrum import PolarGrid
from physics.steering import steering_vector


@dataclass(frozen=True)
class Source:
    """One source found in a scene."""

    azimuth_deg: float
    elevation_deg: float
    range_m: float
    power: float  # share of R_blend's trace that the source explains, by non-negative fit
    probability: float  # that there is a source in this direction, from the slot pointing at it
    # Of the errors of azimuth, elevation [rad] and range [m]; None for peaks of a spectrum.
    covariance: tuple[tuple[float, ...], ...] | None = None


class Localizer:
    """A trained network with everything needed to use it.

    With a network that rates candidates, sources are the candidates above the threshold of its
    decision. Otherwise they are the highest peaks of the MUSIC spectrum of R_blend, which is built
    by the same function as in training; their number is that of the slots predicted to hold a
    source.

    Args:
        config: of the training.
        network: with the weights that were scored.
        device: where to compute.
        grid: of the MUSIC spectrum.
        decision: threshold and calibration; the defaults if left out.
    """

    def __init__(
        self,
        config: TrialConfig,
        network: SourceNetwork,
        device: torch.device | str = "cpu",
        grid: PolarGrid | None = None,
        decision: Decision | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.array = config.array.build()
        self.grid = grid or PolarGrid.covering(config.scene)
        self.decision = decision or Decision(config.decision.goal)
        self._front_end = CandidateSearch.of(config, keep=False)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> Localizer:
        """Load exported weights.

        Args:
            folder: folder of the weights, or a run folder with them in ``best/``.
            device: where the network computes.

        Raises:
            CheckpointError: a missing or damaged file, or weights of another network.
        """
        folder = exported(Path(folder))
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; expected {WEIGHTS} and config.json, as in RUN_DIR/best"
            )
        config = read_config(folder)
        network = build_network(config.network, config.scene, config.array.build())
        weights = load_weights(folder)
        known = dict(network.named_parameters())  # shared ones go by their first name
        try:
            network.load_state_dict(weights, strict=weights.keys() != known.keys())
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"{folder / WEIGHTS}: weights of another network than config.json's, or of "
                f"an earlier version's ({first})"
            ) from error
        return cls(config, network, device, decision=read_decision(folder))

    @classmethod
    def shipped(cls, name: str = "fluctuating", device: torch.device | str = "cpu") -> Localizer:
        """Load a network that is shipped with the package.

        Raises:
            CheckpointError: there is no network of that name.
        """
        known = shipped()
        if name not in known:
            raise CheckpointError(f"no shipped network {name!r}; there are {', '.join(known)}")
        return cls.load(known[name], device)

    @torch.no_grad()
    def predict(
        self, y: Tensor, H: Tensor, codes: Tensor, snr_db: float | Tensor | None = None
    ) -> tuple[Prediction, LowRankCovariance, Features]:
        """Run the network on scenes and build R_blend.

        Args:
            y: (B, L, M) complex.
            H: (B, M, N) complex, or (M, N) for all.
            codes: (B, L, N) complex, or (L, N) for all.
            snr_db: one for all, (B,), or None: it is then estimated from the measurement.

        Raises:
            TypeError, ValueError: as :func:`physics.checks.check_measurement`, sizes that the
                network was not trained for, codes beyond single precision, or a prediction that is
                not finite.
        """
        check_measurement(y, H, codes)
        self._check_sizes(y, H)
        batch = torch.broadcast_shapes(y.shape[:-2], H.shape[:-2], codes.shape[:-2])
        if len(batch) != 1:
            raise ValueError(
                f"y has shape {tuple(y.shape)}, H {tuple(H.shape)} and codes {tuple(codes.shape)}; "
                "expected a batch (B, L, M) of scenes (locate takes one scene too)"
            )
        y, H, codes = (t.expand(*batch, *t.shape[-2:]) for t in (y, H, codes))
        # y and H may exceed single precision only in their scale, which does not affect the result.
        y, H = (divide(t, divisor(peak(t))[..., None, None]) for t in (y, H))
        given = codes
        y, H, codes = (t.to(self.device, torch.complex64) for t in (y, H, codes))
        if not bool(torch.isfinite(codes.real.sum() + codes.imag.sum())):
            largest = float(peak(given).max())
            raise ValueError(
                f"codes have a modulus of {largest:.3g}, beyond single precision; expected "
                "reflection coefficients of modulus about 1: divide them by their largest"
            )
        if snr_db is None and self._front_end is not None:
            level = y.real.new_full(batch, torch.nan)  # the pursuit estimates the noise itself
        elif snr_db is None:
            level = estimate_snr_db(y, H, codes, array=self.array, scene=self.config.scene)
        else:
            level = torch.as_tensor(snr_db, dtype=torch.float32, device=self.device)
            if level.ndim > 1 or (level.ndim == 1 and level.shape != batch):
                raise ValueError(
                    f"snr_db has shape {tuple(level.shape)}; expected a number or ({batch[0]},)"
                )
            level = level.expand(batch)
        front_end = self._front_end
        features = compute_features(
            y,
            H,
            codes,
            level,
            dictionary=self.network.dictionary,
            tikhonov=self.config.tikhonov,
            candidates=None if front_end is None else front_end(y, H, codes, level),
            spectra=self.config.network.spectra,
        )
        prediction = self.network(features)
        for name in ("existence", "factor"):
            if not bool(torch.isfinite(getattr(prediction, name)).all()):
                raise ValueError(
                    f"the network answers with NaN or Inf ({name}); its weights are damaged or of "
                    "a training that diverged: train it again"
                )
        return prediction, blended_covariance(prediction, features, self.config.blend), features

    def detect(
        self, y: Tensor, H: Tensor, codes: Tensor, snr_db: float | Tensor | None = None
    ) -> tuple[Detections, Prediction, LowRankCovariance]:
        """The sources of a batch in padded form, with the underlying prediction and R_blend.

        Arguments and errors are those of :meth:`predict`.
        """
        prediction, blended, _ = self.predict(y, H, codes, snr_db)
        return self._detect(prediction, blended), prediction, blended

    def _detect(self, prediction: Prediction, blended: LowRankCovariance) -> Detections:
        if prediction.cells is not None:
            return judge(prediction, self.decision.goal).named(self.decision)
        return detect(prediction, blended, self.grid, self.array, self.config.scene.wavefront)

    def locate(
        self, y: Tensor, H: Tensor, codes: Tensor, snr_db: float | Tensor | None = None
    ) -> list[Source] | list[list[Source]]:
        """Find the sources of one scene or of a batch.

        Args:
            y: (L, M) or (B, L, M) complex.
            H: (M, N) or (B, M, N) complex.
            codes: (L, N) or (B, L, N) complex.
            snr_db: one for all, (B,), or None: it is then estimated from the measurement.

        Returns:
            The sources of the scene, most powerful first; a list of such lists for a batch.

        Raises:
            TypeError, ValueError: see :meth:`predict`.
        """
        alone = all(isinstance(t, Tensor) and t.ndim == 2 for t in (y, H, codes))
        prediction, blended, _ = self.predict(y.unsqueeze(0) if alone else y, H, codes, snr_db)
        found = self._decode(prediction, blended)
        return found[0] if alone else found

    def _check_sizes(self, y: Tensor, H: Tensor) -> None:
        m, n = self.config.scene.n_antennas, self.array.size
        if H.shape[-2:] != (m, n):
            raise ValueError(
                f"y has shape {tuple(y.shape)} and H {tuple(H.shape)}; this network was trained "
                f"for y (B, L, {m}) and H (B, {m}, {n})"
            )

    def _decode(self, prediction: Prediction, blended: LowRankCovariance) -> list[list[Source]]:
        wavefront = self.config.scene.wavefront
        found = self._detect(prediction, blended)
        result: list[list[Source]] = []
        for item in range(len(found)):
            kept = found.position[item][found.present[item]]
            if not len(kept):
                result.append([])
                continue
            a = steering_vector(kept, self.array, wavefront)
            single = LowRankCovariance(blended.factor[item], blended.loading[item])
            # a_k^H R a_k = sum_j |a_k^H a_j|^2 p_j: neighbouring sources share common power.
            seen = single.quadratic(a) / self.array.size
            power, _ = nnls((a.conj() @ a.mT).abs().square().cpu().numpy(), seen.cpu().numpy())
            if prediction.cells is not None:
                slots = found.present[item]
                probability = torch.sigmoid(prediction.existence[item][slots]).tolist()
            else:
                probability = self._probabilities(prediction, item, a)
            spread: list[tuple[tuple[float, ...], ...] | None] = [None] * len(kept)
            if found.covariance is not None:
                own = found.covariance[item][found.present[item]].tolist()
                spread = [tuple(tuple(line) for line in matrix) for matrix in own]
            sources = [
                Source(
                    azimuth_deg=float(torch.rad2deg(p[0])),
                    elevation_deg=float(torch.rad2deg(p[1])),
                    range_m=float(p[2]),
                    power=float(w),
                    probability=float(q),
                    covariance=c,
                )
                for p, w, q, c in zip(kept, power, probability, spread, strict=True)
            ]
            result.append(sorted(sources, key=lambda s: -s.power))
        return result

    def _probabilities(self, prediction: Prediction, item: int, steering: Tensor) -> list[float]:
        """Existence probability of the slot that points at each source; each slot is used once."""
        existing = (prediction.existence[item] > 0).nonzero().squeeze(-1)
        overlap = (self.network.dictionary @ steering.mH).abs().square()  # (G, K)
        pointing = prediction.log_pointer[item][existing].exp() @ overlap
        slots, sources = linear_sum_assignment(-pointing.cpu().numpy())
        probability = torch.sigmoid(prediction.existence[item][existing]).tolist()
        of_source = dict(zip(sources.tolist(), slots.tolist(), strict=True))
        return [probability[of_source[k]] for k in range(len(steering))]
