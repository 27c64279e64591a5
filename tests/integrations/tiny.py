"""Tiny models and data for Hugging Face's trainer, made from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import Dataset

from opacus_bpclip.integrations.transformers import PrivacyArguments, PrivateTrainer
from tests.integrations.plain import CLASSES, PRIVACY

TOKENS, LENGTH = 48, 8


class Texts(Dataset[dict[str, Tensor]]):
    """Drawn sequences, labelled by their first token, or by all of them.

    Args:
        count: the number of examples.
        next_token: whether every token is a label.
        positions: whether they have position ids, with which there is less to try out.
    """

    def __init__(self, count: int, *, next_token: bool = False, positions: bool = True) -> None:
        self.count, self.next_token, self.positions = count, next_token, positions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        drawn = torch.Generator().manual_seed(index)
        ids = torch.randint(3, TOKENS, (LENGTH,), generator=drawn)
        labels = ids if self.next_token else ids[0] % CLASSES
        item = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {**item, "position_ids": torch.arange(LENGTH)} if self.positions else item


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{"num_labels": CLASSES, **options},
    )
    return hf.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=TOKENS, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )


def arguments(folder: Path, **options: Any) -> hf.TrainingArguments:
    usual = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return hf.TrainingArguments(output_dir=str(folder), **{**usual, **options})


def trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    data: Dataset[Any] | None = None,
    privacy: dict[str, Any] | None = None,
    optimizers: Any = (None, None),
    **options: Any,
) -> PrivateTrainer:
    """Return a private trainer; ``options`` are training arguments."""
    return PrivateTrainer(
        model=model or bert(),
        args=arguments(folder, **options),
        train_dataset=data or Texts(32),
        eval_dataset=Texts(8, next_token=isinstance(model, hf.GPT2LMHeadModel)),
        optimizers=optimizers,
        privacy=PrivacyArguments(**{**PRIVACY, **(privacy or {})}),
    )
