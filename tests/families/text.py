"""Tiny language models of Hugging Face's families, with the heads that people fine-tune."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.families.family import (
    CLASSES,
    PAIR_SIZES,
    SIZES,
    WORDS,
    Data,
    add,
    of_class,
    of_next,
    of_pairs,
    of_tokens,
    tokens,
)

_HEADS = {
    "class": ("AutoModelForSequenceClassification", of_class),
    "token": ("AutoModelForTokenClassification", of_tokens),
    "masked": ("AutoModelForMaskedLM", of_tokens),
    "causal": ("AutoModelForCausalLM", of_next),
}
_ENCODER = "class token masked"
_POSITIONS = {"max_position_embeddings": 32}


def _add(name: str, kind: str, heads: str, data: Data = tokens, **sizes: Any) -> None:
    for head in heads.split():
        auto, losses = _HEADS[head]

        def build(auto: str = auto) -> Any:
            labels = {"num_labels": CLASSES} if "Classification" in auto else {}
            config = getattr(hf, f"{kind}Config")(**WORDS, **sizes, **labels)
            return getattr(hf, auto).from_config(config)

        add(f"{name}-{head}", build, data, losses)


def _add_usual(name: str, kind: str, heads: str = _ENCODER, **more: Any) -> None:
    _add(name, kind, heads, **{**SIZES, **_POSITIONS, **more})


_add_usual("bert", "Bert")
_add_usual("distilbert", "DistilBert", dim=16, hidden_dim=32, n_layers=2, n_heads=2)
_add_usual("roberta", "Roberta")
_add_usual("electra", "Electra", embedding_size=8)
_add_usual("albert", "Albert", embedding_size=8)
_add_usual("mpnet", "MPNet")
_add_usual(
    "deberta-v2",
    "DebertaV2",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    conv_kernel_size=3,
)
_add("xlnet", "XLNet", "class token causal", d_model=16, n_layer=2, n_head=2, d_inner=32)
_add_usual("modernbert", "ModernBert", global_attn_every_n_layers=2, local_attention=8)

_add("gpt2", "GPT2", "class causal", n_positions=32, n_embd=16, n_layer=2, n_head=2)
_add_usual("gpt-neox", "GPTNeoX", "class causal")
_add_usual("opt", "OPT", "class causal", ffn_dim=32, word_embed_proj_dim=16, dropout=0.0)
for _kind in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"):
    _add_usual(_kind.lower(), _kind, "class causal", num_key_value_heads=1, head_dim=8)
_add_usual("olmo2", "Olmo2", "causal", num_key_value_heads=1, head_dim=8)
_add_usual(
    "gemma3text",
    "Gemma3Text",
    "causal",
    num_key_value_heads=1,
    head_dim=8,
    layer_types=["full_attention"] * 2,
)


def _ids(count: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(count)["input_ids"]}


_STATES = {"hidden_size": 16, "num_hidden_layers": 2, "use_cache": False}
_add("mamba", "Mamba", "causal", _ids, state_size=4, **_STATES)
_add("rwkv", "Rwkv", "causal", _ids, attention_hidden_size=16, context_length=32, **_STATES)


def _pairs(count: int) -> dict[str, Tensor]:
    batch = tokens(count)
    return {**batch, "decoder_input_ids": batch["input_ids"].roll(1, 1)[:, :8]}


def _t5(**more: Any) -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = hf.T5Config(**WORDS, **sizes, dropout_rate=0.0, **more)
    return hf.T5ForConditionalGeneration(config)


def _bart(head: str, **more: Any) -> Any:
    config = hf.BartConfig(**WORDS, **PAIR_SIZES, **_POSITIONS, eos_token_id=2, **more)
    return getattr(hf, f"BartFor{head}")(config)


def _ended(count: int) -> dict[str, Tensor]:
    batch = tokens(count)
    end = torch.full((count, 1), 2)
    return {**batch, "input_ids": torch.cat([batch["input_ids"][:, :-1], end], 1)}


add("t5", _t5, _pairs, of_pairs)
add(
    "t5-gated",
    lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _pairs,
    of_pairs,
)
add("bart", lambda: _bart("ConditionalGeneration"), _pairs, of_pairs)
add(
    "bart-class",
    lambda: _bart("SequenceClassification", num_labels=CLASSES),
    _ended,
    of_class,
)
