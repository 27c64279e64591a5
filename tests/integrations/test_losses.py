"""The losses of Hugging Face's tasks: the models' own, where those have one term per example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from opacus_bpclip.integrations.losses import loss_of
from tests.families.family import PAIR_SIZES, SIZES, WORDS

CLASSES, LENGTH = 3, 6
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def classes() -> Tensor:
    return torch.tensor([0, 2, 1, 1])


def flags() -> Tensor:
    return torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])


def numbers() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0, 0.0])


def tokens() -> Tensor:
    return torch.arange(4 * LENGTH).view(4, LENGTH) % CLASSES + 3


def bert(head: str, **options: Any) -> nn.Module:
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**WORDS, **SIZES, **options))


CASES = {
    "classes": (lambda: bert("SequenceClassification", num_labels=CLASSES), classes),
    "flags": (lambda: bert("SequenceClassification", num_labels=CLASSES), flags),
    "numbers": (lambda: bert("SequenceClassification", num_labels=1), numbers),
    "masked": (lambda: bert("MaskedLM"), tokens),
    "of tokens": (lambda: bert("TokenClassification", num_labels=9), tokens),
    "next token": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2)),
        tokens,
    ),
    "pairs": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**WORDS, **_T5)), tokens),
    "bart": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**WORDS, **PAIR_SIZES)),
        tokens,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_models_own_where_all_labels_count(case: str) -> None:
    torch.manual_seed(0)
    build, labels = CASES[case]
    model = build().eval()
    outputs = model(input_ids=tokens(), labels=labels())
    loss = loss_of(model)
    torch.testing.assert_close(loss(outputs, labels()), outputs.loss)
    loss.reduction = "none"
    each = loss(outputs, labels())
    assert each.shape == (4,)
    torch.testing.assert_close(each.mean(), outputs.loss)


def test_label_smoothing_is_the_trainers() -> None:
    model = bert("SequenceClassification", num_labels=CLASSES).eval()
    outputs = model(input_ids=tokens())
    smoother = hf.trainer_pt_utils.LabelSmoother(epsilon=0.2)
    expected = smoother({"logits": outputs.logits}, classes())
    torch.testing.assert_close(loss_of(model, label_smoothing=0.2)(outputs, classes()), expected)


def test_a_task_of_another_kind_needs_a_loss() -> None:
    with pytest.raises(ValueError, match="Pass compute_loss_func, a module that is called with"):
        loss_of(nn.Linear(2, 2))
