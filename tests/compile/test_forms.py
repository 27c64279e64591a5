"""The forms in which a compiled model is called: how they are told apart, and made-up examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, PrivacyEngine
from tests.helpers import (
    CLASSES,
    FEATURES,
    batch,
    dataset,
    hand_over,
    make_private,
    mlp,
    summed,
    train_step,
)
from tests.joint.helpers import joint


def test_autocast_is_a_form_of_its_own(rehearsed):
    private = make_private(mlp(), backprop=joint(), loss_reduction="sum")
    fast = torch.compile(private.model, backend="aot_eager")
    for on in (False, True):
        private.optimizer.zero_grad()
        hand_over(private, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = fast(batch()[0])
        out.float().sum().backward()
        private.optimizer.step()
    assert [form.autocast for form in rehearsed] == [(), (("cpu", torch.bfloat16),)]


class Structured(nn.Module):
    """Takes its examples in every kind of container that a graph shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, parts: Any, *, how: str = "", by: float = 1.0, times: int = 1) -> Tensor:
        x = parts["x"] if isinstance(parts, dict) else parts
        x = x if isinstance(x, Tensor) else x[0]
        return self.layer(x * by * times) + (self.layer.out_features if how == "shifted" else 0)


def test_containers_numbers_and_names_are_made_up_in_their_places(rehearsed):
    clipping = BackpropClipping()
    private, eager = (make_private(Structured(), backprop=clipping) for _ in range(2))
    fast = torch.compile(private.model, backend="aot_eager", fullgraph=True, dynamic=True)
    x, y = batch()
    calls: list[tuple[Any, dict[str, Any]]] = [
        ({"x": x}, {"how": "shifted"}),
        ((x, None), {"by": 2.5}),
        ([x, True], {"times": 3}),
    ]
    for parts, named in calls:
        for one, model in ((private, fast), (eager, eager.model)):
            one.optimizer.zero_grad()
            hand_over(one, len(x))
            nn.functional.cross_entropy(model(parts, **named), y).backward()
            one.optimizer.step()
        torch.testing.assert_close(summed(private), summed(eager))
    assert len(rehearsed) == len(calls)


def test_a_criterion_is_not_asked_for(rehearsed):
    criterion = nn.CrossEntropyLoss()
    model = mlp()
    model, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=criterion,
        data_loader=torch.utils.data.DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        poisson_sampling=False,
    )
    fast = torch.compile(model, backend="aot_eager")
    x, y = batch()
    for _ in range(2):
        optimizer.zero_grad()
        criterion(fast(x), y).backward()
        optimizer.step()
    assert len(rehearsed) == 1


def test_blocks_compiled_by_themselves_train_where_each_layer_has_a_budget(rehearsed):
    private, eager = make_private(mlp()), make_private(mlp())
    private.handle._module[0].compile(backend="aot_eager")
    for size in (6, 5):
        train_step(private, size)
        train_step(eager, size)
        torch.testing.assert_close(summed(private), summed(eager))
    assert len(rehearsed) == 1


def test_examples_on_the_second_axis_are_made_up_there(rehearsed):
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    private = make_private(Turned(), batch_first=False)
    fast = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    x, y = batch()
    hand_over(private, len(x))
    nn.functional.cross_entropy(fast(x[None].expand(2, -1, -1)), y).backward()
    private.optimizer.step()
    assert len(rehearsed) == 1
