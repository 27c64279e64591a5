"""The subcommand ``opacus-bpclip ab``."""

from __future__ import annotations

from opacus_bpclip.ab.settings import ComparisonOutput, Settings
from opacus_bpclip.ab.study.settings import StudyOptions
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.interrupts import ending_at_once


def ab(
    *,
    study: StudyOptions = StudyOptions(),
    settings: Settings = Settings(),
    output: ComparisonOutput = ComparisonOutput(),
) -> int:
    """Compare clipping methods at equal privacy.

    Train one model by several clipping methods on equal terms: same initial weights, same Poisson
    batches, same noise multiplier, same accountant. Prints accuracy, epsilon, time per step and
    peak memory of each arm, and plots accuracy over epsilon. Without options: scikit-learn's
    digits, up to three minutes, nothing downloaded. With --model and --data: a model and data of
    your own; arms that cannot train it are listed with the reason. With --study: many comparisons,
    each arm tuned with as many trials, and means with confidence intervals. Exit status: 0 all arms
    were trained or listed before training, 1 one failed in training, 2 wrong usage, or no private
    arm can train the model.
    """
    if study.study:
        return _study(study, settings, output)
    with ending_at_once():
        from opacus_bpclip.ab.job import Comparison
        from opacus_bpclip.jobs.running import run

    return run(Comparison(settings, progress=output.progress), output)


def _study(options: StudyOptions, settings: Settings, output: ComparisonOutput) -> int:
    path = options.study
    assert path
    given = settings.model_fields_set
    if others := given - {"data_root"}:
        name = min(others).replace("_", "-")
        raise UsageError(f"--{name} beside --study: the study's file says what to measure")
    with ending_at_once():
        from opacus_bpclip.ab.study.file import read_study
        from opacus_bpclip.ab.study.job import StudyJob
        from opacus_bpclip.jobs.running import run

    study = read_study(path, settings.data_root if given else None)
    beside = {
        "data": output.data or path.with_suffix(".jsonl"),
        "plot": output.plot if "plot" in output.model_fields_set else path.with_suffix(".png"),
    }
    # What was measured is kept: a study is hours of work.
    return run(StudyJob(study, processes=options.processes), output.replace(resume=True, **beside))
