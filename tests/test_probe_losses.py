"""The search finds a private normaliser at any initialisation, and whatever label it ignores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip import CoverageError, CrossEntropy, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.probe import Batch, find_coupling
from opacus_bpclip.probe.copies import Copy

VOCABULARY, LENGTH = 60, 12


def _found(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> bool:
    batch = Batch(args, kwargs, 4, 0).invent(4)
    return find_coupling(model, batch, loss_reduction="mean") is not None


@pytest.mark.parametrize("seed", [0, 103, 108, 123, 136, 143, 147, 149])
def test_losses_that_are_all_alike_hide_nothing(seed: int) -> None:
    # But for seed 0, with the model's own small logits all halves had nearly the same loss.
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16
    )
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.zeros(4, LENGTH, dtype=torch.long)
    positions = torch.arange(LENGTH).expand(4, -1)
    before = [p.detach().clone() for p in model.parameters()]
    assert _found(model, input_ids=ids, position_ids=positions, labels=ids.clone())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Ignoring(nn.Module):
    """Ignores one label, such as a tokenizer's padding."""

    def __init__(self, ignored: int, *, each: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.ignored, self.each = ignored, each

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.table(ids)).transpose(1, 2)
        options = {"ignore_index": self.ignored}
        if self.each:
            losses = F.cross_entropy(logits, labels, reduction="none", **options)
            return losses.mean(dim=1).mean()
        return F.cross_entropy(logits, labels, **options)


@pytest.mark.parametrize("ignored", [-100, -1, 0, 1, 2, 49, 255, 50256])
def test_whatever_a_loss_ignores_is_tried(ignored: int) -> None:
    ids = torch.zeros(4, LENGTH, dtype=torch.long)
    assert _found(Ignoring(ignored), ids, ids.clone())
    assert not _found(Ignoring(ignored, each=True), ids, ids.clone())


def test_spread_parameters_are_put_back_to_the_bit() -> None:
    model = nn.Linear(3, 3)
    with Copy(model, double=False) as copy:
        with copy.spread():
            assert copy.edited() == ["weight", "bias"]
        assert copy.edited() == []


class Labelled(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids.where(torch.arange(LENGTH) < 4 + index % 5, -100)}


def _private(**options: object) -> tuple[object, ...]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=VOCABULARY,
    )
    model = transformers.BertForTokenClassification(config)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(Labelled(), batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        **options,
    )


def test_the_remedy_works_with_labels_in_the_loader() -> None:
    with pytest.raises(CoverageError, match=r"make_private\(criterion=opacus_bpclip.CrossEntropy"):
        _private()
    model, optimizer, criterion, loader = _private(criterion=CrossEntropy(class_axis=-1))
    for batch in loader:
        labels = batch.pop("labels")  # as transformers.Trainer does with compute_loss_func
        optimizer.zero_grad()
        criterion(model(**batch), labels, num_items_in_batch=7).backward()
        optimizer.step()
    batch = next(iter(loader))
    with pytest.raises(PrivacyViolationError, match="returns a tensor without a batch axis"):
        model(**batch)
