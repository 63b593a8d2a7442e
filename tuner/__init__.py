"""Distributed hyper-parameter optimisation of the localiser: Ray Tune, Optuna, one ledger."""

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "yaml", "pydantic", "torch", "optuna", "ray")

# While `python -m tuner.run` imports this package, the program is still called "-m".
if sys.argv[:1] == ["-m"] and (_missing := [name for name in _NEEDED if find_spec(name) is None]):
    sys.exit(
        f"error: {sys.executable} lacks {', '.join(_missing)}, which ristune needs; in a clone, "
        "`make setup` makes .venv with all of it and `source .venv/bin/activate` uses it"
    )
