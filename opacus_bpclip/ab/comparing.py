"""`compare`: the comparison from Python, on objects that need no name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ComparisonRow:
    """One training run.

    Args:
        arm: how it clipped.
        seed: of weights, batches and noise; None where the arm has not trained the model.
        metric: on the test set after the last epoch.
        epsilon: spent; None without privacy.
        seconds: median of a step.
        note: why the arm has not trained the model; empty where it has.
    """

    arm: str
    seed: int | None = None
    metric: float | None = None
    epsilon: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ComparisonTable:
    """What a comparison has found; as text, it is the table that the command prints.

    Args:
        metric: its name.
        higher_is_better: or lower.
        rows: the runs, arm by arm.
        text: the table.
    """

    metric: str
    higher_is_better: bool
    rows: tuple[ComparisonRow, ...]
    text: str

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return the same as dictionaries and lists, without the text."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "rows": [asdict(row) for row in self.rows],
        }


def compare(
    model: nn.Module | Callable[[], nn.Module] | str,
    data: tuple[Any, Any] | Callable[[], tuple[Any, Any]] | str,
    *,
    loss: Any = None,
    metric: Any = None,
    collate: Callable[[list[Any]], Any] | str | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | str = "SGD",
    schedule: Callable[[torch.optim.Optimizer, int], Any] | str | None = None,
    transform: Callable[[Any], Any] | str | None = None,
    json: Path | None = None,
    resume: bool = False,
    plot: Path | None = None,
    progress: bool = False,
    **options: Any,
) -> ComparisonTable:
    """Train a model by several clipping methods at equal privacy, as ``opacus-bpclip ab`` does.

    All arms start from the same weights for a seed, draw the same Poisson batches, add noise by
    the same multiplier and are charged by the same accountant. An arm that cannot train the model
    has a row that says why. The comparison is for public data, or data that you may spend on it:
    it reports what no accountant counts.

    Everything runs in this process, arm after arm, so nothing needs to be picklable or
    importable. Global random states and the number of threads are as before in the end. On a
    CPU the peak memory is not known: the command trains each arm in a process of its own.

    Args:
        model: makes a model, or a model, of which each run trains a copy.
        data: a training set and a test set, or what makes them. Items are ``(input, target)``,
            dictionaries with ``"labels"``, which are passed to the model by keyword, or tensors,
            which are their own targets.
        loss: a criterion with a ``reduction``, its class, or a function that returns each
            example's loss from outputs and targets; cross-entropy if ``None``.
        metric: a function of all outputs and targets of the test set, or an object with ``update``
            and ``compute``; ``higher_is_better`` of either says which way is better. If ``None``,
            the accuracy; with ``loss``, the loss.
        collate: makes a batch of items.
        optimizer: a name in ``torch.optim``, or what is called with the parameters and ``lr``.
        schedule: a name in ``torch.optim.lr_scheduler``, or what is called with the optimizer and
            the number of steps.
        transform: of one training input at random; with the option ``views``, that many times.
        json: the file that results are written to after every arm.
        resume: keep the results that the file holds. It knows the names of models, data and
            losses, and not whether their code has changed.
        plot: the file that the metric over epsilon is drawn into.
        progress: show bars on stderr.
        **options: further options of the command, with underscores: ``arms``, ``seeds``,
            ``epsilon``, ``delta``, ``epochs``, ``batch_size``, ``physical_batch_size``, ``lr``,
            ``device`` and others. Any of the arguments above may also be a name, ``module:name``.

    Raises:
        ValueError: an option has a wrong value.
        UsageError: something is wrong that was found before training; no private arm can train
            the model.
        JobError: the accountant was not charged once for every step.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
        >>> table = compare(
        ...     nn.Linear(4, 2), (data, data), arms=["flat", "backprop"], seeds=[0], epochs=1,
        ...     batch_size=16, delta=1e-2,
        ... )
        >>> [(row.arm, round(row.epsilon)) for row in table.rows]
        [('flat', 3), ('backprop', 3)]
    """
    # Here: the command line's libraries are not imported with the package.
    from pydantic import ValidationError

    from opacus_bpclip.ab.job import Comparison
    from opacus_bpclip.ab.report import render
    from opacus_bpclip.ab.settings import Settings
    from opacus_bpclip.jobs.errors import what_is_wrong
    from opacus_bpclip.jobs.running import measured
    from opacus_bpclip.jobs.settings import Output
    from opacus_bpclip.jobs.tables import TERMINAL
    from opacus_bpclip.probe.randomness import repeatable

    given = {
        "model": model,
        "data": data,
        "loss": loss,
        "metric": metric,
        "collate": collate,
        "optimizer": optimizer,
        "schedule": schedule,
        "transform": transform,
    }
    options |= {field: _name(own) for field, own in given.items() if own is not None}
    objects = {field: own for field, own in given.items() if not isinstance(own, str)}
    try:
        settings = Settings(**options)
    except ValidationError as error:
        raise ValueError(what_is_wrong(error)) from None
    job = Comparison(settings, progress=progress, objects=objects)
    output = Output(data=json, resume=resume, plot=plot, progress=progress)
    threads = torch.get_num_threads()
    try:
        with repeatable(torch.device("cpu")):
            record = measured(job, output)
    finally:
        torch.set_num_threads(threads)
    if plot:
        job.view.draw(record, plot)
    rows = []
    for result in record.asked:
        rows += [
            ComparisonRow(result.arm, run.seed, run.metric, run.epsilon, run.seconds_per_step)
            for run in result.seeds
        ]
        if result.note:
            rows.append(ComparisonRow(result.arm, note=result.note))
    measure = record.plan.measure
    text = render(record, TERMINAL)
    return ComparisonTable(measure.name, measure.higher_is_better, tuple(rows), text)


def _name(own: Any) -> str:
    """Return what records and errors call an object."""
    if isinstance(own, str):
        return own
    if isinstance(own, tuple):
        return _name(own[0])
    known = own if hasattr(own, "__qualname__") else type(own)
    return f"{known.__module__}:{known.__qualname__.rpartition('.')[2]}"
