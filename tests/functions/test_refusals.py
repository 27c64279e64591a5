"""Functions on parameters that cannot be followed are refused, with the reason."""

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyViolationError
from tests.checks import Trainer, linear_loss


class Made(nn.Module):
    """A model made from its forward."""

    def __init__(self, forward, **parameters: Tensor) -> None:
        super().__init__()
        self.compute = forward
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def _run(model: nn.Module, x: Tensor) -> None:
    Trainer(model, tuple(x.shape[1:]), BackpropClipping(), probe=True).model(x)


def _step(model: nn.Module, x: Tensor) -> None:
    trainer = Trainer(model, tuple(x.shape[1:]), BackpropClipping(), probe=True)
    trainer.step(x, torch.ones_like(trainer.plain(x)).detach())


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w * w, (2 * g * x * w).sum(0)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.round()

    @staticmethod
    def backward(ctx, g):
        return g


def _changed_later(s: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(x)
    y = torch.einsum("bi,i->bi", h, s.w)
    h.detach().zero_()
    return y + h


def _selected(s: nn.Module, x: Tensor) -> Tensor:
    chosen = x[:, 0] > 1e6
    return x.masked_scatter(chosen[:, None], x[chosen] * s.w)


def _sorted_by_a_draw(s: nn.Module, x: Tensor) -> Tensor:
    order = torch.rand(len(x)).argsort()
    return (x[order] * s.w)[order.argsort()]


def _copies_in(order: Tensor, s: nn.Module, x: Tensor) -> Tensor:
    """Add copies of a parameter to the sorted examples, and put these back in order."""
    copies = s.w.expand(len(x), -1)
    return (x[order] * copies.view(len(x), *[1] * (x.dim() - 2), -1))[order.argsort()]


def _sorted_by_length(s: nn.Module, x: Tensor) -> Tensor:
    lengths = (x.abs().sum(-1) > 0).sum(-1)
    return _copies_in(lengths.argsort(descending=s.descending, stable=True), s, x).flatten(1)


def _sorted_by_a_mask(s: nn.Module, x: Tensor) -> Tensor:
    shown = (x > 0).any(-1).long()
    order = shown.argsort(descending=s.descending, stable=True)
    y = x[..., :1].to(s.w.dtype) * 0 + torch.ones_like(s.w)
    return _copies_in(order, s, y)


def _rolled(s: nn.Module, x: Tensor) -> Tensor:
    by = int(torch.randint(len(x), ()))
    return _copies_in(torch.arange(len(x)).roll(by), s, x)


W = torch.arange(1.0, 5.0)
REFUSED = {
    "rows of the parameter by the place in the batch": (
        lambda s, x: x + s.w[: len(x)],
        {"w": torch.randn(16, 4)},
        "couples examples",
    ),
    "rows in another order": (lambda s, x: (x.flip(0) * s.w).flip(0), {"w": W}, "the same places"),
    "half the batch after the other": (
        lambda s, x: (x.roll(len(x) // 2, 0) * s.w).roll(-(len(x) // 2), 0),
        {"w": W},
        "the same places",
    ),
    "copies in another order": (
        lambda s, x: x * s.w.expand(len(x), -1).flip(0),
        {"w": W},
        "the same places",
    ),
    "a custom autograd function": (lambda s, x: Squared.apply(x, s.w), {"w": W}, "s.w|w got"),
    "an argument that is changed after the call": (_changed_later, {"w": W}, "changed in place"),
    "an argument that would lose its gradient": (
        lambda s, x: torch.addcmul(s.b, x, Rounded.apply(s.w)),
        {"w": W, "b": W},
        "would be lost|got gradient|got a gradient",
    ),
    "a selection by values": (_selected, {"w": W}, "does not have one row for each of them"),
    "rows sorted by a random number": (_sorted_by_a_draw, {"w": W}, "the same places"),
    "a loop over the examples": (
        lambda s, x: torch.stack([row * s.w for row in x]),
        {"w": W},
        "other functions on a part of a batch",
    ),
    "a branch on the values of a batch": (
        lambda s, x: x * s.w if bool((x < 100).all()) else x - s.w,
        {"w": W},
        "did not occur in the trial run",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    forward, parameters, says = REFUSED[name]
    x = torch.randn(6, 4).double()
    if "values" in name:
        x[0] = 200
    with pytest.raises((CoverageError, PrivacyViolationError), match=says):
        _step(Made(forward, **parameters), x)


@pytest.mark.parametrize("flipped", [False, True])
def test_complex_numbers_are_refused(flipped):
    # The rows of the flipped ones are others' than is seen.
    def compute(s: nn.Module, x: Tensor) -> Tensor:
        constant = torch.view_as_complex(s.w).expand(len(x), -1)
        return x + torch.view_as_real(constant.flip(0) if flipped else constant * 1).flatten(1)

    with pytest.raises(CoverageError, match="computes with complex numbers"):
        _run(Made(compute, w=torch.randn(1, 2, 2).double()), torch.randn(4, 4).double())


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("compute", [_sorted_by_length, _sorted_by_a_mask, _rolled])
def test_copies_that_meet_sorted_examples_are_refused(compute, descending):
    model = Made(compute, w=W)
    model.descending = descending
    x = (
        torch.randn(6, 3, 4).double()
        if compute is _sorted_by_length
        else torch.randn(6, 4).double()
    )
    if compute is _sorted_by_a_mask:
        x = torch.randint(2, (6, 4))
    with pytest.raises((CoverageError, PrivacyViolationError), match="the same places"):
        _run(model, x)


class Flat(nn.Module):
    """Takes the tokens of all examples in one flat argument."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 2), nn.Linear(4, 2)
        self.raw = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.linear(x)
        if ids.is_floating_point():
            return y + (ids.sum() * 2) * self.raw
        return y + self.table(ids).mean(0)


def test_data_that_belongs_to_no_example_is_refused_where_a_layer_meets_it():
    trainer = Trainer(Flat(), (4,), BackpropClipping(), probe=True)
    with pytest.raises(PrivacyViolationError, match="table got an input of shape"):
        trainer.model(torch.randn(3, 4).double(), torch.arange(7))


def test_data_that_belongs_to_no_example_is_refused_where_a_parameter_meets_it():
    trainer = Trainer(Flat(), (4,), BackpropClipping(), probe=True)
    with pytest.raises(PrivacyViolationError, match=r"raw.*does not have one row for each example"):
        trainer.model(torch.randn(3, 4).double(), torch.ones(7).double())


def _train(model: nn.Module, trainer: Trainer, x: Tensor) -> None:
    linear_loss(model(x), torch.ones_like(x), "mean").backward()
    trainer.optimizer.step()


@pytest.mark.parametrize("whole", [True, False])
def test_no_compiled_graph_trains_them_unclipped(whole):
    model = Made(lambda s, x: x * s.w, w=W.clone())
    trainer = Trainer(model, (4,), BackpropClipping(), probe=True)
    x = torch.randn(3, 4).double()
    trainer.step(x, torch.ones(3, 4).double())
    torch._dynamo.reset()
    compiled = torch.compile(trainer.model if whole else trainer.plain, backend="eager")
    with pytest.raises(PrivacyViolationError):
        _train(compiled, trainer, x)


class Forms(nn.Module):
    """Uses its embedding's weight by a function in one of two ways of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, ids: Tensor, tied: bool = False) -> Tensor:
        y = self.table(ids).sum(1)
        return torch.nn.functional.linear(y, self.table.weight) if tied else y


def _train_on(model: nn.Module, trainer: Trainer, ids: Tensor) -> None:
    model(ids, tied=True).sum(1).mean().backward()
    trainer.optimizer.step()


def test_a_compiled_graph_of_another_form_than_was_run_is_refused():
    trainer = Trainer(Forms(), (4,), BackpropClipping(), probe=True)
    ids = torch.ones(3, 4, dtype=torch.long)
    trainer.step(ids, torch.ones(3, 3).double())
    torch._dynamo.reset()
    compiled = torch.compile(trainer.model, backend="aot_eager")
    trainer.optimizer.zero_grad()
    with pytest.raises(
        PrivacyViolationError,
        match=r"table\.weight got gradient from outside its layer's call.*Train without "
        r"torch\.compile, or register a rule",
    ):
        _train_on(compiled, trainer, ids)
    # As the text says:
    trainer.optimizer.zero_grad()
    _train_on(trainer.model, trainer, ids)


@pytest.mark.parametrize("alone", [False, True])
def test_a_derived_tensor_that_the_model_returns_has_no_place_in_the_loss(alone):
    model = Made(lambda s, x: (x * s.w, 2 * s.w), w=torch.ones(3))
    trainer = Trainer(model, (3,), BackpropClipping(), probe=True)
    y, derived = trainer.model(torch.ones(2, 3).double())
    with pytest.raises(PrivacyViolationError, match=r"w got a gradient that was not clipped"):
        (derived.sum() if alone else y.sum() + derived.sum()).backward()
    with pytest.raises(PrivacyViolationError, match=r"w got a gradient that was not clipped"):
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.model(torch.ones(2, 3).double())[0].sum().backward()
    trainer.optimizer.step()
