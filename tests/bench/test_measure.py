"""What is counted: rounds of all arms in changing order, and everything that a step holds."""

import gc

import pytest
import torch

from opacus_bpclip.bench import measure
from opacus_bpclip.bench.measure import peak_memory, step_times, tensor_bytes
from opacus_bpclip.bench.settings import LEAST_ROUNDS, Settings, Share
from tests.bench.tiny import tiny

MEBIBYTE = 2**20


def test_every_arm_has_a_time_for_every_round():
    times = step_times(("non-private", "joint-exact"), tiny("mlp"), Settings(), Share(rounds=2))
    assert {arm: len(own) for arm, own in times.items()} == {"non-private": 2, "joint-exact": 2}
    assert min(map(min, times.values())) > 0


def test_order_changes_and_a_round_has_every_arm_once(monkeypatch):
    steps = []
    monkeypatch.setattr(measure, "make_step", lambda arm, *_: lambda: steps.append(arm))
    step_times("abc", tiny("mlp"), Settings(), Share(rounds=20))
    counted = steps[3 * measure.WARM_UP_STEPS :]
    rounds = [tuple(counted[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(own) == ["a", "b", "c"] for own in rounds)
    assert len(set(rounds)) == 6
    assert gc.isenabled()


def test_limit_ends_rounds_but_not_before_the_least_number(monkeypatch):
    monkeypatch.setattr(measure, "make_step", lambda *_: lambda: None)
    times = step_times("a", tiny("mlp"), Settings(), Share(rounds=20, limit=0.0))
    assert len(times["a"]) == LEAST_ROUNDS


def test_arm_that_fails_is_a_reason_and_no_reason_to_stop(monkeypatch):
    def make(arm, *_):
        if arm == "a":
            raise RuntimeError("cannot do this")
        return lambda: None

    monkeypatch.setattr(measure, "make_step", make)
    times = step_times("ab", tiny("mlp"), Settings(), Share(rounds=2))
    assert times["a"].startswith("RuntimeError: cannot do this (raised at ")
    assert len(times["b"]) == 2


def test_peak_counts_what_is_held_and_what_comes_and_goes(monkeypatch):
    held = torch.ones(8 * MEBIBYTE)

    def make(*_):
        return lambda: (held + 1).sum().item()

    monkeypatch.setattr(measure, "make_step", make)
    peaks = peak_memory("non-private", tiny("mlp"), Settings())
    assert len(peaks) == measure.MEMORY_STEPS
    assert min(peaks) >= 60 * MEBIBYTE


def test_peak_is_unknown_where_the_platform_does_not_tell(monkeypatch):
    monkeypatch.setattr(measure.PeakMemory, "_high_water_mark", lambda self: None)
    assert peak_memory("non-private", tiny("mlp"), Settings()) is None


def test_tensor_bytes_counts_each_storage_once():
    before = tensor_bytes()
    whole = torch.zeros(1000, requires_grad=True)
    part = whole.detach()[:10]
    assert tensor_bytes() - before == 4000
    whole.sum().backward()
    assert tensor_bytes() - before == 8000
    del whole, part
    assert tensor_bytes() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
def test_measures_on_every_device_that_is_there(device):
    settings = Settings(device=device)
    assert min(peak_memory("joint-exact", tiny("mlp"), settings)) > 0
    assert len(step_times(("joint-exact",), tiny("mlp"), settings, Share(2))["joint-exact"]) == 2
