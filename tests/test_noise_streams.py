"""Noise from several streams has the law of noise from one, whatever draws it, and comes back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise
from scipy import stats
from torch import Tensor, nn

from opacus_bpclip.guard import streams
from opacus_bpclip.optimizer import noise
from opacus_bpclip.optimizer.noise import add_noise_
from tests.helpers import make_private
from tests.helpers import noise as noise_of

STREAM = 12_000


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make streams of 12,000 entries, 24 of them for `drawn`."""
    monkeypatch.setattr(noise, "_DRAW", 1000)
    monkeypatch.setattr(noise, "_DRAWS", 12)


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(
    generator: torch.Generator | None, *, std: float = 1.0, secure: bool = False, threads: int = 1
) -> Tensor:
    gradients = [torch.zeros(shape) for shape in [(3,), (200_000,), (45, 997), (7, 5), (43_000,)]]
    with on_threads(threads):
        add_noise_(gradients, std=std, generator=generator, secure_mode=secure)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("threads", [2, 5])
def test_the_noise_is_the_same_for_any_number_of_threads(threads: int) -> None:
    one, several = seeded(), seeded()
    for _ in range(2):
        assert torch.equal(drawn(several, threads=threads), drawn(one))
    assert torch.equal(one.get_state(), several.get_state())


def test_the_noise_has_its_law_over_all_streams() -> None:
    sample = drawn(seeded(), std=3.0, threads=2).double().numpy() / 3.0
    assert stats.kstest(sample, "norm").pvalue > 0.01
    for wrong in (0.98, 1.02):
        assert stats.kstest(sample * wrong, "norm").pvalue < 1e-4


def test_streams_are_independent_of_each_other_and_of_other_steps() -> None:
    generator = seeded()
    rows = [drawn(generator, threads=2)[: 20 * STREAM].double().view(20, STREAM) for _ in range(3)]
    table = torch.corrcoef(torch.cat(rows)).fill_diagonal_(0)
    # Six standard errors, over 1,770 pairs.
    assert table.abs().max() < 6 / STREAM**0.5
    assert len(torch.cat(rows).unique()) > 0.98 * 60 * STREAM  # float32 has few numbers near 1


def test_two_seeds_give_other_noise() -> None:
    assert not (drawn(seeded(3)) == drawn(seeded(4))).float().mean() > 1e-3


def test_a_generator_set_back_gives_the_same_noise_again() -> None:
    generator = seeded()
    drawn(generator)
    state = generator.get_state()
    first = drawn(generator, threads=2)
    generator.set_state(state)
    assert torch.equal(drawn(generator), first)
    assert not torch.equal(drawn(generator), first)


def test_without_a_generator_the_noise_comes_from_torchs_own() -> None:
    torch.manual_seed(7)
    first = drawn(None, threads=2)
    torch.manual_seed(7)
    assert torch.equal(drawn(None), first)
    assert torch.equal(drawn(seeded(7)), first)


def test_small_models_draw_from_the_generator_itself() -> None:
    one = torch.zeros(999)
    add_noise_([one], std=2.0, generator=seeded(), secure_mode=False)
    assert torch.equal(one, torch.normal(0, 2.0, (999,), generator=seeded()))


def test_secure_mode_draws_from_the_generator_alone_as_opacus_does() -> None:
    own, opacus = torch.zeros(25_000), seeded()
    with on_threads(2):
        add_noise_([own], std=2.0, generator=seeded(), secure_mode=True)
    pieces = [
        _generate_noise(2.0, piece, generator=opacus, secure_mode=True) for piece in own.split(1000)
    ]
    assert torch.equal(own, torch.cat(pieces))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    calls, draw = [], noise._noise

    def failing(room: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(len(room))
        if len(calls) == 30:
            raise RuntimeError("out of memory, say")
        return draw(room, *args, **options)

    monkeypatch.setattr(noise, "_noise", failing)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        drawn(seeded(), threads=threads)


def test_a_failed_draw_releases_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    private = make_private(nn.Linear(300, 100), noise_multiplier=1.0)

    def failing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(noise, "_noise", failing)
    before = [p.detach().clone() for p in private.parameters]
    with on_threads(2), pytest.raises(RuntimeError, match="out of memory, say"):
        private.optimizer.step()
    assert all(p.grad is None for p in private.parameters)
    assert all(torch.equal(p, old) for p, old in zip(private.parameters, before, strict=True))


def test_copies_of_an_optimizer_never_draw_the_same_noise() -> None:
    private = make_private(
        nn.Linear(300, 100), noise_multiplier=1.0, noise_generator=seeded(), poisson_sampling=False
    )
    copied = copy.deepcopy(private.optimizer)
    private.optimizer.step()
    first = noise_of(private)
    for p in private.parameters:
        p.grad = None
    copied.step()
    second = torch.cat([p.grad.flatten() for p in copied.params])
    assert (first == second).float().mean() < 1e-3


def test_streams_have_whole_states_of_their_own() -> None:
    generator = seeded()
    made = [streams.streams(generator, 5) for _ in range(3)]
    assert all(each[0] is generator for each in made)
    states = torch.stack([s.get_state()[24 : 24 + 8 * 624] for each in made for s in each[1:]])
    words = states.contiguous().view(torch.int64)
    # Of 7,488 words of 32 bits none or very few are equal by chance.
    assert len(words.unique()) > words.numel() - 5
    assert words.min() >= 0
    assert words.max() < 2**32
    assert streams.streams(generator, 1) == [generator]


def test_a_stream_is_numpys_mersenne_twister() -> None:
    words = np.random.SeedSequence(5).generate_state(624)
    numbers = torch.rand(2000, generator=streams._with_words(words))
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    assert (numbers.numpy() * 2**24 == twister.random_raw(2000) % 2**24).all()


@pytest.mark.parametrize("size", ["another", "the same"])
def test_where_torchs_states_have_another_form_one_stream_draws_all(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    def with_words(words: np.ndarray) -> torch.Generator:
        if size == "another":
            raise RuntimeError("RNG state is wrong size")
        return seeded()

    streams._state_is_known.cache_clear()
    monkeypatch.setattr(streams, "_with_words", with_words)
    try:
        generator = seeded()
        assert streams.streams(generator, 5) == [generator]
        own = drawn(seeded(), threads=2)
    finally:
        streams._state_is_known.cache_clear()
    monkeypatch.setattr(noise, "_DRAWS", 10**6)
    assert torch.equal(own, drawn(seeded()))
