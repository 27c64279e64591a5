"""Tiny models of pictures and sound."""

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
    add,
    floats,
    integers,
    of_class,
    of_pairs,
    pictures,
)

_PATCHES = {**SIZES, "image_size": 32, "patch_size": 8}


def _add(name: str, kind: str, **sizes: Any) -> None:
    def build() -> Any:
        config = getattr(hf, f"{kind}Config")(**sizes, num_labels=CLASSES)
        return getattr(hf, f"{kind}ForImageClassification")(config)

    add(name, build, pictures, of_class)


_add("vit", "ViT", **_PATCHES)
_add("deit", "DeiT", **_PATCHES)
_add("beit", "Beit", **_PATCHES, use_relative_position_bias=True, layer_scale_init_value=0.1)
_add("dinov2", "Dinov2", **_PATCHES, mlp_ratio=2)
_add(
    "swin",
    "Swin",
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 2],
    window_size=4,
)
_add(
    "convnext",
    "ConvNext",
    hidden_sizes=[8, 16],
    depths=[1, 1],
    num_stages=2,
    layer_scale_init_value=0.1,
)


def _ended_ids(count: int) -> dict[str, Tensor]:
    ids = integers(3, 48, count, 8)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _clip(kind: str, **more: Any) -> Any:
    config = getattr(hf, f"CLIP{kind}Config")(projection_dim=8, **more)
    return getattr(hf, f"CLIP{kind}ModelWithProjection")(config)


add(
    "clip-text",
    lambda: _clip("Text", vocab_size=48, max_position_embeddings=16, eos_token_id=2, **SIZES),
    _ended_ids,
    lambda model, batch: (model(**batch).text_embeds - 1).square().sum(1),
)
add(
    "clip-vision",
    lambda: _clip("Vision", **_PATCHES),
    pictures,
    lambda model, batch: (model(**batch).image_embeds - 1).square().sum(1),
)


def _wav2vec2(norm: str) -> Any:
    config = hf.Wav2Vec2Config(
        **SIZES,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=CLASSES,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        # These draw numbers, or leave layers out.
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        layerdrop=0.0,
    )
    return hf.Wav2Vec2ForSequenceClassification(config)


def _sound(count: int) -> dict[str, Tensor]:
    return {"input_values": floats(count, 400)}


add("wav2vec2", lambda: _wav2vec2("group"), _sound, of_class)
add("wav2vec2-layer", lambda: _wav2vec2("layer"), _sound, of_class)


def _whisper() -> Any:
    config = hf.WhisperConfig(
        **WORDS,
        **PAIR_SIZES,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _speech(count: int) -> dict[str, Tensor]:
    return {
        "input_features": floats(count, 8, 40),
        "decoder_input_ids": integers(3, 48, count, 6),
    }


add("whisper", _whisper, _speech, of_pairs)
