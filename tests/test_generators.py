"""Generators that are made apart or anew begin in states that no other one has."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy import stats

from opacus_bpclip.guard import streams
from opacus_bpclip.guard.generators import apart, are_alike, fresh, renewed
from opacus_bpclip.guard.seeds import Purpose
from tests.resuming import Script

CPU = torch.device("cpu")


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(generator: torch.Generator, count: int = 8) -> tuple[float, ...]:
    return tuple(torch.rand(count, generator=generator).tolist())


@pytest.fixture(params=["known", "unknown"], autouse=True)
def _state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with the whole state of a CPU's generator, and as where its form is unknown."""
    if request.param == "unknown":
        monkeypatch.setattr(streams, "_state_is_known", lambda: False)


def test_purposes_and_numbers_are_told_apart_and_come_back() -> None:
    def all_apart(generator: torch.Generator) -> list[tuple[float, ...]]:
        state, drawn = generator.get_state(), []
        for purpose, number in product(Purpose, range(5)):
            generator.set_state(state)
            drawn.append(numbers(apart(generator, CPU, purpose, number)))
        return drawn

    first, other = all_apart(seeded()), all_apart(seeded(4))
    assert first == all_apart(seeded())
    assert len({*first, *other, numbers(seeded()), numbers(seeded(4))}) == 22


def test_streams_of_one_generator_are_not_those_of_another_use() -> None:
    of_noise = {numbers(stream) for stream in streams.streams(seeded(), 9)}
    apart_from = {numbers(apart(seeded(), CPU, p, n)) for p, n in product(Purpose, range(9))}
    assert not of_noise & apart_from


def test_without_a_generator_torchs_own_is_asked() -> None:
    torch.manual_seed(3)
    one = apart(None, CPU, Purpose.NOISE, 1)
    assert numbers(one) == numbers(apart(seeded(), CPU, Purpose.NOISE, 1))


def test_what_is_made_anew_never_comes_back_whatever_the_seed() -> None:
    drawn = set()
    for _ in range(5):
        torch.manual_seed(3)
        drawn |= {numbers(fresh(CPU)), numbers(renewed(seeded(), CPU)), numbers(renewed(None, CPU))}
    assert len(drawn) == 15


def test_a_generator_is_renewed_in_place() -> None:
    generator = seeded()
    assert renewed(generator, CPU) is generator
    assert not are_alike(generator, seeded())


def test_fresh_numbers_are_uniform() -> None:
    drawn = torch.cat([torch.rand(50, generator=fresh(CPU)) for _ in range(100)])
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-4


def test_generators_of_one_seed_are_alike_unless_they_are_one() -> None:
    torch.manual_seed(4)
    one, other = seeded(), seeded()
    assert are_alike(one, other)
    assert not are_alike(one, one)
    assert not are_alike(None, None)
    assert not are_alike(one, None)
    assert not are_alike(one, seeded(4))
    numbers(other)
    assert are_alike(one, other)  # one will draw what the other has drawn
    torch.manual_seed(3)
    torch.rand(5)
    assert are_alike(one, None)
    assert not are_alike(fresh(CPU), fresh(CPU))
    one.set_state(seeded(5).get_state())
    assert are_alike(one, seeded(5))


@pytest.mark.parametrize("seeded", [0, 1])
def test_torchs_generator_and_one_with_its_seed_are_told_apart(seeded: int) -> None:
    # `Script` seeds torch's generator with 0, and its model draws from it.
    def run() -> Script:
        own = torch.Generator().manual_seed(0)
        return Script(generators=[None, own] if seeded else [own, None]).train()

    one, again = run(), run()
    used = one.optimizer.generator, one.loader.generator
    assert len({(own or torch.default_generator).initial_seed() for own in used}) == 2
    assert one.samples == again.samples
    torch.testing.assert_close(one.noise, again.noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_initial_weights_tell_neither_samples_nor_noise(seed: int) -> None:
    # `Script` seeds torch's generator with 0, as is done to repeat a run.
    own = [torch.Generator().manual_seed(seed) for _ in range(2)]
    script = Script(generators=own)
    drawn = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    for number, used in enumerate((script.optimizer.generator, script.loader.generator)):
        same = torch.equal(torch.rand(9, generator=used), drawn)
        # Other seeds stay as they are; noise and samples of one seed are told apart as well.
        assert same == (seed == 1 and number == 1)
