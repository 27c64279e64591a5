"""What is counted: rounds of all arms in changing order, and everything that a step holds."""

import gc

import pytest
import torch

from opacus_bpclip.bench import measure
from opacus_bpclip.bench.measure import peak_memory, step_times, tensor_bytes
from opacus_bpclip.bench.settings import LEAST_ROUNDS, Settings
from tests.bench.tiny import tiny

MEBIBYTE = 2**20
ONE = Settings(processes=1, rounds=2)


@pytest.fixture(autouse=True)
def small_heap():
    """Set aside what pytest holds: in a process of its own it would not be there to collect."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def test_every_arm_is_measured_on_every_device_that_is_there(device):
    settings = ONE.replace(device=device)
    times = step_times(("non-private", "joint-exact"), tiny("mlp"), settings)
    assert {arm: len(own) for arm, own in times.items()} == {"non-private": 2, "joint-exact": 2}
    assert min(map(min, times.values())) > 0
    assert min(peak_memory("joint-exact", tiny("mlp"), settings)) > 0


def test_order_changes_and_a_round_has_every_arm_that_runs_once(monkeypatch):
    steps = []

    def make(arm, *_):
        if arm == "d":
            raise RuntimeError("cannot do this")
        return lambda: steps.append(arm)

    monkeypatch.setattr(measure, "make_step", make)
    times = step_times("abcd", tiny("mlp"), ONE.replace(rounds=20))
    assert times["d"].startswith("RuntimeError: cannot do this (raised at ")
    counted = steps[3 * measure.WARM_UP_STEPS :]
    rounds = [tuple(counted[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(own) == ["a", "b", "c"] for own in rounds)
    assert len(set(rounds)) == 6
    assert gc.isenabled()


def test_limit_ends_rounds_but_not_before_the_least_number(monkeypatch):
    monkeypatch.setattr(measure, "make_step", lambda *_: lambda: None)
    times = step_times("a", tiny("mlp"), ONE.replace(rounds=20, limit=0.0))
    assert len(times["a"]) == LEAST_ROUNDS


def test_peak_counts_what_is_held_and_what_comes_and_goes(monkeypatch):
    held = torch.ones(8 * MEBIBYTE)
    monkeypatch.setattr(measure, "make_step", lambda *_: lambda: (held + 1).sum().item())
    peaks = peak_memory("non-private", tiny("mlp"), ONE)
    assert len(peaks) == measure.MEMORY_STEPS
    assert min(peaks) >= 60 * MEBIBYTE


def test_peak_is_unknown_where_the_platform_does_not_tell(monkeypatch):
    monkeypatch.setattr(measure.PeakMemory, "_high_water_mark", lambda self: None)
    assert peak_memory("non-private", tiny("mlp"), ONE) is None


def test_tensor_bytes_counts_each_storage_once():
    before = tensor_bytes()
    whole = torch.zeros(1000, requires_grad=True)
    part = whole.detach()[:10]
    assert tensor_bytes() - before == 4000
    whole.sum().backward()
    assert tensor_bytes() - before == 8000
    del whole, part
    assert tensor_bytes() == before
