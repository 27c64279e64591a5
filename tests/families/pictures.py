"""Tiny models of pictures and sound, and diffusion models."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Family, add

CLASSES = 3


def pictures(count: int) -> dict[str, Tensor]:
    """Return pictures."""
    drawn = torch.Generator().manual_seed(count)
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=drawn)}


def of_class(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the losses of a classification."""
    logits = model(**batch).logits
    labels = (batch[next(iter(batch))].flatten(1)[:, 0] > 0).long()
    return F.cross_entropy(logits, labels, reduction="none")


_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}


def _add(name: str, kind: str, config: Any) -> None:
    build = getattr(hf, f"{kind}ForImageClassification")
    add(Family(name, lambda: build(config()), pictures, of_class))


_add("vit", "ViT", lambda: hf.ViTConfig(**_VISION))
_add("deit", "DeiT", lambda: hf.DeiTConfig(**_VISION))
_add(
    "beit",
    "Beit",
    lambda: hf.BeitConfig(**_VISION, use_relative_position_bias=True, layer_scale_init_value=0.1),
)
_add("dinov2", "Dinov2", lambda: hf.Dinov2Config(**{**_VISION, "mlp_ratio": 2}))
_add(
    "swin",
    "Swin",
    lambda: hf.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        num_labels=CLASSES,
    ),
)
_add(
    "convnext",
    "ConvNext",
    lambda: hf.ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_stages=2,
        layer_scale_init_value=0.1,
        num_labels=CLASSES,
    ),
)


def _clip_text() -> nn.Module:
    return hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=8,
            eos_token_id=2,
        )
    )


def _clip_vision() -> nn.Module:
    return hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=8,
        )
    )


def _ids(count: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(count)
    ids = torch.randint(3, 48, (count, 8), generator=drawn)
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


add(Family("clip-text", _clip_text, _ids, lambda m, b: (m(**b).text_embeds - 1).square().sum(1)))
add(
    Family(
        "clip-vision",
        _clip_vision,
        pictures,
        lambda m, b: (m(**b).image_embeds - 1).square().sum(1),
    )
)


def _sound(count: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(count)
    return {"input_values": torch.randn(count, 400, generator=drawn)}


def _wav2vec2(norm: str) -> nn.Module:
    return hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
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
            mask_time_prob=0.0,
            mask_feature_prob=0.0,
            layerdrop=0.0,
        )
    )


add(Family("wav2vec2", lambda: _wav2vec2("group"), _sound, of_class))
add(Family("wav2vec2-layer", lambda: _wav2vec2("layer"), _sound, of_class))


def _speech(count: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(count)
    return {
        "input_features": torch.randn(count, 8, 40, generator=drawn),
        "decoder_input_ids": torch.randint(3, 48, (count, 6), generator=drawn),
    }


def _of_speech(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch, use_cache=False).logits[:, :-1]
    labels = batch["decoder_input_ids"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


add(
    Family(
        "whisper",
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=48,
                num_mel_bins=8,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_source_positions=20,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        _speech,
        _of_speech,
    )
)


def _noisy(channels: int, size: int, **more: Any) -> Any:
    def data(count: int) -> dict[str, Tensor]:
        drawn = torch.Generator().manual_seed(count)
        batch = {
            "sample": torch.randn(count, channels, size, size, generator=drawn),
            "timestep": torch.randint(1000, (count,), generator=drawn),
        }
        for name, shape in more.items():
            batch[name] = (
                torch.randn(count, *shape, generator=drawn)
                if shape
                else torch.randint(4, (count,), generator=drawn)
            )
        return batch

    return data


def _denoise(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch.get("sample", batch.get("hidden_states"))
    out = model(**batch).sample
    return (out[:, : x.shape[1]] - x).square().flatten(1).mean(1)


add(
    Family(
        "unet2d",
        lambda: diffusers.UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        _noisy(3, 16),
        _denoise,
    )
)
add(
    Family(
        "unet2d-condition",
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
        ),
        _noisy(4, 16, encoder_hidden_states=(5, 8)),
        _denoise,
    )
)


def _dit_batch(count: int) -> dict[str, Tensor]:
    batch = _noisy(4, 8, class_labels=())(count)
    return {"hidden_states": batch.pop("sample"), **batch}


add(
    Family(
        "dit",
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=8,
            norm_num_groups=4,
        ),
        _dit_batch,
        _denoise,
    )
)
add(
    Family(
        "autoencoder-kl",
        lambda: diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        lambda n: {"sample": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))},
        _denoise,
    )
)
