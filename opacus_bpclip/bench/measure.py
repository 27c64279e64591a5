"""The measurements themselves; each function runs in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from opacus_bpclip.bench.arms import Step, make_step
from opacus_bpclip.bench.settings import Arm, Case, Settings, is_compiled
from opacus_bpclip.jobs.errors import in_one_line
from opacus_bpclip.jobs.memory import PeakMemory
from opacus_bpclip.jobs.quiet import known_warnings_silenced

Name = TypeVar("Name", bound=str)

# The first steps allocate, compile and page in; they are not what a step costs.
WARM_UP_STEPS = 2
# Each watched step gives one peak.
MEMORY_STEPS = 3

# What the processes start with.
# glibc learns from what is freed which sizes to keep for the process. Whether it has, and so if
# an arm pages its tensors in anew in each step, is chance. These are the values it ends up with.
TIME_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
# With a fixed threshold glibc gives every tensor of some size back when it is freed, so the
# process's memory is the tensors'.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(64 * 2**10)}


def peak_memory(arm: Arm, case: Case, settings: Settings) -> tuple[int, ...] | None:
    """Return the peak of each of some steps, in bytes: everything that is there for training.

    That is what tensors hold between steps (parameters, gradients, batch) plus the growth of the
    process, or of torch's memory on a GPU, during the step.

    Returns:
        None where the platform does not tell.
    """
    with known_warnings_silenced():
        return peaks_of(_warm_step(arm, case, settings), torch.device(settings.device))


def peaks_of(step: Step, device: torch.device, steps: int = MEMORY_STEPS) -> tuple[int, ...] | None:
    """Return the peaks of steps of one arm, as `peak_memory` does; the first steps are over."""
    gc.collect()
    held = tensor_bytes()
    peaks: list[int] = []
    for _ in range(steps):
        _return_free_memory()
        memory = PeakMemory(device)
        with memory.watch():
            step()
        if memory.bytes is None:
            return None
        peaks.append(held + memory.bytes)
    return tuple(peaks)


def tensor_bytes() -> int:
    """Return the bytes of all tensors that Python can reach, each storage once."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        # Not the compiler's stand-ins, subclasses that have no memory and refuse to tell.
        if type(thing) not in (torch.Tensor, torch.nn.Parameter):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def step_times(
    arms: Sequence[Arm], case: Case, settings: Settings
) -> dict[Arm, tuple[float, ...] | str]:
    """Return the seconds of each round's step, or why an arm does not run, by arm."""
    steps: dict[Arm, Step] = {}
    failures: dict[Arm, tuple[float, ...] | str] = {}
    for arm in arms:
        try:
            steps[arm] = _warm_step(arm, case, settings)
        except Exception as error:
            failures[arm] = in_one_line(error)
    least, limit = settings.least_rounds, settings.limit
    return failures | paired_seconds(
        steps, settings.device, settings.rounds, least=least, limit=limit
    )


def paired_seconds(
    steps: Mapping[Name, Step],
    device: str,
    rounds: int,
    *,
    least: int = 1,
    limit: float = math.inf,
) -> dict[Name, tuple[float, ...]]:
    """Return the seconds of each round's step by arm; the first steps are over.

    Every round takes one step of each arm, in an order of its own, so that no arm always follows
    the same one and a slow moment of the machine hits all of them.

    Args:
        steps: of each arm.
        device: where they run.
        rounds: the most rounds.
        least: the fewest rounds.
        limit: seconds after which no round starts that is not among these.
    """
    seconds: dict[Name, list[float]] = {arm: [] for arm in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    with known_warnings_silenced(), _no_garbage_collection():
        start = time.monotonic()
        for index in range(rounds):
            if index >= least and time.monotonic() - start > limit:
                break
            shuffle(order)
            for arm in order:
                seconds[arm].append(_seconds(steps[arm], device))
            gc.collect()
    return {arm: tuple(own) for arm, own in seconds.items()}


def _warm_step(arm: Arm, case: Case, settings: Settings) -> Step:
    torch.set_num_threads(settings.threads)
    with known_warnings_silenced():
        if is_compiled(arm):
            # The compiler's own deprecations and hints.
            warnings.simplefilter("ignore")
        step = make_step(arm, case, torch.device(settings.device), settings.precision)
        for _ in range(WARM_UP_STEPS):
            step()
    return step


def _seconds(step: Step, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the steps: it would run in whichever comes at the time.

    What is there already is set aside, so that collecting between rounds takes no time either.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _return_free_memory() -> None:
    """Give what the C library keeps back to the system, where it can, so that growth is seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
