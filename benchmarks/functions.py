"""What following functions on parameters costs: ``python benchmarks/functions.py``.

A small ViT of timm and a two-block Llama, a whole training step. Arms: without privacy; this
package as it is; this package with every rule and closed form taken away, so that each parameter is
followed by its functions and measured by ``torch.func.vmap``; Opacus's functorch mode. Times are
medians of paired ratios, in one process; memory is the peak of a step in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import opacus
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.clipping import function_use
from opacus_bpclip.model import known_gradients
from opacus_bpclip.rules import RULES

BATCH = 32
ARMS = ("non-private", "as it is", "functions alone", "functorch")


def vit() -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    """Return a ViT, a batch, and how to call it."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=4,
        img_size=64,
        patch_size=8,
        embed_dim=192,
        depth=4,
        num_heads=4,
    )
    return model, torch.randn(BATCH, 3, 64, 64), lambda m, x: m(x)


def llama() -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    """Return two blocks of a Llama, a batch, and how to call it."""
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        num_labels=4,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(config)
    return model, torch.randint(1, 1000, (BATCH, 64)), lambda m, x: m(input_ids=x).logits


MODELS = {"vit": vit, "llama": llama}


def step_of(name: str, arm: str) -> Callable[[], None]:
    """Return one training step of an arm."""
    torch.manual_seed(0)
    model, x, call = MODELS[name]()
    y = torch.randint(4, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {
        "module": model,
        "optimizer": optimizer,
        "data_loader": DataLoader(TensorDataset(x, y), batch_size=BATCH),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
    }
    around = nothing_known if arm == "functions alone" else nullcontext
    with around():
        if arm == "functorch":
            model, optimizer, _ = opacus.PrivacyEngine().make_private(
                grad_sample_mode="functorch", **options
            )
        elif arm != "non-private":
            model, optimizer, _ = PrivacyEngine().make_private(clipping="backprop", **options)
    model.train()

    def step() -> None:
        with around():
            optimizer.zero_grad()
            F.cross_entropy(call(model, x), y).backward()
            optimizer.step()

    for _ in range(2):
        step()
    return step


@contextmanager
def nothing_known() -> Iterator[None]:
    """Take all rules and closed forms away for a while."""
    with (
        patch.dict(RULES, clear=True),
        patch.dict(known_gradients._FORMS, clear=True),
        patch.object(function_use, "rule_of_call", lambda *_: None),
    ):
        yield


def memory_of(name: str, arm: str) -> int:
    """Return the peak of a step, in bytes, in a process of its own."""
    code = (
        "import functions, torch\n"
        "from opacus_bpclip.bench.measure import tensor_bytes\n"
        "from opacus_bpclip.jobs.memory import PeakMemory\n"
        "torch.set_num_threads(1)\n"
        f"step = functions.step_of({name!r}, {arm!r})\n"
        "held, memory = tensor_bytes(), PeakMemory(torch.device('cpu'))\n"
        "with memory.watch(): step()\n"
        "print(held + memory.bytes)"
    )
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(made.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'model':8}{'arm':18}{'time':>7}{'quartiles':>15}{'memory':>9}")
    for name in MODELS:
        memory = {arm: memory_of(name, arm) for arm in ARMS}
        steps = {arm: step_of(name, arm) for arm in ARMS}
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(rounds):
            for arm, step in steps.items():
                start = time.perf_counter()
                step()
                times[arm].append(time.perf_counter() - start)
        for arm in ARMS:
            pairs = zip(times[arm], times["non-private"], strict=True)
            ratios = [one / other for one, other in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            part = memory[arm] / memory["non-private"]
            print(f"{name:8}{arm:18}{middle:7.2f}{f'{low:.2f} to {high:.2f}':>15}{part:9.2f}")


if __name__ == "__main__":
    main()
