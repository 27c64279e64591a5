"""Noise in place: every entry of every gradient gets its own, in whatever layout."""

import pytest
import torch

from opacus_bpclip.optimizer import noise
from opacus_bpclip.optimizer.noise import add_noise_, with_own_memory
from tests.devices import device


@pytest.fixture(autouse=True)
def _on_the_device():
    with device():
        yield


def _entries_of_a_draw(monkeypatch, entries):
    monkeypatch.setattr(noise, "_DRAW", entries)
    monkeypatch.setattr(noise, "_LARGE_DRAW", entries)


def _draw(gradients, std=2.0, **options):
    generator = torch.Generator(device()).manual_seed(3)
    add_noise_(gradients, std=std, generator=generator, **{"secure_mode": False} | options)


@pytest.mark.parametrize("secure_mode", [False, True])
def test_entries_of_large_and_small_gradients_are_all_noised_once(monkeypatch, secure_mode):
    _entries_of_a_draw(monkeypatch, 64)
    gradients = [torch.zeros(shape) for shape in [(3,), (40, 50), (), (5, 1), (0,), (64,), (65,)]]
    gradients.append(torch.zeros(30, dtype=torch.float64))
    _draw(gradients, secure_mode=secure_mode)
    drawn = torch.cat([g.flatten().double() for g in gradients])
    assert len(drawn) == 3 + 2000 + 1 + 5 + 0 + 64 + 65 + 30
    assert drawn.all()
    # In float32 a pair of draws may be equal by chance; a piece drawn twice would be 64 pairs.
    assert len(drawn.unique()) > len(drawn) - 10
    assert abs(drawn.std() / 2.0 - 1) < 5 / (2 * len(drawn)) ** 0.5


def test_noise_is_added_to_what_is_there():
    gradients, zeros = [torch.arange(6.0).view(2, 3)], [torch.zeros(2, 3)]
    _draw(gradients)
    _draw(zeros)
    assert torch.equal(gradients[0], torch.arange(6.0).view(2, 3) + zeros[0])


def test_a_gradient_in_another_order_of_axes_is_noised_in_place():
    gradient = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    _draw([gradient])
    assert len(gradient.unique()) == 120


def test_small_gradients_share_a_draw(monkeypatch):
    sizes, draw = [], noise._noise

    def spy(room, *args, **options):
        sizes.append(room.numel())
        return draw(room, *args, **options)

    _entries_of_a_draw(monkeypatch, 10)
    monkeypatch.setattr(noise, "_noise", spy)
    _draw([torch.zeros(4), torch.zeros(5), torch.zeros(23)])
    assert sizes == [9, 10, 10, 3]


def test_without_noise_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(noise, "_noise", lambda *_, **__: pytest.fail("drawn"))
    _draw([torch.zeros(3)], std=0.0)


def test_gradients_that_share_memory_are_parted():
    shared = torch.zeros(6)
    part, whole = torch.zeros(8)[:6], torch.zeros(2)
    expanded = torch.zeros(1).expand(4)
    own = with_own_memory([shared, shared.view(2, 3), part, expanded, whole])
    assert own[0] is shared
    assert own[4] is whole
    _draw(own)
    assert len(torch.cat([g.flatten() for g in own]).unique()) == 6 + 6 + 6 + 4 + 2
    assert [g.shape for g in own] == [(6,), (2, 3), (6,), (4,), (2,)]


def test_an_accelerator_draws_for_all_gradients_at_once(monkeypatch):
    sizes = []
    monkeypatch.setattr(noise, "_noise", lambda room, *_, **__: sizes.append(len(room)) or room)
    large = 2 * noise._DRAW
    gradients = [torch.zeros(shape, device="meta") for shape in [(3,), (large,), (4, 5)]]
    add_noise_(gradients, std=1.0, generator=None, secure_mode=False)
    assert sizes == [3 + large + 20]
