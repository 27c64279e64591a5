"""Adapters of Hugging Face's peft on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import transformers as hf
from torch import Tensor, nn

from tests.families.family import (
    CLASSES,
    SIZES,
    TOKENS,
    WORDS,
    add,
    floats,
    of_class,
    of_next,
    tokens,
)

_KIND = {"class": peft.TaskType.SEQ_CLS, "causal": peft.TaskType.CAUSAL_LM}


def _bert() -> nn.Module:
    config = hf.BertConfig(**WORDS, **SIZES, num_labels=CLASSES)
    return hf.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=TOKENS, n_positions=48, n_embd=16, n_layer=2, n_head=2)
    return hf.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, **SIZES))


def _with(base: Callable[[], nn.Module], config: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: peft.get_peft_model(base(), config())


def _bert_with(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return _with(_bert, lambda: getattr(peft, kind)(task_type=_KIND["class"], **options))


def _llama_with(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return _with(_llama, lambda: getattr(peft, kind)(task_type=_KIND["causal"], **options))


_ATTENTION = {"target_modules": ["query", "value"]}
_PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}

for _name, _build in {
    "lora": _bert_with("LoraConfig", r=2, lora_dropout=0.0, **_ATTENTION),
    "lora-bias": _bert_with("LoraConfig", r=2, bias="lora_only", **_ATTENTION),
    "lora-embedding": _bert_with("LoraConfig", r=2, target_modules=["word_embeddings", "query"]),
    "dora": _bert_with("LoraConfig", r=2, use_dora=True, **_ATTENTION),
    "rslora": _bert_with("LoraConfig", r=2, use_rslora=True, **_ATTENTION),
    "ia3": _bert_with(
        "IA3Config",
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
    ),
    "vera": _bert_with("VeraConfig", r=2, **_ATTENTION),
    "adalora": _bert_with("AdaLoraConfig", init_r=3, target_r=2, total_step=10, **_ATTENTION),
    "modules-to-save": _bert_with("LoraConfig", r=2, modules_to_save=["pooler"], **_ATTENTION),
}.items():
    add(f"bert-{_name}", _build, tokens, of_class)

for _name, _build in {
    "lora": _llama_with("LoraConfig", r=2, **_PROJECTIONS),
    "dora": _llama_with("LoraConfig", r=2, use_dora=True, **_PROJECTIONS),
    "prompt": _llama_with("PromptTuningConfig", num_virtual_tokens=3),
    "prefix": _llama_with("PrefixTuningConfig", num_virtual_tokens=3),
    "prefix-projected": _llama_with(
        "PrefixTuningConfig", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "p-tuning": _llama_with("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
}.items():
    add(f"llama-{_name}", _build, tokens, of_next)

add(
    "gpt2-lora",
    _with(
        _gpt2,
        lambda: peft.LoraConfig(
            task_type=_KIND["causal"], r=2, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    tokens,
    of_next,
)


def _two_adapters() -> nn.Module:
    one, other = (
        peft.LoraConfig(task_type=_KIND["class"], r=rank, **_ATTENTION) for rank in (2, 3)
    )
    model = peft.get_peft_model(_bert(), one)
    model.add_adapter("other", other)
    model.set_adapter("other")
    return model


add("bert-two-adapters", _two_adapters, tokens, of_class)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        y = self.conv(pixel_values).relu().mean(dim=(2, 3))
        return SimpleNamespace(logits=self.head(y))


add(
    "conv-lora",
    _with(
        _Convolutions,
        lambda: peft.LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"]),
    ),
    lambda count: {"pixel_values": floats(count, 3, 8, 8)},
    of_class,
)
