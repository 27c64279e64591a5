"""The measurements themselves; each function runs in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from opacus_bpclip.bench.arms import Step, make_step
from opacus_bpclip.bench.settings import Arm, Case, Settings, is_compiled
from opacus_bpclip.jobs.errors import in_one_line
from opacus_bpclip.jobs.memory import PeakMemory
from opacus_bpclip.jobs.quiet import known_warnings_silenced

# The first steps allocate, compile and page in; they are not what a step costs.
WARM_UP_STEPS = 2
# Each watched step gives one peak.
MEMORY_STEPS = 3


def peak_memory(arm: Arm, case: Case, settings: Settings) -> tuple[int, ...] | None:
    """Return the peak of each of some steps, in bytes: everything that is there for training.

    That is what tensors hold between steps (parameters, gradients, batch) plus the growth of the
    process, or of torch's memory on a GPU, during the step.

    Returns:
        None where the platform does not tell.
    """
    with known_warnings_silenced():
        step = _warm_step(arm, case, settings)
        gc.collect()
        held = tensor_bytes()
        peaks: list[int] = []
        for _ in range(MEMORY_STEPS):
            _return_free_memory()
            memory = PeakMemory(torch.device(settings.device))
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
    """Return the seconds of each round's step, or why an arm does not run, by arm.

    Every round takes one step of each arm, in an order of its own, so that no arm always follows
    the same one and a slow moment of the machine hits all of them.
    """
    steps: dict[Arm, Step] = {}
    failures: dict[Arm, tuple[float, ...] | str] = {}
    for arm in arms:
        try:
            steps[arm] = _warm_step(arm, case, settings)
        except Exception as error:
            failures[arm] = in_one_line(error)
    seconds: dict[Arm, list[float]] = {arm: [] for arm in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    with known_warnings_silenced(), _no_garbage_collection():
        start = time.monotonic()
        for index in range(settings.rounds):
            if index >= settings.least_rounds and time.monotonic() - start > settings.limit:
                break
            shuffle(order)
            for arm in order:
                seconds[arm].append(_seconds(steps[arm], settings.device))
            gc.collect()
    return failures | {arm: tuple(own) for arm, own in seconds.items()}


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
