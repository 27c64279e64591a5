"""A whole audit: check everything, audit target after target."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opacus_bpclip.audit.auditing import audit
from opacus_bpclip.audit.cases import CASES
from opacus_bpclip.audit.engine_target import Inputs, model_target
from opacus_bpclip.audit.plot import draw
from opacus_bpclip.audit.report import in_short, render
from opacus_bpclip.audit.results import Audited, AuditRecord
from opacus_bpclip.audit.settings import MAX_INPUT_NORM, Settings, Task, shape_of, tasks
from opacus_bpclip.audit.target import Batch, Target
from opacus_bpclip.audit.verdict import outcome_of
from opacus_bpclip.config import AdaptiveThreshold, Allocation, BackpropClipping, Bound
from opacus_bpclip.jobs.errors import JobError, UsageError, told_of_users_code
from opacus_bpclip.jobs.loading import load_object, made_by
from opacus_bpclip.jobs.processes import call_in_children
from opacus_bpclip.jobs.running import Job, View

_STATUS = {"pass": 0, "violation": 1, "inconclusive": 3}


class Audit(Job[AuditRecord]):
    """All targets that the settings ask for.

    Args:
        settings: what to audit.
        processes: how many targets to audit at the same time.
        plot: the file to draw the trials into; None for no plot.

    Raises:
        UsageError: a plot is wanted, but no trials to draw.
    """

    view = View("Audit report", render, draw, in_short)

    def __init__(self, settings: Settings, *, processes: int = 1, plot: Path | None = None) -> None:
        self._settings, self._processes = settings, processes
        if plot and not settings.trials:
            raise UsageError("--plot draws the trials' scores: it needs --trials above 0")

    def check(self) -> None:
        """Load the user's own code, if there is any."""
        if self._settings.target or self._settings.model:
            build(self._settings, tasks(self._settings)[0])

    def begin(self) -> AuditRecord:
        """Return a record without results."""
        return AuditRecord.new(self._settings)

    def measure(self, record: AuditRecord, todo: Sequence[Task]) -> Iterator[Audited]:
        """Audit target after target, or several at the same time."""
        processes = min(self._processes, len(todo))
        if processes <= 1:
            yield from (run_task(self._settings, task) for task in todo)
            return
        # The long ones first, so that none is left over for the end; the last case is the largest.
        order = sorted(enumerate(todo), key=lambda pair: (-pair[1].trials, -pair[0]))
        calls = [(self._settings, task) for _, task in order]
        yield from call_in_children(run_task, calls, processes=processes)

    def status(self, record: AuditRecord) -> int:
        """Return 1 for a violation, 3 for an audit that was too weak, 0 for a pass."""
        return _STATUS[outcome_of(*(found.verdict for found in record.asked))]


def run_task(settings: Settings, task: Task) -> Audited:
    """Audit one target on one thread: on more, steps this small are many times slower.

    Raises:
        JobError: the target, a user's own code that may raise anything, cannot be audited.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with told_of_users_code(f"{task.name} cannot be audited", JobError):
            verdict = audit(
                build(settings, task),
                noise_multiplier=settings.noise_multiplier,
                trials=task.trials,
                alpha=settings.alpha,
                delta=settings.delta,
                seed=task.seed(settings.seed),
            )
    finally:
        torch.set_num_threads(threads)
    return Audited(task=task, verdict=verdict)


def build(settings: Settings, task: Task) -> Target:
    """Make what a task audits.

    Raises:
        UsageError: the user's own code cannot be loaded, or makes something else.
    """
    if settings.target:
        return made_by(settings.target, Target)
    training: dict[str, Any] = {
        "loss_reduction": task.loss_reduction,
        "max_grad_norm": settings.max_grad_norm,
        "clipping": clipping_of(settings, task),
    }
    if task.case:
        return CASES[task.case].target(task.name, **training)
    path, inputs = settings.model, settings.input
    assert path is not None
    assert inputs is not None
    with told_of_users_code(f"--model {path} with --input {inputs}"):
        try:
            target = model_target(
                task.name,
                lambda: copy.deepcopy(made_by(path, nn.Module)),
                _users_inputs(inputs) if ":" in inputs else _drawn(inputs, settings.vocabulary),
                loss=load_object(settings.loss) if settings.loss else None,
                **training,
            )
            target.make(settings.noise_multiplier)  # refusals of the model come before any work
        except ValueError as error:
            raise UsageError(str(error)) from error
    return target


def clipping_of(settings: Settings, task: Task) -> BackpropClipping:
    """Return the options that a task is audited with."""
    max_input_norm = settings.max_input_norm
    if max_input_norm == "usual":
        clips = task.bound == "product" or task.allocation != "joint"
        max_input_norm = MAX_INPUT_NORM if clips else None
    adaptive = task.threshold == "adaptive"
    by_layer = adaptive and task.allocation != "joint"
    return BackpropClipping(
        allocation=cast(Allocation, task.allocation),
        bound=cast(Bound, task.bound),
        max_input_norm=max_input_norm,
        threshold=AdaptiveThreshold() if adaptive else None,
        layer_noise="dimension" if by_layer else "equal",
        propagate="unclipped" if by_layer else "clipped",
    )


def _drawn(text: str, vocabulary: int | None) -> Inputs:
    shape = shape_of(text)
    if vocabulary is None:
        return lambda count: torch.randn(count, *shape)
    return lambda count: torch.randint(vocabulary, (count, *shape))


def _users_inputs(path: str) -> Inputs:
    make = load_object(path)

    def inputs(count: int) -> Batch:
        with told_of_users_code(f"--input {path}"):
            made = make(count)
        batch = made if isinstance(made, tuple) else (made,)
        if not batch or not all(isinstance(part, Tensor) for part in batch):
            kind = type(made).__name__
            raise UsageError(
                f"--input {path} makes a {kind}, not a batch: a tensor, or a tuple of tensors"
            )
        return batch

    return inputs
