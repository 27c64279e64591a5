"""Attention that computes what ``nn.MultiheadAttention`` does, by linear layers that it calls.

``nn.MultiheadAttention`` uses its layers' weights without calling the layers, so nothing can clip
them. The batch axis of the projections, and their proof: ``docs/rules/attention.md``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip.replacements.attention_state import PROJECTIONS, from_pytorch, to_pytorch
from opacus_bpclip.replacements.base import Copies


class MultiheadAttention(nn.Module):
    """Drop-in replacement of ``nn.MultiheadAttention``: the same arguments, outputs, state dict.

    Its projections are ordinary linear layers and are called, batch first, so each is clipped like
    any other. The parameters' names differ; ``state_dict`` has the names, shapes and values of
    ``nn.MultiheadAttention``'s, as copies, and ``load_state_dict`` takes them.

    Attributes:
        q_proj: projects queries, ``[B, T, embed_dim]``.
        k_proj: projects keys, ``[B, S, kdim]``.
        v_proj: projects values, ``[B, S, vdim]``.
        added_k: puts ``bias_k`` behind the keys; ``None`` without ``add_bias_kv``.
        added_v: puts ``bias_v`` behind the values; ``None`` without ``add_bias_kv``.
        out_proj: projects the heads' results, ``[B, T, embed_dim]``.
    """

    # PyTorch's transformer layers ask for these, and then leave their fused kernel, which would
    # use the weights without calling the layers, alone.
    in_proj_weight: None = None
    in_proj_bias: None = None
    _qkv_same_embed_dim: bool = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the layers, with PyTorch's initialisation for linear layers.

        Args:
            embed_dim: as for ``nn.MultiheadAttention``, like all others.
            num_heads: number of heads.
            dropout: of the attention weights.
            bias: of all projections.
            add_bias_kv: whether a learned token is added to keys and values.
            add_zero_attn: whether a token of zeros is added to keys and values.
            kdim: width of the keys; ``embed_dim`` if ``None``.
            vdim: width of the values; ``embed_dim`` if ``None``.
            batch_first: whether the batch is the first axis of inputs and outputs, or the second.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ValueError: ``embed_dim`` is not a multiple of ``num_heads``.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"Expected embed_dim={embed_dim} to be a multiple of {num_heads}.")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.add_zero_attn = add_zero_attn
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.k_proj = nn.Linear(self.kdim, embed_dim, bias, **made)
        self.v_proj = nn.Linear(self.vdim, embed_dim, bias, **made)
        self.added_k = self.added_v = None
        if add_bias_kv:
            self.added_k, self.added_v = (
                SequenceBias(embed_dim, batch_first=True).to(device, dtype) for _ in range(2)
            )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **made)
        self.register_state_dict_post_hook(to_pytorch)
        self.register_load_state_dict_pre_hook(from_pytorch)

    @classmethod
    def of(cls, module: nn.MultiheadAttention, copies: Copies) -> MultiheadAttention:
        """Return the replacement of a module, with copies of its parameters.

        Args:
            module: what is replaced.
            copies: makes the copies, each parameter's once.
        """
        width = module.embed_dim
        # Without memory, and without drawing numbers: every parameter is put in below.
        with torch.device("meta"):
            made = cls(
                width,
                module.num_heads,
                module.dropout,
                bias=module.in_proj_bias is not None,
                add_bias_kv=module.bias_k is not None,
                add_zero_attn=module.add_zero_attn,
                kdim=module.kdim,
                vdim=module.vdim,
                batch_first=module.batch_first,
            )
        for index, name in enumerate(PROJECTIONS):
            rows = slice(index * width, (index + 1) * width)
            layer = made.get_submodule(name)
            packed = module._parameters["in_proj_weight"]
            own = module._parameters[f"{name}_weight"]
            layer.weight = copies.parameter(own) if packed is None else copies.rows(packed, rows)
            if module._parameters["in_proj_bias"] is not None:
                layer.bias = copies.rows(module._parameters["in_proj_bias"], rows)
        made.out_proj.weight = copies.parameter(module.out_proj.weight)
        if module.out_proj.bias is not None:
            made.out_proj.bias = copies.parameter(module.out_proj.bias)
        copies.memo[id(module.out_proj)] = made.out_proj
        for added, vector in ((made.added_k, module.bias_k), (made.added_v, module.bias_v)):
            if added is not None:
                added.bias = copies.flat(vector)
        return made.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: ``[B, T, E]`` if ``batch_first``, else ``[T, B, E]``; ``[T, E]`` for one example.
            key: ``[B, S, kdim]`` or ``[S, B, kdim]``.
            value: ``[B, S, vdim]`` or ``[S, B, vdim]``.
            key_padding_mask: ``[B, S]``; true where a key is ignored, or numbers that are added.
            need_weights: whether the attention weights are returned.
            attn_mask: ``[T, S]`` or ``[B * num_heads, T, S]``; true where a query ignores a key, or
                numbers that are added.
            average_attn_weights: whether the returned weights are the mean over the heads.
            is_causal: a promise that ``attn_mask`` is the causal mask, which saves using it.

        Returns:
            The result, shaped like ``query``, and the weights, ``[B, T, S]`` or ``[B, num_heads, T,
            S]``, ``None`` if they were not asked for.

        Raises:
            ValueError: shapes or dtypes do not fit; ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, which it promises to be causal.")
        alone = query.dim() == 2
        if alone:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _transposed(query, key, value)
        self._require_shapes(query, key, value, key_padding_mask, attn_mask)
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask = self._mask(query, key_padding_mask, attn_mask)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.added_k is not None and self.added_v is not None:
            k, v = self.added_k(k), self.added_v(v)
        q, k, v = (
            x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(2, 3)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=3)
            weights = F.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if alone:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _require_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> None:
        """Refuse what would be broadcast. Batch first."""
        if {x.dim() for x in (query, key, value)} != {3}:
            raise ValueError("query, key and value must all have 3 axes, or all 2 for one example.")
        batch, targets, sources = len(query), query.shape[1], key.shape[1]
        if key.shape[:2] != (batch, sources) or value.shape[:2] != (batch, sources):
            raise ValueError(
                f"key, {tuple(key.shape)}, and value, {tuple(value.shape)}, must be as long as "
                f"each other, for the {batch} examples of query (shapes with the batch first)."
            )
        if padding is not None and padding.shape != (batch, sources):
            raise ValueError(
                f"Expected key_padding_mask of shape {tuple(padding.shape)} to be of "
                f"{(batch, sources)}."
            )
        shapes = [(targets, sources), (batch * self.num_heads, targets, sources)]
        if mask is not None and mask.shape not in shapes:
            raise ValueError(
                f"Expected attn_mask of shape {tuple(mask.shape)} to be of {shapes[0]} or "
                f"{shapes[1]}."
            )

    def _mask(self, query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, ``[B or 1, num_heads or 1, T or 1, S + added]``."""
        parts = []
        if mask is not None:
            view = (1, 1) if mask.dim() == 2 else (-1, self.num_heads)
            # Not -1: a batch may be empty.
            view = (len(query), self.num_heads) if mask.dim() == 3 else view
            parts.append(_as_numbers(mask, query.dtype).reshape(*view, *mask.shape[-2:]))
        if padding is not None:
            parts.append(_as_numbers(padding, query.dtype)[:, None, None, :])
        if not parts:
            return None
        added = (self.added_k is not None) + self.add_zero_attn
        return F.pad(sum(parts[1:], parts[0]), (0, added))


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise ValueError(f"Expected a mask of dtype {mask.dtype} to be boolean or floating point.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the batch first; what is one tensor stays one, and so is measured once."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)
