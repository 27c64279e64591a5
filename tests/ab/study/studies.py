"""A small study, and made-up results of its runs."""

from opacus_bpclip.ab.results import EpochResult, Plan, SeedResult
from opacus_bpclip.ab.study.results import Run, RunResult, StudyRecord
from opacus_bpclip.ab.study.settings import Study

TABLES = {
    "title": "Two ways",
    "seeds": [0, 1, 2],
    "baseline": "flat",
    "settings": {"epochs": 2},
    "cells": {"low": {"epsilon": 1.0}, "high": {"epsilon": 3.0}},
    "arms": {
        "flat": {},
        "ours": {"arm": "backprop", "lr": 0.5, "options": {"max_input_norm": 3.0}},
    },
    "tuning": {
        "held_out": 0.25,
        "seeds": [10, 11],
        "grid": {
            "flat": {"lr": [0.25, 0.5]},
            "ours": {"options": {"max_input_norm": [3.0, "none"]}},
        },
    },
}
STUDY = Study(**TABLES)
UNTUNED = Study(**{name: own for name, own in TABLES.items() if name != "tuning"})
PLAN = Plan(1 / 12, 12, 2.0, (0.7, 2.998), 9258, 1437, 360)


def result(run: Run, metric: float = 0.5, seconds: float = 2.0, **changes) -> RunResult:
    """Return what a run might find: ``metric`` in the end, and half of it after one epoch."""
    private = run.settings.is_private
    epochs = tuple(
        EpochResult(epoch, PLAN.epsilons[epoch - 1] if private else None, found, 1.0)
        for epoch, found in ((1, metric / 2), (2, metric))
    )
    found = SeedResult(
        seed=run.settings.seed,
        epochs=epochs,
        epsilon=PLAN.epsilons[-1] if private else None,
        seconds_per_step=0.004,
        peak_memory_bytes=None,
        seconds=(seconds / 2, seconds),
    )
    given = {"plan": PLAN, "run": found, "hardware": "a machine"}
    return RunResult(**{**run._asdict(), **given, **changes})


def finished(study: Study, metric_of, seconds_of=lambda run: 2.0) -> StudyRecord:
    """Return a record in which every run has found what the functions say."""
    record = StudyRecord.new(study)
    # The trials decide which other runs there are.
    for _ in range(2):
        for run in record.runs:
            record = record.with_result(result(run, metric_of(run), seconds_of(run)))
    return record
