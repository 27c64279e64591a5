"""A whole run: check everything, then one comparison after another."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter

import torch

from opacus_bpclip.ab.models import count_parameters
from opacus_bpclip.bench.cases import build
from opacus_bpclip.bench.documents import updated
from opacus_bpclip.bench.measure import (
    MEMORY_ENVIRONMENT,
    TIME_ENVIRONMENT,
    peak_memory,
    step_times,
)
from opacus_bpclip.bench.plot import draw
from opacus_bpclip.bench.report import tables
from opacus_bpclip.bench.results import ArmResult, BenchRecord, Comparison
from opacus_bpclip.bench.settings import Arm, BenchOutput, Key, Point, Settings, is_compiled
from opacus_bpclip.jobs.errors import ChildError, UsageError
from opacus_bpclip.jobs.extras import require_device
from opacus_bpclip.jobs.files import write_whole
from opacus_bpclip.jobs.processes import call_in_child
from opacus_bpclip.jobs.running import Job, View

# One thread of the compiler's own: its processes would take time from a step that is measured.
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


class Bench(Job[BenchRecord]):
    """Comparisons of training steps.

    Args:
        settings: what to measure, and how.
        output: where to read and write.
    """

    view = View("Benchmarks", tables, draw, attrgetter("point.title"))

    def __init__(self, settings: Settings, output: BenchOutput) -> None:
        self._settings, self._output = settings, output
        given = settings.model_fields_set
        # A results file alone is only rendered.
        self._measures = not output.from_json or bool(given & {"case", "growth"})
        if given and not self._measures:
            raise UsageError(f"--{min(given)} with --from-json needs --case or --growth")
        if output.resume and output.from_json:
            raise UsageError(
                "--resume and --from-json are two ways to start from results: give one"
            )
        if output.plot and settings.growth is None and output.from_json is None:
            raise UsageError("--plot draws growth curves: it needs --growth or --from-json")

    def check(self) -> None:
        """Find out whether the device and the documents' blocks are there."""
        require_device(self._settings.device)
        empty = BenchRecord.new(self._settings, self._settings.device)
        for path in self._output.update:
            updated(path, empty)

    def begin(self) -> BenchRecord:
        """Return what ``--from-json`` holds, if measurements may be added to it."""
        new = BenchRecord.new(self._settings, self._settings.device)
        if self._output.from_json is None:
            return new
        held = BenchRecord.read(self._output.from_json)
        if not self._measures:
            return held
        refusal = "cannot add to the results in --from-json"
        return new.continued(held, refusal, free=BenchRecord.free_beside)

    def todo(self, record: BenchRecord) -> Sequence[Key]:
        """Return what is missing; what is added to ``--from-json`` is always measured."""
        if self._output.from_json is None:
            return super().todo(record)
        return record.wanted if self._measures else ()

    def measure(self, record: BenchRecord, todo: Sequence[Key]) -> Iterator[Comparison]:
        """Compare point after point."""
        for point in self._settings.points:
            if point.key in todo:
                yield compare(point, self._settings, progress=self._output.progress)

    def deliver(self, record: BenchRecord) -> None:
        """Rewrite the documents' blocks."""
        for path in self._output.update:
            write_whole(path, updated(path, record))


def compare(point: Point, settings: Settings, *, progress: bool = False) -> Comparison:
    """Measure one point: each eager arm's memory by itself, then the times of all together.

    Raises:
        ChildError: the process that takes the times died.
    """
    # A compiled arm's process is full of the compiler, whose memory is not the step's.
    results = {
        arm: ArmResult(arm, peaks=None)
        if is_compiled(arm)
        else _memory(arm, point, settings, progress)
        for arm in settings.arms
    }
    for compiled in (False, True):
        running = [
            arm
            for arm, found in results.items()
            if is_compiled(arm) == compiled and found.failure is None
        ]
        if running:
            _say(progress, point, f"time of {', '.join(running)}")
            _add_times(results, running, point, settings)
    with torch.device("meta"):
        parameters = count_parameters(build(point.case))
    return Comparison(point=point, parameters=parameters, arms=tuple(results.values()))


def _memory(arm: Arm, point: Point, settings: Settings, progress: bool) -> ArmResult:
    _say(progress, point, f"memory of {arm}")
    environment = {**_ENVIRONMENT, **MEMORY_ENVIRONMENT}
    try:
        peaks = call_in_child(peak_memory, arm, point.case, settings, environment=environment)
    except ChildError as error:
        return ArmResult(arm, failure=str(error))
    return ArmResult(arm, peaks=peaks)


def _add_times(
    results: dict[Arm, ArmResult], arms: Sequence[Arm], point: Point, settings: Settings
) -> None:
    environment = {**_ENVIRONMENT, **TIME_ENVIRONMENT}
    for share in settings.shares:
        running = [arm for arm in arms if results[arm].failure is None]
        if not running:
            return
        times = call_in_child(step_times, running, point.case, share, environment=environment)
        for arm, found in times.items():
            if isinstance(found, str):
                results[arm] = ArmResult(arm, failure=found)
            else:
                results[arm] = replace(results[arm], seconds=(*results[arm].seconds, *found))


def _say(progress: bool, point: Point, text: str) -> None:
    if progress:
        print(f"{point.title}: {text}", file=sys.stderr, flush=True)
