"""Distributed hyper-parameter optimisation of the localiser: Ray Tune, Optuna, one ledger."""
