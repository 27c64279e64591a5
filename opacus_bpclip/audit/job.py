"""A whole audit: check everything, audit target after target, keep what is finished."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import cast

import torch
from torch import Tensor, nn

from opacus_bpclip.audit import record as records
from opacus_bpclip.audit.auditing import audit
from opacus_bpclip.audit.cases import CASES, Reduction
from opacus_bpclip.audit.record import Record
from opacus_bpclip.audit.settings import (
    MAX_INPUT_NORM,
    Output,
    Settings,
    Task,
    shape_of,
    tasks,
)
from opacus_bpclip.audit.target import Target
from opacus_bpclip.audit.user_target import Inputs, model_target
from opacus_bpclip.audit.verdict import Verdict
from opacus_bpclip.config import Allocation, BackpropClipping, Bound
from opacus_bpclip.jobs.errors import JobError, UsageError
from opacus_bpclip.jobs.files import check_plot, check_writable
from opacus_bpclip.jobs.loading import load_object, made_by
from opacus_bpclip.jobs.records import require_resumable
from opacus_bpclip.jobs.values import require_at_least_one


def run_audits(settings: Settings, output: Output) -> Record:
    """Audit everything that the settings ask for; ``output.json`` is written after each target.

    Args:
        settings: what to audit.
        output: where to write; the page and the plot are left to the caller.

    Raises:
        UsageError: something is wrong that was found before anything ran.
        JobError: a target could not be audited; what was finished is in ``output.json``.
    """
    check(settings, output)
    record = Record(settings, tuple(tasks(settings)))
    if output.resume and output.json:
        record = records.resumed(record, output.json)
    open_tasks = [task for task in record.tasks if record.verdict(task) is None]
    processes = min(output.processes, len(open_tasks))
    done = (
        _one_by_one(settings, open_tasks)
        if processes <= 1
        else _side_by_side(settings, open_tasks, processes)
    )
    for task, verdict in done:
        record = record.with_verdict(task, verdict)
        if output.progress:
            finished = f"{len(record.verdicts)} of {len(record.tasks)}"
            print(f"{finished}  {task.name}: {verdict.outcome}", file=sys.stderr)
        records.keep(record, output.json)
    records.keep(record, output.json)
    return record


def check(settings: Settings, output: Output) -> None:
    """Find what would otherwise fail only later.

    Raises:
        UsageError: a package is missing, a file cannot be written, or the user's own code cannot be
            loaded.
    """
    require_resumable(output.resume, output.json)
    require_at_least_one("--processes", output.processes)
    check_plot(output.plot)
    check_writable(json=output.json, markdown=output.markdown, plot=output.plot)
    if settings.target or settings.model:
        build(settings, tasks(settings)[0])


def run_task(settings: Settings, task: Task) -> Verdict:
    """Audit one target on one thread: on more, steps this small are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return audit(
            build(settings, task),
            noise_multiplier=settings.noise_multiplier,
            trials=task.trials,
            alpha=settings.alpha,
            delta=settings.delta,
            seed=task.seed(settings.seed),
        )
    except JobError:
        raise
    except Exception as error:
        # The user's own code may raise anything; across processes only text travels well.
        text = " ".join(str(error).split())
        raise JobError(f"{task.name} cannot be audited: {type(error).__name__}: {text}") from error
    finally:
        torch.set_num_threads(threads)


def build(settings: Settings, task: Task) -> Target:
    """Make what a task audits.

    Raises:
        UsageError: the user's own code cannot be loaded, or makes something else.
    """
    try:
        if settings.target:
            return _loaded_target(settings.target)
        if task.case is None:
            return _loaded_model(settings, task)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return CASES[task.case].target(
        task.name,
        loss_reduction=cast(Reduction, task.loss_reduction),
        max_grad_norm=settings.max_grad_norm,
        clipping=clipping_of(settings, task),
    )


def clipping_of(settings: Settings, task: Task) -> BackpropClipping:
    """Return the options that a task is audited with."""
    max_input_norm = settings.max_input_norm
    if max_input_norm == "usual":
        clips = task.bound == "product" or task.allocation != "joint"
        max_input_norm = MAX_INPUT_NORM if clips else None
    return BackpropClipping(
        allocation=cast(Allocation, task.allocation),
        bound=cast(Bound, task.bound),
        max_input_norm=max_input_norm,
    )


def _loaded_target(path: str) -> Target:
    found = made_by(path)
    if not isinstance(found, Target):
        raise ValueError(
            f"{path} makes a {type(found).__name__}, not an opacus_bpclip.audit.Target"
        )
    return found


def _loaded_model(settings: Settings, task: Task) -> Target:
    assert settings.model is not None
    path = settings.model

    def make_model() -> nn.Module:
        model = made_by(path)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{path} makes a {type(model).__name__}, not a torch.nn.Module")
        return model

    target = model_target(
        task.name,
        make_model,
        _inputs(settings),
        loss=load_object(settings.loss) if settings.loss else None,
        loss_reduction=task.loss_reduction,
        max_grad_norm=settings.max_grad_norm,
        clipping=clipping_of(settings, task),
    )
    target.make(settings.noise_multiplier)  # refusals of the model come before any work
    return target


def _inputs(settings: Settings) -> Inputs:
    assert settings.input is not None
    if ":" in settings.input:
        made: Inputs = load_object(settings.input)
        return made
    shape, vocabulary = shape_of(settings.input), settings.vocabulary

    def draw(count: int) -> Tensor:
        if vocabulary is not None:
            return torch.randint(vocabulary, (count, *shape))
        return torch.randn(count, *shape)

    return draw


def _end_with_parent() -> None:
    """Let a worker die with the process that wants its answer, however that one dies."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


Done = Iterator[tuple[Task, Verdict]]


def _one_by_one(settings: Settings, open_tasks: Iterable[Task]) -> Done:
    for task in open_tasks:
        yield task, run_task(settings, task)


def _side_by_side(settings: Settings, open_tasks: Sequence[Task], processes: int) -> Done:
    # The long ones first, so that none is left over for the end; the last case is the largest.
    order = sorted(enumerate(open_tasks), key=lambda pair: (-pair[1].trials, -pair[0]))
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        futures: dict[Future[Verdict], Task] = {
            pool.submit(run_task, settings, task): task for _, task in order
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise JobError(f"an audit's process died: {error}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
