"""A whole run: check everything, then one comparison after another, and keep what is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from opacus_bpclip.ab.models import count_parameters
from opacus_bpclip.bench import documents
from opacus_bpclip.bench import record as records
from opacus_bpclip.bench.cases import build
from opacus_bpclip.bench.measure import peak_memory, step_times
from opacus_bpclip.bench.record import Record
from opacus_bpclip.bench.results import ArmResult, Comparison
from opacus_bpclip.bench.settings import Output, Point, Settings, is_compiled
from opacus_bpclip.jobs.child import call_in_child
from opacus_bpclip.jobs.errors import ChildError
from opacus_bpclip.jobs.extras import require_device
from opacus_bpclip.jobs.files import check_plot, check_writable

# One thread of the compiler's own: its processes would take time from a step that is measured.
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# glibc learns from what is freed which sizes to keep for the process. Whether it has, and so if
# an arm pages its tensors in anew in each step, is chance. These are the values it ends up with.
_TIME_ENVIRONMENT = {
    **_ENVIRONMENT,
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# With a fixed threshold glibc gives every tensor of some size back when it is freed, so the
# process's memory is the tensors'.
_MEMORY_ENVIRONMENT = {**_ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}


def measure(todo: Sequence[Point], settings: Settings, output: Output) -> Record:
    """Measure points, and add them to the record of ``output.from_json``.

    ``output.json`` is written after every point, and without any, too.

    Raises:
        UsageError: something is wrong that was found before anything was measured.
        ChildError: a measuring process died.
    """
    check(settings, output)
    record = records.read(output.from_json) if output.from_json else Record()
    if todo:
        record = records.continued(record, records.circumstances(settings))
    for point in todo:
        record = record.with_comparison(compare(point, settings, progress=output.progress))
        if output.json:
            records.write(record, output.json)
    if output.json and not todo:
        records.write(record, output.json)
    return record


def compare(point: Point, settings: Settings, *, progress: bool = False) -> Comparison:
    """Measure one point: each eager arm's memory by itself, then the times of all together.

    Raises:
        ChildError: the process that takes the times died.
    """
    results = {arm: ArmResult(arm, peaks=None) for arm in settings.arms}
    for arm in settings.arms:
        # A compiled arm's process is full of the compiler, whose memory is not the step's.
        if not is_compiled(arm):
            results[arm] = _memory(arm, point, settings, progress)
    for compiled in (False, True):
        running = [
            arm
            for arm in settings.arms
            if is_compiled(arm) == compiled and results[arm].failure is None
        ]
        if running:
            _say(progress, point, f"time of {', '.join(running)}")
            _add_times(results, running, point, settings)
    return Comparison(point, _count_parameters(point), tuple(results.values()))


def check(settings: Settings, output: Output) -> None:
    """Find what would otherwise fail only after measuring.

    Raises:
        UsageError: a package or the device is missing, or a file cannot be written.
    """
    require_device(settings.device)
    check_plot(output.plot)
    check_writable(json=output.json, markdown=output.markdown, plot=output.plot)
    for path in output.update:
        # What has no block would be found out only after everything is measured.
        documents.read(path, Record())


def _memory(arm: str, point: Point, settings: Settings, progress: bool) -> ArmResult:
    _say(progress, point, f"memory of {arm}")
    try:
        peaks = call_in_child(
            peak_memory, arm, point.case, settings, environment=_MEMORY_ENVIRONMENT
        )
    except ChildError as error:
        return ArmResult(arm, failure=str(error))
    return ArmResult(arm, peaks=None if peaks is None else tuple(peaks))


def _add_times(
    results: dict[str, ArmResult], arms: Sequence[str], point: Point, settings: Settings
) -> None:
    for share in settings.shares():
        running = [arm for arm in arms if results[arm].failure is None]
        if not running:
            return
        times = call_in_child(step_times, running, point.case, share, environment=_TIME_ENVIRONMENT)
        for arm, found in times.items():
            if isinstance(found, str):
                results[arm] = ArmResult(arm, failure=found)
            else:
                results[arm] = replace(results[arm], seconds=(*results[arm].seconds, *found))


def _count_parameters(point: Point) -> int:
    with torch.device("meta"):
        return count_parameters(build(point.case))


def _say(progress: bool, point: Point, text: str) -> None:
    if progress:
        sizes = {"batch": point.case.batch_size, **point.case.sizes}
        described = ", ".join(f"{name} {value}" for name, value in sizes.items())
        print(f"{point.name} ({described}): {text}", file=sys.stderr, flush=True)
