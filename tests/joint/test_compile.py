"""A compiled model gives the eager gradient under the joint budget."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise
from tests.helpers import Private, mlp
from tests.joint.compiled import (
    Model,
    batch_of,
    private_of,
    step_of,
)
from tests.joint.helpers import joint

pytestmark = pytest.mark.usefixtures("fresh_compiler")


BODIES = ("plain", "twice", "tied", "broadcast", "slopes", "words", "checkpointed")


def _check(
    private: Private,
    eager: Private,
    call: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...] = (5, 5),
) -> None:
    for size in sizes:
        torch.testing.assert_close(
            step_of(private, size, call), step_of(eager, size), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("body", BODIES)
def test_a_compiled_model_gives_the_eager_gradient(body):
    clipping = joint()
    private, eager = private_of(Model(body), clipping), private_of(Model(body), clipping)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize(("bound", "normalize"), [("product", False), ("weighted", True)])
def test_other_bounds_compile(bound, normalize):
    clipping = joint(bound=bound, normalize=normalize)
    private, eager = private_of(Model("twice"), clipping), private_of(Model("twice"), clipping)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("allocation", ["joint", "dimension"])
def test_a_model_whose_hooks_are_on_itself_compiles(allocation):
    options = {"wrap_model": False}
    private, eager = (private_of(mlp(), _clipping_of(allocation), **options) for _ in range(2))
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


def _clipping_of(allocation: str) -> BackpropClipping:
    return joint() if allocation == "joint" else layerwise(bound="exact", max_input_norm=None)


def test_a_model_compiled_in_place_gives_the_eager_gradient():
    private, eager = private_of(Model(), joint()), private_of(Model(), joint())
    private.handle._module.compile(backend="aot_eager", fullgraph=True)
    _check(private, eager, private.model)


def test_a_compiled_loss_gives_the_eager_gradient():
    private, eager = private_of(Model(), joint()), private_of(Model(), joint())
    _check(
        private,
        eager,
        torch.compile(lambda x: private.model(x) * 1.0, backend="aot_eager", fullgraph=True),
    )


def test_two_models_compiled_in_one_process_keep_apart():
    limits = (0.5, 0.01)
    privates = [private_of(Model(), joint(), max_grad_norm=limit) for limit in limits]
    eager = [private_of(Model(), joint(), max_grad_norm=limit) for limit in limits]
    calls = [torch.compile(p.model, backend="aot_eager", fullgraph=True) for p in privates]
    for size in (5, 5):
        for private, other, call in zip(privates, eager, calls, strict=True):
            found = step_of(private, size, call)
            torch.testing.assert_close(found, step_of(other, size), rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_compiled_private_model_is_clipped_to_its_own_limit():
    private, eager = private_of(Model(), joint()), private_of(Model(), joint())
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    step_of(private, 5, call)
    twin = copy.deepcopy(call)
    handle = twin._orig_mod
    handle._max_grad_norm = 0.01
    x, y = batch_of(1)
    handle.zero_grad()
    handle._guard.clear()
    F.cross_entropy(1e3 * twin(x), y).backward()
    sums = [handle._guard.take(p) for p in handle._module.parameters() if p.requires_grad]
    total = torch.cat([s.flatten() for s in sums])
    assert 0.999 * 0.01 <= total.norm() <= 0.01
    torch.testing.assert_close(step_of(private, 5, call), step_of(eager, 5), rtol=1e-4, atol=1e-6)


def test_delta_can_be_set_between_compiled_steps():
    private = private_of(Model(), joint(normalize=True))
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for limit in (1.0, 0.01, 2.0):
        private.optimizer.zero_grad()
        private.optimizer.max_grad_norm = limit
        assert 0.98 * limit <= step_of(private, 1, call).norm() <= limit


def test_evaluation_between_compiled_steps_changes_nothing():
    private, eager = private_of(Model(), joint()), private_of(Model(), joint())
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for size in (5, 5):
        call.eval()
        with torch.no_grad():
            call(batch_of(7)[0])
        call.train()
        torch.testing.assert_close(
            step_of(private, size, call), step_of(eager, size), rtol=1e-4, atol=1e-6
        )


def test_eager_and_compiled_steps_take_turns():
    private, eager = private_of(Model(), joint()), private_of(Model(), joint())
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for size in (5, 5):
        for one in (call, None):
            torch.testing.assert_close(
                step_of(private, size, one), step_of(eager, size), rtol=1e-4, atol=1e-6
            )


def test_a_layer_that_is_skipped_leaves_the_budget_to_the_others():
    # A trainable layer that the compiled forward pass never comes to.
    private, eager = private_of(Model("skipped"), joint()), private_of(Model("skipped"), joint())
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))
