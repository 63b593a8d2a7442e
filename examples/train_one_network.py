"""Train one network without any search, and score it beside NOMP.

python examples/train_one_network.py [--epochs 4] [--scenes 1024] [--out runs/one]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model import Localizer, TrialConfig, export_best, train
from tuner.evaluation import evaluate_suite


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--epochs", type=int, default=4)
    arguments.add_argument("--scenes", type=int, default=1024)
    arguments.add_argument("--out", type=Path, default=Path("runs/one"))
    args = arguments.parse_args()

    config = TrialConfig.model_validate(
        {
            "objective": "gospa",
            "network": {"family": "candidate", "width": 32, "depth": 1},
            "loss": {"existence": 1.0, "position": 0.5},
            "training": {"epochs": args.epochs, "learning_rate": 2e-3, "ema_decay": 0.98},
            "data": {"train_scenes": args.scenes, "val_scenes": 256, "fresh": False},
        }
    )
    # Called again it goes on where it was cut; a finished training stays as it is.
    train(
        config,
        checkpoint=args.out / "checkpoint",
        report=lambda epoch, metrics: print(
            f"epoch {epoch}: GOSPA {metrics['gospa']:.3f} m, F1 {metrics['f1']:.3f}"
        ),
    )
    export_best(args.out / "checkpoint", args.out / "best")
    localizer = Localizer.load(args.out / "best")
    scores = evaluate_suite("nominal", config, localizer, n_scenes=128, classical=["nomp"])
    for name, report in scores["methods"].items():
        print(f"{name}: F1 {report['overall']['f1']:.3f}, 128 scenes that nobody has seen")


if __name__ == "__main__":
    main()
