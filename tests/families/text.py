"""Tiny language models of Hugging Face's families, with the heads that people fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Family, add

TOKENS, LENGTH, CLASSES = 48, 10, 3

_SMALL = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}


def tokens(count: int) -> dict[str, Tensor]:
    """Return sequences of tokens."""
    drawn = torch.Generator().manual_seed(count)
    ids = torch.randint(3, TOKENS, (count, LENGTH), generator=drawn)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def of_class(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a classification."""
    labels = batch["input_ids"][:, 0] % CLASSES
    return F.cross_entropy(model(**batch).logits, labels, reduction="none")


def of_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a classification of tokens, or of a masked language model."""
    logits = model(**batch).logits
    labels = batch["input_ids"] % logits.shape[-1]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def of_next(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a causal language model."""
    logits = model(**batch).logits[:, :-1]
    labels = batch["input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


_HEADS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "class": ("AutoModelForSequenceClassification", of_class),
    "token": ("AutoModelForTokenClassification", of_tokens),
    "masked": ("AutoModelForMaskedLM", of_tokens),
    "causal": ("AutoModelForCausalLM", of_next),
}


def _add(name: str, config: Callable[[], Any], heads: str, data: Any = tokens) -> None:
    for head in heads.split():
        auto, losses = _HEADS[head]

        def build(auto: str = auto) -> nn.Module:
            return getattr(hf, auto).from_config(config())

        add(Family(f"{name}-{head}", build, data, losses))


def _encoder(kind: str, **changes: Any) -> Callable[[], Any]:
    small = {k: v for k, v in _SMALL.items() if kind != "XLNet" or k != "max_position_embeddings"}
    return lambda: getattr(hf, f"{kind}Config")(**{**small, **changes})


_add("bert", _encoder("Bert"), "class token masked")
_add(
    "distilbert",
    _encoder("DistilBert", dim=16, hidden_dim=32, n_layers=2, n_heads=2),
    "class token masked",
)
_add("roberta", _encoder("Roberta"), "class token masked")
_add("electra", _encoder("Electra", embedding_size=8), "class token masked")
_add("albert", _encoder("Albert", embedding_size=8), "class token masked")
_add("mpnet", _encoder("MPNet"), "class token masked")
_add(
    "deberta-v2",
    _encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
    ),
    "class token masked",
)
_add("xlnet", _encoder("XLNet", d_model=16, n_layer=2, n_head=2, d_inner=32), "class token causal")
_add(
    "modernbert",
    _encoder("ModernBert", global_attn_every_n_layers=2, local_attention=8),
    "class token masked",
)

_DECODER = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8}


def _decoder(kind: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{kind}Config")(**{**_DECODER, **changes})


_add(
    "gpt2",
    lambda: hf.GPT2Config(
        vocab_size=TOKENS,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=CLASSES,
        pad_token_id=0,
    ),
    "class causal",
)
_add("gpt-neox", _encoder("GPTNeoX"), "class causal")
_add("opt", _encoder("OPT", ffn_dim=32, word_embed_proj_dim=16, dropout=0.0), "class causal")
for _kind in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Phi3", "Olmo2"):
    _changes = {"layer_types": ["full_attention"] * 2} if _kind.startswith("Gemma3") else {}
    _heads = "causal" if _kind in ("Gemma3Text", "Olmo2") else "class causal"
    _add(_kind.lower(), _decoder(_kind, **_changes), _heads)
_add(
    "mamba",
    lambda: hf.MambaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=2,
        pad_token_id=0,
        use_cache=False,
    ),
    "causal",
    lambda n: {"input_ids": tokens(n)["input_ids"]},
)
_add(
    "rwkv",
    lambda: hf.RwkvConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        attention_hidden_size=16,
        context_length=32,
        use_cache=False,
    ),
    "causal",
    lambda n: {"input_ids": tokens(n)["input_ids"]},
)


def pairs(count: int) -> dict[str, Tensor]:
    """Return sequences of tokens for an encoder and a decoder."""
    batch = tokens(count)
    return {**batch, "decoder_input_ids": batch["input_ids"].roll(1, 1)[:, :8]}


def of_pairs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a sequence to sequence model."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    labels = batch["decoder_input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


add(
    Family(
        "t5",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=TOKENS,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
            )
        ),
        pairs,
        of_pairs,
    )
)
add(
    Family(
        "t5-gated",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=TOKENS,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ),
        pairs,
        of_pairs,
    )
)
add(
    Family(
        "bart",
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=TOKENS,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=32,
                pad_token_id=0,
                dropout=0.0,
            )
        ),
        pairs,
        of_pairs,
    )
)
add(
    Family(
        "bart-class",
        lambda: hf.BartForSequenceClassification(
            hf.BartConfig(
                vocab_size=TOKENS,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=32,
                pad_token_id=0,
                eos_token_id=2,
                dropout=0.0,
                num_labels=CLASSES,
            )
        ),
        lambda n: {
            **(b := tokens(n)),
            "input_ids": torch.cat([b["input_ids"][:, :-1], torch.full((n, 1), 2)], 1),
        },
        of_class,
    )
)
