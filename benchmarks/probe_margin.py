"""How far rounding stays below the tolerance of the search for coupled examples.

    python benchmarks/probe_margin.py

For each model: the least tolerance, as a power of two in units of the precision, at which the
search finds nothing. The search itself uses 2^10.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from guard_cost import Transformer, resnet18
from opacus.layers import DPLSTM
from torch import Tensor, nn

from opacus_bpclip.ab.models import cnn26k
from opacus_bpclip.probe import EXAMPLES, Batch, randomness, search
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.order import rows_of_layers


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )


def deep() -> nn.Module:
    blocks = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.LayerNorm(32)) for _ in range(30))
    return nn.Sequential(*blocks)


def floats(*shape: int) -> Tensor:
    return torch.zeros(EXAMPLES, *shape)


def ids(length: int) -> Tensor:
    return torch.zeros(EXAMPLES, length, dtype=torch.long)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "CNN26k": (cnn26k, floats(1, 28, 28)),
    "ResNet-18-GN, 32 x 32": (resnet18, floats(3, 32, 32)),
    "transformer, 64 tokens": (Transformer, ids(64)),
    "BERT, 4 layers": (bert, ids(16)),
    "GPT-2, 4 layers": (gpt2, ids(16)),
    "LSTM, 32 steps": (lambda: DPLSTM(16, 32, num_layers=2, batch_first=True), floats(32, 16)),
    "30 x (Linear, tanh, LayerNorm)": (deep, floats(32)),
}


def least_power(model: nn.Module, batch: Batch, *, double: bool) -> int:
    for power in range(-8, 20):
        randomness._UNITS = 2.0**power
        with Copy(model, double=double) as copy:
            if search.Search(copy, batch, "mean", rows_of_layers(model, ())).problem() is None:
                return power
    raise AssertionError("coupled at any tolerance")


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'model':<32} float64  float32")
    for name, (make, like) in CASES.items():
        torch.manual_seed(0)
        model = make()
        batch = Batch((like,), {}, EXAMPLES, 0).invent(EXAMPLES)
        powers = [least_power(model, batch, double=double) for double in (True, False)]
        print(f"{name:<32} {powers[0]:>5}  {powers[1]:>7}", flush=True)


if __name__ == "__main__":
    main()
