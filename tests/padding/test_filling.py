"""Whatever a collate function makes of a batch is filled up, or refused."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from opacus_bpclip.sampling.loader import CollateWithEmpty
from tests.padding.test_batches import exactly

Pair = namedtuple("Pair", "x y")


@dataclass
class Held:
    x: Tensor


@dataclass(frozen=True, slots=True)
class Read:
    texts: list[str]
    inside: list[Held]
    x: Tensor
    kind: str = "public"


def filled(collate: Any, items: list[Any], rows: int = 4) -> Any:
    made = CollateWithEmpty(collate, items)
    made.rows = rows
    return made


ITEMS = [(torch.full((2,), index + 1.0), f"item {index}") for index in range(6)]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_tensors_lists_dictionaries_and_objects_are_filled_up(count: int) -> None:
    def collate(items: list[Any]) -> Any:
        x = torch.stack([x for x, _ in items])
        texts = [text for _, text in items]
        return {
            "x": x,
            "second axis": x.T,
            "mask": x > 0,
            "texts": texts,
            "boxes": [{"at": x, "of": text, "at all": True} for x, text in items],
            "numbers": [3.0] * len(items),
            "pair": Pair(x, (x, "public")),
            "held": Held(x),
            "read": Read(texts, [Held(x) for x, _ in items], x),
            "table": torch.ones(3),
        }

    batch = filled(collate, ITEMS)(ITEMS[:count])
    rows = 8 if count > 4 else 4
    expected = torch.zeros(rows, 2)
    expected[:count] = torch.arange(1.0, 7.0)[:count, None]
    for x in (batch["x"], batch["second axis"].T, batch["pair"].x, batch["pair"].y[0]):
        assert torch.equal(x, expected)
    assert torch.equal(batch["held"].x, expected)
    assert torch.equal(batch["mask"], expected > 0)
    assert torch.equal(batch["table"], torch.ones(3))
    assert batch["texts"] == [text for _, text in ITEMS[:count]] + [""] * (rows - count)
    read = batch["read"]
    assert (read.texts, read.kind) == (batch["texts"], "public")
    assert torch.equal(read.x, expected)
    assert torch.equal(torch.stack([held.x for held in read.inside]), expected)
    assert batch["numbers"] == [3.0] * count + [0.0] * (rows - count)
    assert batch["pair"].y[1] == "public"
    assert len(batch["boxes"]) == rows
    for box in batch["boxes"][count:]:
        assert not box["at"].any()
        assert (box["of"], box["at all"]) == ("", False)


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (
            lambda items: (torch.cat([x for x, _ in items]), default_collate(items)[0]),
            "The collate_fn makes a tensor of shape (6,) with 6 rows of 3 items, so "
            "physical_batch_size cannot pad it to a constant number of rows. Make one row of each "
            "item, or leave physical_batch_size out.",
        ),
        (
            lambda items: [text for _, text in items for _ in range(2)],
            "The collate_fn makes a list with 6 rows of 3 items, so physical_batch_size cannot "
            "pad it to a constant number of rows. Make one row of each item, or leave "
            "physical_batch_size out.",
        ),
        (
            lambda items: pack_sequence([x for x, _ in items]),
            "The collate_fn makes a packed sequence, to which physical_batch_size cannot add "
            "sequences of length 0. Collate a padded tensor and the lengths, and pack inside the "
            "model, with lengths.clamp(min=1).",
        ),
    ],
    ids=["flat tokens", "two of each", "packed"],
)
def test_what_has_not_one_row_for_each_item_is_refused(collate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=exactly(message)):
        filled(collate, ITEMS)(ITEMS[:3])
