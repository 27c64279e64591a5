"""Corner cases of the core that no larger test covers."""

from __future__ import annotations

import pytest
import torch
from opacus.layers import DPRNN
from torch import nn

from opacus_bpclip import CoverageError, clip_inputs
from opacus_bpclip.model.calls import CallArguments
from opacus_bpclip.rules import BroadcastRule
from opacus_bpclip.rules.precision import rounding_margin
from tests.budgets import layerwise
from tests.helpers import FEATURES, make_private, one_layer, switchable, train_step, tricked


def test_products_on_a_gpu_may_be_rounded_to_tensorfloat32() -> None:
    cpu, gpu = (rounding_margin(torch.float32, torch.device(kind)) for kind in ("cpu", "cuda"))
    # Two factors, each rounded to 11 bits.
    assert gpu - cpu >= 2 * 2.0**-11
    assert rounding_margin(torch.float64, torch.device("cuda")) < 1e-12


def test_a_layer_that_is_called_without_its_input_says_so() -> None:
    with pytest.raises(TypeError, match=r"^The layer was called without 'input'\.$"):
        CallArguments(("input",), 0).passed((), {})


def test_layers_that_have_nothing_to_clip_get_no_input_clip() -> None:
    model = clip_inputs(nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 2)), 1.0)
    assert [len(layer._forward_pre_hooks) for layer in model] == [0, 1]


class Offset(BroadcastRule):
    parameters = ("offset", "unused")
    dims = {"offset": 2}  # noqa: RUF012


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(FEATURES))
        self.register_parameter("unused", None)


def test_a_broadcast_rule_leaves_the_input_alone_and_skips_parameters_that_are_none() -> None:
    rule = Offset.from_module(Module())
    x = torch.full((2, FEATURES), float("nan"))
    prepared = rule.prepare((x,), max_norm=1.0)
    assert prepared.inputs[0] is x
    assert prepared.finite.all()
    assert prepared.norms is None


def test_a_layer_that_only_some_physical_batches_use_keeps_what_it_has() -> None:
    whole, parts = switchable(), switchable()
    for private in (whole, parts):
        private.optimizer.keep_summed_grad = True
    train_step(whole)
    head = [p.summed_grad.clone() for p in whole.handle._module.head.parameters()]
    parts.optimizer.signal_skip_step(do_skip=True)
    train_step(parts)
    parts.optimizer.zero_grad()
    tricked(lambda m, x: m.body(x)[:, :3])(parts)
    parts.optimizer.step()
    for p, expected in zip(parts.handle._module.head.parameters(), head, strict=True):
        assert torch.equal(p.summed_grad, expected)


@pytest.mark.parametrize("value", ["text", torch.tensor(1.0)], ids=["text", "scalar"])
def test_a_batch_of_unknown_size_is_refused(value: object) -> None:
    private = make_private(one_layer())
    with pytest.raises(CoverageError) as refusal:
        private.model(value)
    assert str(refusal.value) == (
        "The model's inputs contain no tensor with a batch axis, so the number of examples is "
        "unknown. Pass the batch as a tensor whose first axis is the batch."
    )


def test_a_recurrent_network_without_input_clipping_is_itself_in_evaluation() -> None:
    network = DPRNN(FEATURES, 2, batch_first=True)
    x = 100 * torch.ones(3, 5, FEATURES)
    with torch.no_grad():
        plain = network(x)[0]
        private = make_private(network, backprop=layerwise(max_input_norm=None))
        assert torch.equal(private.model(x)[0], plain)
