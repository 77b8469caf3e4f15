"""A study of Optuna that several processes run together.

DATABASE_URL="postgresql+psycopg2://…?plugin=queries&max_size=4&share=host" python optuna_study.py
"""

import os

import optuna
from optuna.storages import RDBStorage


def objective(trial: optuna.Trial) -> float:
    """A parabola.  What computes for longer holds no connection meanwhile."""
    return (trial.suggest_float("x", -10, 10) - 2) ** 2


storage = RDBStorage(os.environ["DATABASE_URL"])
study = optuna.create_study(storage=storage, study_name="parabola", load_if_exists=True)
study.optimize(objective, n_trials=5, n_jobs=4)
