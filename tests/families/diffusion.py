"""Tiny diffusion models."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor, nn

from tests.families.family import Data, add, floats, integers

_BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}


def _noisy(channels: int, size: int, name: str = "sample", **more: Any) -> Data:
    def data(count: int) -> dict[str, Tensor]:
        batch = {
            name: floats(count, channels, size, size),
            "timestep": integers(0, 1000, count),
        }
        return batch | {key: make(count) for key, make in more.items()}

    return data


def _denoise(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = next(iter(batch.values()))
    out = model(**batch).sample
    return (out[:, : x.shape[1]] - x).square().flatten(1).mean(1)


add(
    "unet2d",
    lambda: diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **_BLOCKS,
    ),
    _noisy(3, 16),
    _denoise,
)
add(
    "unet2d-condition",
    lambda: diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        **_BLOCKS,
    ),
    _noisy(4, 16, encoder_hidden_states=lambda count: floats(count, 5, 8)),
    _denoise,
)
add(
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
    _noisy(4, 8, "hidden_states", class_labels=lambda count: integers(0, 4, count)),
    _denoise,
)
add(
    "autoencoder-kl",
    lambda: diffusers.AutoencoderKL(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **_BLOCKS,
    ),
    lambda count: {"sample": floats(count, 3, 16, 16)},
    _denoise,
)
