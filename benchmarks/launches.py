"""Operations of one step of a BERT of two layers: ``python benchmarks/launches.py``.

Run on torch's meta device, where every branch that is for accelerators is taken and nothing is
computed. Views, which launch nothing, are left out. So are the copies that part gradients of one
memory: on this device all tensors have the same address.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.jobs.quiet import known_warnings_silenced

LENGTH, ROWS = 16, 4
ARMS = {
    "joint-exact": BackpropClipping(probe=False),
    "joint-weighted": BackpropClipping(probe=False, bound="weighted"),
    "layerwise-weighted": BackpropClipping(
        probe=False, allocation="dimension", bound="weighted", max_input_norm=3.0, uses={}
    ),
}


class Count(TorchDispatchMode):
    """Counts operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        makes_none = any(word in str(function) for word in ("empty", "is_set_to", "_unsafe_view"))
        if not function.is_view and not makes_none:
            self.found[str(function)] += 1
        return out


class Bert(nn.Module):
    """A row of positions for every example."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            num_hidden_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            intermediate_size=128,
            vocab_size=100,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(LENGTH, device=ids.device).repeat(len(ids), 1)
        return self.bert(input_ids=ids, position_ids=positions).logits


def private(model: nn.Module, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Return a private model and its optimizer."""
    with known_warnings_silenced():
        made = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(torch.zeros(ROWS, 1)), batch_size=ROWS),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            **options,
        )
    return made[0], made[1]


def prepared(arm: str) -> tuple[Any, torch.optim.Optimizer]:
    """Return the model and the optimizer of an arm, on the meta device."""
    model = Bert()
    own = copy.deepcopy(model).to("meta")
    if arm == "non-private":
        return own, torch.optim.SGD(own.parameters(), lr=0.1)
    if arm == "hooks":
        return private(own)
    options = {"clipping": "backprop", "backprop": ARMS[arm]}
    # What trial runs show once is seen on a processor.
    known, _ = private(model, **options)
    known(torch.zeros(ROWS, LENGTH, dtype=torch.long))
    made, optimizer = private(own, **options)
    made._prober.passed = known._prober.passed
    return made, optimizer


def operations(arm: str) -> Counter[str]:
    """Return the operations of one step, by name."""
    model, optimizer = prepared(arm)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device="meta")
    labels = torch.zeros(ROWS, dtype=torch.long, device="meta")
    with known_warnings_silenced(), Count() as count:
        F.cross_entropy(model(ids), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    if arm in ARMS:
        count.found["aten.clone.default"] -= sum(p.requires_grad for p in model.parameters())
    return count.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=0, help="print so many operations of each arm")
    options = parser.parse_args()
    library = torch.library.Library("aten", "IMPL")
    library.impl("is_set_to", lambda one, other: one is other, "Meta")
    print("| arm | operations |\n|---|---|")
    for arm in ("non-private", *ARMS, "hooks"):
        found = operations(arm)
        print(f"| `{arm}` | {sum(found.values()):,} |")
        for name, times in found.most_common(options.most):
            print(f"    {name} {times}")


if __name__ == "__main__":
    main()
