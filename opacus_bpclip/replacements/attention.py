"""Attention that computes what ``nn.MultiheadAttention`` does, by calling its linear layers.

``nn.MultiheadAttention`` uses the weights of its layers without calling the layers, so hooks cannot
clip them. Batch axis and proof: ``docs/rules/attention.md``.
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

    Its projections are linear layers that are called, batch first, so they are clipped like any
    other. The parameters have other names, but ``state_dict`` returns copies with the names, shapes
    and values of ``nn.MultiheadAttention``'s, and ``load_state_dict`` accepts them.

    Attributes:
        q_proj: projects queries, ``[B, T, embed_dim]``.
        k_proj: projects keys, ``[B, S, kdim]``.
        v_proj: projects values, ``[B, S, vdim]``.
        added_k: appends ``bias_k`` to the keys; ``None`` without ``add_bias_kv``.
        added_v: appends ``bias_v`` to the values; ``None`` without ``add_bias_kv``.
        out_proj: projects the heads' results, ``[B, T, embed_dim]``.
        softmax: makes the attention weights.
    """

    # PyTorch's transformer layers read these, and then do not use their fused kernel, which reads
    # the weights without calling the layers.
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

        The arguments are those of ``nn.MultiheadAttention``.

        Args:
            embed_dim: the width of queries and outputs.
            num_heads: the number of heads.
            dropout: the dropout probability of the attention weights.
            bias: whether the projections have biases.
            add_bias_kv: whether a learned token is appended to keys and values.
            add_zero_attn: whether a token of zeros is appended to keys and values.
            kdim: the width of the keys; ``embed_dim`` if ``None``.
            vdim: the width of the values; ``embed_dim`` if ``None``.
            batch_first: whether the batch is the first axis of inputs and outputs; otherwise the
                second.
            device: the device of the parameters.
            dtype: the dtype of the parameters.

        Raises:
            ValueError: ``embed_dim`` is not a multiple of ``num_heads``.
        """
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"Expected embed_dim={embed_dim} to be a multiple of {num_heads=}.")
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
        # Not a fused kernel: where gradients cancel in a layer, their rounding is suppressed.
        self.softmax = nn.Softmax(dim=3)
        self.register_state_dict_post_hook(to_pytorch)
        self.register_load_state_dict_pre_hook(from_pytorch)

    @classmethod
    def of(cls, module: nn.MultiheadAttention, copies: Copies) -> MultiheadAttention:
        """Return the replacement of a module, with copies of its parameters.

        Args:
            module: the module to replace.
            copies: makes one copy of each parameter.
        """
        width = module.embed_dim
        # On the meta device: no memory, no random numbers. Every parameter is replaced below.
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
            is_causal: whether ``attn_mask`` is the causal mask.

        Returns:
            The result, of the shape of ``query``, and the weights, ``[B, T, S]`` or
            ``[B, num_heads, T, S]``; ``None`` without ``need_weights``.

        Raises:
            ValueError: shapes or dtypes do not match; ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask. Pass the causal mask, too.")
        alone = query.dim() == 2
        if alone:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _transposed(query, key, value)
        self._require_shapes(query, key, value, key_padding_mask, attn_mask)
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
        scores = (q / math.sqrt(self.head_dim)) @ k.transpose(2, 3)
        if is_causal and key_padding_mask is None and not need_weights:
            # As PyTorch's, which then masks added keys, too.
            mask = scores.new_full(scores.shape[2:], -math.inf).triu(1)
        weights = self._weights(scores, mask, blank_is_nan=need_weights)
        weights = F.dropout(weights, dropout) if dropout else weights
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            shown = weights.mean(dim=1) if average_attn_weights else weights
        if alone:
            return y.squeeze(0), None if shown is None else shown.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), shown

    def _weights(self, scores: Tensor, mask: Tensor | None, *, blank_is_nan: bool) -> Tensor:
        """Return the attention weights of scores. ``[B, num_heads, T, S]``.

        A query that ignores all keys has weights of NaN, or of zero, as PyTorch's have with and
        without ``need_weights``.
        """
        if mask is None:
            return self.softmax(scores)
        if blank_is_nan:
            return self.softmax(scores + mask)
        blank = (mask == -math.inf).all(dim=-1, keepdim=True)
        return self.softmax(scores + mask.masked_fill(blank, 0)).masked_fill(blank, 0)

    def _require_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> None:
        """Refuse shapes, with the batch first, that would be broadcast and so mix examples."""
        if {x.dim() for x in (query, key, value)} != {3}:
            raise ValueError(
                "Expected query, key and value to have 3 axes each, or 2 axes each for a single "
                "example."
            )
        batch, targets, sources = len(query), query.shape[1], key.shape[1]
        if key.shape[:2] != (batch, sources) or value.shape[:2] != (batch, sources):
            raise ValueError(
                f"Expected key, {tuple(key.shape)}, and value, {tuple(value.shape)}, to have the "
                f"same length, and the {batch} examples of query (shapes with the batch first)."
            )
        if padding is not None and padding.shape != (batch, sources):
            raise ValueError(
                f"Expected key_padding_mask of shape {tuple(padding.shape)} to have shape "
                f"{(batch, sources)}."
            )
        shapes = [(targets, sources), (batch * self.num_heads, targets, sources)]
        if mask is not None and mask.shape not in shapes:
            raise ValueError(
                f"Expected attn_mask of shape {tuple(mask.shape)} to have shape {shapes[0]} or "
                f"{shapes[1]}."
            )

    def _mask(self, query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Return the numbers to add to the scores, ``[B or 1, num_heads or 1, T or 1, S + added]``.

        Queries, with the batch first, give their dtype and the batch size.
        """
        parts = []
        if mask is not None:
            view = (1, 1) if mask.dim() == 2 else (-1, self.num_heads)
            # Not -1: the batch may be empty.
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
    """Move the batch to the first axis; a shared tensor stays shared, so it is measured once."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)
