"""Sequences sorted by length are found, and so are rows that are not whole examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.probe import Batch, find_coupling
from opacus_bpclip.probe.comparison import Companions, layouts
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence
from tests.helpers import CLASSES, FEATURES
from tests.order_models import ORDERS, ORDERS_OF_SEQUENCES, STEPS, Moved, refusal, turned
from tests.probing import made_up


class Sequences(nn.Module):
    """Reads sequences of several lengths; the lengths are passed, or read off the sequences."""

    def __init__(self, *, by_hand: bool, before: bool = False, kind: Any = DPLSTM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, FEATURES) if before else nn.Identity()
        self.rnn, self.head = kind(FEATURES, 5, batch_first=True), nn.Linear(5, CLASSES)
        self.by_hand = by_hand

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            lengths = (x != 0).any(dim=2).sum(dim=1).clamp(min=1)
        total = x.shape[1]
        if self.by_hand:
            order = lengths.argsort(descending=True, stable=True)
            packed = pack_padded_sequence(self.first(x[order]), lengths[order], batch_first=True)
        else:
            packed = pack_padded_sequence(
                self.first(x), lengths, batch_first=True, enforce_sorted=False
            )
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=total)
        return self.head((out[order.argsort()] if self.by_hand else out).sum(dim=1))


def sequences(lengths: bool) -> Batch:
    x = torch.zeros(2, STEPS, FEATURES)
    return made_up(x, torch.ones(2, dtype=torch.long)) if lengths else made_up(x)


def lengths_of(batch: Batch) -> Batch:
    """Return the batch with lengths that sequences can be packed by, none shorter than others."""
    return batch._replace(args=(batch.args[0], torch.full((batch.size,), STEPS)))


@pytest.mark.parametrize("kind", [DPLSTM, DPGRU])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("by_hand", [False, True])
def test_sorting_by_length_is_found_and_packing_does_not_need_it(
    by_hand: bool, passed: bool, before: bool, kind: Any
) -> None:
    model = Sequences(by_hand=by_hand, before=before, kind=kind)
    batch = lengths_of(sequences(True)) if passed else sequences(False)
    text = refusal(model, batch)
    assert bool(text) is by_hand
    if text:
        assert text.startswith("first (Linear)" if before else f"rnn ({kind.__name__})")
        assert "pack_padded_sequence(..., enforce_sorted=False)" in text


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("by", ORDERS_OF_SEQUENCES)
def test_layers_on_sequences_that_somebody_has_sorted_are_found(by: str, descending: bool) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            key = ORDERS_OF_SEQUENCES[by](x, mask)
            order = key.argsort(descending=descending, stable=True)
            return self.head(self.body(x[order])[order.argsort()])

    batch = made_up(torch.zeros(2, STEPS, FEATURES), torch.zeros(2, STEPS, dtype=torch.long))
    assert (refusal(Sorted(), batch) or "").startswith("body (Linear)")


@pytest.mark.parametrize("flipped", [False, True])
def test_what_goes_around_a_network_that_has_the_batch_second_is_found(flipped: bool) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = DPLSTM(FEATURES, 5), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(x.flip(1) if flipped else x)[0]
            return self.head(y.flip(1) if flipped else y)

    text = refusal(Around(), made_up(torch.zeros(STEPS, 2, FEATURES), axis=1)) or ""
    assert text.startswith("rnn (DPLSTM)") is flipped
    assert bool(text) is flipped


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_padding_of_ids_is_ragged(sort: bool, inplace: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(9, 5), nn.Linear(5, 5)
            self.act, self.head = nn.ReLU(inplace=inplace), nn.Linear(5, CLASSES)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            # Made-up masks have holes: there the last place counts.
            lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)
            order = lengths.argsort(descending=True, stable=True)
            back = order.argsort()
            h = self.table(ids)
            h = self.act(self.body(h[order] if sort else h))
            return self.head(h[back] if sort else h)

    ids = torch.zeros(2, STEPS, dtype=torch.long)
    text = refusal(Padded(), made_up(ids, ids.clone())) or ""
    assert text.startswith("body (Linear)") is sort
    assert bool(text) is sort


def private(model: nn.Module, data: Any, backprop: BackpropClipping | None = None) -> Any:
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data if isinstance(data, DataLoader) else DataLoader(data, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        **({} if backprop is None else {"backprop": backprop}),
    )


def ragged_data() -> TensorDataset:
    lengths = torch.randint(1, STEPS + 1, (32,), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.randn(32, STEPS, FEATURES), lengths, torch.zeros(32))


def test_lengths_are_made_up_before_training() -> None:
    with pytest.raises(CoverageError, match=r"rnn .* in another order"):
        private(Sequences(by_hand=True), ragged_data())


@pytest.mark.parametrize(
    ("by_hand", "backprop"),
    [(False, None), (True, layerwise()), (True, BackpropClipping(allocation="equal"))],
)
def test_both_remedies_train(by_hand: bool, backprop: BackpropClipping | None) -> None:
    torch.manual_seed(0)
    model, optimizer, loader = private(Sequences(by_hand=by_hand), ragged_data(), backprop)
    for x, lengths, _ in loader:
        if len(x):
            optimizer.zero_grad()
            model(x, lengths).square().mean().backward()
            optimizer.step()


def test_the_remedy_keeps_examples_apart() -> None:
    trainer = Trainer(Sequences(by_hand=False), (STEPS, FEATURES), BackpropClipping())
    torch.manual_seed(0)
    x, target = torch.randn(5, STEPS, FEATURES).double(), torch.randn(5, CLASSES).double()
    for row, length in enumerate((2, 6, 3, 5, 1)):
        x[row, length:] = 0
        target[row] *= 10.0 ** (3 * row - 6)
    check_independence(trainer, x, target)


class Odd(nn.Module):
    """Takes no made-up ids: only its real batches can be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(64, 5), nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        order = ids[:, 0].argsort()
        return self.head(self.table(ids[order] - 100))[order.argsort()].mean(dim=1)


@pytest.mark.parametrize("ids", [[100, 101, 102, 103, 104], [104, 103, 102, 101, 100]])
def test_the_first_batch_is_tried_where_none_can_be_made_up(ids: list[int]) -> None:
    # Also one that happens to be sorted.
    data = TensorDataset(torch.full((32, 2), 100), torch.zeros(32))
    model, optimizer, _ = private(Odd(), data)
    optimizer._guard.passes.samples.attached = False
    for _ in range(2):  # what was refused once is no known way of calling the model
        with pytest.raises(PrivacyViolationError, match="in another order"):
            model(torch.tensor(ids)[:, None].expand(-1, 2))


def test_a_loader_that_shows_no_examples_leaves_it_to_the_first_batch() -> None:
    class Unseen(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise RuntimeError("not before training")
            return super().__getitem__(index)

    data = Unseen(torch.randn(32, FEATURES), torch.zeros(32))
    model, optimizer, _ = private(Moved(turned(ORDERS["flipped"])), data)
    optimizer._guard.passes.samples.attached = False
    with pytest.raises(PrivacyViolationError, match=r"second .* in another order"):
        model(torch.randn(6, FEATURES))


class Mixed(Sequences):
    """Adds to each sequence what it has read of the others."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        out = super().forward(x, lengths)
        return out + out.mean(dim=0)


@pytest.mark.parametrize("kind", [Sequences, Mixed])
def test_steps_that_happen_to_be_in_proportion_are_no_rows_of_examples(kind: Any) -> None:
    # Ten steps, of which the first and the third example have five: 2.5 for each.
    lengths = torch.tensor([1, 2, 4, 3])
    torch.manual_seed(1)
    batch = Batch((torch.randn(4, 4, FEATURES), lengths), {}, 4, 0)
    problem = find_coupling(kind(by_hand=False), batch, loss_reduction="mean")
    assert bool(problem) is (kind is Mixed)


def test_an_axis_holds_whole_rows_of_each_example() -> None:
    halves = Companions(4, 2, (0, 1), range(2))
    for whole, half, found in ((4, 2, 1), (8, 4, 2), (10, 5, 0)):
        assert len(layouts(torch.Size([whole, 3]), torch.Size([half, 3]), halves)) == found
