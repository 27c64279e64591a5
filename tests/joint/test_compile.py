"""A compiled model with one factor for all layers gives the eager gradient, or is refused."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.budgets import layerwise
from tests.helpers import Private, make_private, mlp
from tests.joint.helpers import joint

WIDTH, CLASSES = 4, 3
NEEDS_ONE_GRAPH = 'allocation="joint" measures all layers before it clips any'


class Scaled(nn.Module):
    """Parameters that are broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)


class ScaledRule(BroadcastRule):
    parameters = ("scale",)
    dims: ClassVar = {"scale": 2}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(RULES, Scaled, ScaledRule)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what these tests are about.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A body between a first layer and a head."""

    def __init__(self, body: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = body
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.scaled, self.act = Scaled(), nn.PReLU()
        self.words = nn.Embedding(5, WIDTH)
        if body == "tied":
            self.second.weight = self.first.weight
        for name in ("second", "scaled", "act", "words"):
            used = {"scaled": "broadcast", "act": "slopes", "words": "words"}.get(name, "")
            if name == "second" and body in ("plain", "broken", "tied", "checkpointed", "skipped"):
                continue
            if body != used:
                getattr(self, name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.kind == "broken":
            torch._dynamo.graph_break()
        if self.kind in ("plain", "broken", "tied"):
            y = self.second(y)
        elif self.kind == "twice":
            y = self.first(y)
        elif self.kind == "broadcast":
            y = self.scaled(y)
        elif self.kind == "slopes":
            y = self.act(y)
        elif self.kind == "words":
            y = y + self.words((x.abs() * 3).long() % 5).mean(1)
        elif self.kind == "checkpointed":
            y = checkpoint(lambda z: torch.tanh(self.second(z)), y, use_reentrant=False)
        return self.head(self.norm(y))


BODIES = ("plain", "twice", "tied", "broadcast", "slopes", "words", "checkpointed")


def _private(model: nn.Module, clipping: BackpropClipping, **options: object) -> Private:
    options = {"max_grad_norm": 0.5, "lr": 0.0} | options
    private = make_private(model, backprop=clipping, **options)
    private.handle._prober = _Unasked()
    return private


class _Unasked:
    """No made-up examples: these models are alike but for what they are called on."""

    def on_batch(self, batch: object) -> None:
        return None


def _batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, WIDTH, generator=generator) * 3
    return x, torch.randint(CLASSES, (size,), generator=generator)


def _summed(private: Private) -> Tensor:
    return torch.cat([p.summed_grad.flatten() for p in private.parameters]).clone()


def _step(private: Private, size: int, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    private.optimizer.zero_grad()
    x, y = _batch(size)
    F.cross_entropy(30 * (private.model if call is None else call)(x), y).backward()
    private.optimizer.step()
    return _summed(private)


def _check(
    private: Private,
    eager: Private,
    call: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...] = (5, 5),
) -> None:
    for size in sizes:
        torch.testing.assert_close(
            _step(private, size, call), _step(eager, size), rtol=1e-4, atol=1e-6
        )


def _clipping(allocation: str) -> BackpropClipping:
    if allocation == "joint":
        return joint()
    return layerwise(bound="exact", max_input_norm=None, uses={"first": 2})


@pytest.mark.parametrize("body", BODIES)
def test_a_compiled_model_gives_the_eager_gradient(body):
    clipping = joint()
    private, eager = _private(Model(body), clipping), _private(Model(body), clipping)
    _step(private, 4)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize(("bound", "normalize"), [("product", False), ("weighted", True)])
def test_other_bounds_compile(bound, normalize):
    clipping = joint(bound=bound, normalize=normalize)
    private, eager = _private(Model("twice"), clipping), _private(Model("twice"), clipping)
    _step(private, 4)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("allocation", ["joint", "dimension"])
def test_a_model_whose_hooks_are_on_itself_compiles(allocation):
    options = {"wrap_model": False}
    private, eager = (_private(mlp(), _clipping_of(allocation), **options) for _ in range(2))
    _step(private, 4)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


def _clipping_of(allocation: str) -> BackpropClipping:
    return joint() if allocation == "joint" else layerwise(bound="exact", max_input_norm=None)


def test_a_model_compiled_in_place_gives_the_eager_gradient():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    private.handle._module.compile(backend="aot_eager", fullgraph=True)
    _check(private, eager, private.model)


def test_a_compiled_loss_gives_the_eager_gradient():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    _check(
        private,
        eager,
        torch.compile(lambda x: private.model(x) * 1.0, backend="aot_eager", fullgraph=True),
    )


def test_the_default_backend_gives_the_eager_gradient():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    call = torch.compile(private.model, fullgraph=True)
    torch.testing.assert_close(_step(private, 5, call), _step(eager, 5), rtol=1e-4, atol=1e-6)


def test_dynamic_batch_sizes_give_the_eager_gradient():
    private, eager = _private(Model("twice"), joint()), _private(Model("twice"), joint())
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 3):
        found = _step(private, size, call)
        torch.testing.assert_close(found, _step(eager, size), rtol=1e-4, atol=1e-6)


def test_two_models_compiled_in_one_process_keep_apart():
    limits = (0.5, 0.01)
    privates = [_private(Model(), joint(), max_grad_norm=limit) for limit in limits]
    eager = [_private(Model(), joint(), max_grad_norm=limit) for limit in limits]
    for private in privates:
        _step(private, 4)
    calls = [torch.compile(p.model, backend="aot_eager", fullgraph=True) for p in privates]
    for size in (5, 5):
        for private, other, call in zip(privates, eager, calls, strict=True):
            found = _step(private, size, call)
            torch.testing.assert_close(found, _step(other, size), rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_compiled_private_model_is_clipped_to_its_own_limit():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    _step(private, 5, call)
    twin = copy.deepcopy(call)
    handle = twin._orig_mod
    handle._max_grad_norm = 0.01
    x, y = _batch(1)
    handle.zero_grad()
    handle._guard.clear()
    F.cross_entropy(1e3 * twin(x), y).backward()
    sums = [handle._guard.take(p) for p in handle._module.parameters() if p.requires_grad]
    total = torch.cat([s.flatten() for s in sums])
    assert 0.999 * 0.01 <= total.norm() <= 0.01
    torch.testing.assert_close(_step(private, 5, call), _step(eager, 5), rtol=1e-4, atol=1e-6)


def test_delta_can_be_set_between_compiled_steps():
    private = _private(Model(), joint(normalize=True))
    _step(private, 1)
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for limit in (1.0, 0.01, 2.0):
        private.optimizer.zero_grad()
        private.optimizer.max_grad_norm = limit
        assert 0.98 * limit <= _step(private, 1, call).norm() <= limit


def test_evaluation_between_compiled_steps_changes_nothing():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for size in (5, 5):
        call.eval()
        with torch.no_grad():
            call(_batch(7)[0])
        call.train()
        torch.testing.assert_close(
            _step(private, size, call), _step(eager, size), rtol=1e-4, atol=1e-6
        )


def test_eager_and_compiled_steps_take_turns():
    private, eager = _private(Model(), joint()), _private(Model(), joint())
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for size in (5, 5):
        for one in (call, None):
            torch.testing.assert_close(
                _step(private, size, one), _step(eager, size), rtol=1e-4, atol=1e-6
            )


def test_a_layer_that_is_skipped_leaves_the_budget_to_the_others():
    # A trainable layer that the compiled forward pass never comes to.
    private, eager = _private(Model("skipped"), joint()), _private(Model("skipped"), joint())
    _step(private, 4)
    _check(private, eager, torch.compile(private.model, backend="aot_eager", fullgraph=True))


def _released_or_refused(private: Private, call: Callable[[Tensor], Tensor]) -> str:
    """Take a step on one example; return the refusal, if any."""
    private.optimizer.zero_grad()
    x, y = _batch(1)
    try:
        F.cross_entropy(1e4 * call(x), y).backward()
        private.optimizer.step()
    except (PrivacyViolationError, RuntimeError) as error:
        private.optimizer.zero_grad()
        return str(error)
    # Not an AttributeError, an assertion or another accident.
    assert _summed(private).norm() <= private.optimizer.max_grad_norm
    return ""


@pytest.mark.parametrize(("wrap_model", "poisson_sampling"), [(True, True), (False, False)])
def test_a_graph_break_is_refused_by_name(wrap_model, poisson_sampling):
    private = _private(
        Model("broken"), joint(), wrap_model=wrap_model, poisson_sampling=poisson_sampling
    )
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager")
    for _ in range(2):
        assert NEEDS_ONE_GRAPH in _released_or_refused(private, call)
    # Without the compiler training goes on.
    assert _released_or_refused(private, private.model) == ""


def test_a_graph_break_is_no_harm_where_each_layer_has_a_budget():
    clipping = _clipping("dimension")
    private, eager = _private(Model("broken"), clipping), _private(Model("broken"), clipping)
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager")
    for size in (5, 5):
        found = _step(private, size, call)
        torch.testing.assert_close(found, _step(eager, size), rtol=1e-4, atol=1e-6)


class Blocks(nn.Module):
    """Two blocks that can be compiled by themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, :CLASSES]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_blocks_compiled_by_themselves_are_refused_by_name(which, poisson_sampling):
    private = _private(Blocks(), joint(), poisson_sampling=poisson_sampling, max_grad_norm=1e-3)
    _step(private, 4)
    for index in which:
        private.handle._module.blocks[index].compile(backend="aot_eager")
    for _ in range(2):
        assert NEEDS_ONE_GRAPH in _released_or_refused(private, private.model)


class PartlyEager(Model):
    """A layer that the compiler leaves alone, before the others or after them."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    @torch.compiler.disable
    def eager(self, x: Tensor) -> Tensor:
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.eager(x) if self.when == "before" else x)
        y = self.norm(y)
        return self.head(self.eager(y) if self.when == "between" else y)


@pytest.mark.parametrize(("when", "wrap_model"), [("before", False), ("between", True)])
def test_a_layer_left_to_eager_mode_is_refused(when, wrap_model):
    private = _private(PartlyEager(when), joint(), wrap_model=wrap_model)
    _step(private, 4)
    call = torch.compile(private.model, backend="aot_eager")
    for _ in range(2):
        assert _released_or_refused(private, call)
