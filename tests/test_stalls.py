"""A step never waits for an accelerator: tried on torch's meta device, which holds no numbers.

Whatever asks one of them for a number raises. What a step asks only once, in its trial runs on the
first batch, is taken from the same model on a processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, CrossEntropy, PrivacyEngine
from tests.budgets import layerwise
from tests.functions.parts import PARTS
from tests.helpers import CLASSES, Private, make_private

WORDS, WIDTH, LENGTH, ROWS = 11, 4, 3, 4


@pytest.fixture(autouse=True)
def same_memory() -> Iterator[None]:
    """Let meta tensors tell whether they share memory, as those of every other device can."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("is_set_to", lambda one, other: one is other, "Meta")
    yield
    library._destroy()


class Copies(TorchDispatchMode):
    """Notes what is copied from one device to another, which waits, too, and counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.launched = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.launched += not function.is_view
        copied = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copied and len({x.device for x in (*args, out) if isinstance(x, Tensor)}) > 1:
            self.found.append(str(function))
        return out


class Model(nn.Module):
    """Runs a body on ``[B, T, D]``, and a head on the mean over the positions."""

    def __init__(self, body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.run = body, run
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.body, x)
        return self.head(y.mean(dim=1) if y.dim() > 2 else y)


def as_it_is(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)


def twice(body: nn.Module, x: Tensor) -> Tensor:
    return body(body(x))


def channels_first(body: nn.Module, x: Tensor) -> Tensor:
    return body(x.transpose(1, 2)).transpose(1, 2)


def recurrent(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)[0]


def attending(body: nn.Module, x: Tensor) -> Tensor:
    return body(x, x, x)[0]


def on_tokens(body: nn.Module, x: Tensor) -> Tensor:
    return body(x[..., 0].abs().long() % WORDS)


def tied(body: nn.Module, x: Tensor) -> Tensor:
    return body[1](on_tokens(body[0], x))


def tied_embedding() -> nn.Module:
    words, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
    head.weight = words.weight
    return nn.Sequential(words, head)


Run = Callable[[nn.Module, Tensor], Tensor]

CASES: dict[str, tuple[Callable[[], nn.Module], Run]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), as_it_is),
    "vectors": (lambda: nn.Linear(WIDTH, WIDTH), lambda body, x: body(x[:, 0])),
    "used twice": (lambda: nn.Linear(WIDTH, WIDTH), twice),
    "convolution": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, groups=2), channels_first),
    "transposed convolution": (lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 3), channels_first),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), as_it_is),
    "norm used twice": (lambda: nn.LayerNorm(WIDTH), twice),
    "group norm": (lambda: nn.GroupNorm(2, WIDTH), channels_first),
    "instance norm": (lambda: nn.InstanceNorm1d(WIDTH, affine=True), channels_first),
    "prelu": (lambda: nn.PReLU(WIDTH), channels_first),
    "embedding": (lambda: nn.Embedding(WORDS, WIDTH), on_tokens),
    "bag": (lambda: nn.EmbeddingBag(WORDS, WIDTH, mode="sum"), on_tokens),
    "tied embedding": (tied_embedding, lambda body, x: tied(body, x)[..., :WIDTH]),
    "lstm": (lambda: DPLSTM(WIDTH, WIDTH, batch_first=True), recurrent),
    "two layers of gru": (lambda: DPGRU(WIDTH, WIDTH, num_layers=2, batch_first=True), recurrent),
    "attention": (lambda: DPMultiheadAttention(WIDTH, 2, batch_first=True), attending),
    **{
        name: (PARTS[name], as_it_is)
        for name in ("root mean square", "class token", "positions", "in place", "tied")
    },
}

SETTINGS = {
    "exact": BackpropClipping(probe=False),
    "weighted": BackpropClipping(probe=False, bound="weighted", max_input_norm=1.0, normalize=True),
    "layerwise": layerwise(probe=False, bound="exact", uses="auto"),
    "layerwise product": layerwise(probe=False, bound="product", uses="auto"),
}


def step(private: Private, x: Tensor, y: Tensor, loss: nn.Module | None = None) -> None:
    (loss or nn.CrossEntropyLoss())(private.model(x), y).backward()
    private.optimizer.step()
    private.optimizer.zero_grad()


def on_meta(
    model: nn.Module, x: Tensor, y: Tensor, backprop: BackpropClipping, **options: Any
) -> Private:
    """Return a model on the meta device that knows what its twin's trial runs have shown."""
    options = {"noise_multiplier": 1.0, "data": TensorDataset(x, y), **options}
    twin = make_private(copy.deepcopy(model), backprop=backprop, **options)
    step(twin, x, y)
    if backprop.allocation != "joint":
        uses = {name: group.uses for name, group in twin.handle._groups.items()}
        backprop = replace(backprop, uses=uses)
    own = make_private(model.to("meta"), backprop=backprop, **options)
    own.handle._prober.passed = twin.handle._prober.passed
    return own


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, LENGTH, WIDTH), torch.arange(ROWS) % CLASSES


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_an_accelerator_for_no_number(case: str, setting: str) -> None:
    body, run = CASES[case]
    x, y = example()
    private = on_meta(Model(body(), run), x, y, SETTINGS[setting])
    x, y = x.to("meta"), y.to("meta")
    with Copies() as copies:
        for _ in range(2):
            step(private, x, y)
    assert copies.found == []


def test_gradients_that_are_cleared_in_place_are_not_read() -> None:
    x, y = example()
    private = on_meta(Model(nn.LayerNorm(WIDTH), as_it_is), x, y, SETTINGS["exact"])
    for _ in range(2):
        F.cross_entropy(private.model(x.to("meta")), y.to("meta")).backward()
        private.optimizer.step()
        private.optimizer.zero_grad(set_to_none=False)


def test_physical_batches_ask_for_no_number() -> None:
    x, y = example()
    private = on_meta(Model(nn.LayerNorm(WIDTH), as_it_is), x, y, SETTINGS["exact"])
    for skip in (True, False):
        private.optimizer.signal_skip_step(do_skip=skip)
        step(private, x.to("meta"), y.to("meta"))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), CrossEntropy()])
def test_a_criterion_asks_for_no_number(criterion: nn.Module) -> None:
    x, y = example()
    made = []
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES)).to(device)
        model, optimizer, own, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(TensorDataset(x, y), batch_size=ROWS),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            clipping="backprop",
            backprop=SETTINGS["exact"],
            criterion=criterion,
        )
        made.append(own)
        # That its rows are not coupled is tried in calls 1, 2, 4 and so on.
        own._trials = made[0]._trials
        if device == "cpu":
            own(model(x), y)
        own(model(x.to(device)), y.to(device)).backward()
        optimizer.step()


def _launched(layers: int) -> int:
    x, y = example()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    private = on_meta(Model(model, as_it_is), x, y, SETTINGS["exact"])
    with Copies() as copies:
        step(private, x.to("meta"), y.to("meta"))
    return copies.launched


def test_layers_of_a_joint_budget_share_its_small_operations() -> None:
    # The forward pass, the products, what measures, masks and adds up, and copies of the two sums,
    # since on the meta device all memory has one address.
    assert (_launched(6) - _launched(2)) / 4 <= 54


def test_the_meta_device_does_refuse_to_give_numbers() -> None:
    x = torch.ones(2, device="meta")
    for ask in (Tensor.item, bool, Tensor.nonzero, partial(torch.equal, x), Tensor.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(x[0] if ask in (Tensor.item, bool) else x)
    with Copies() as copies:
        torch.zeros(2).to("meta")
    assert copies.found == ["aten._to_copy.default"]
