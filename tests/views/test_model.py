"""`FoldViews`: shapes, the user's loop, every way to read a loader, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import opacus
import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import AugmentedViews, BackpropClipping, CoverageError, FoldViews, PrivacyEngine
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.helpers import SEARCHES_FOR_NOISE, flat

VIEWS, CLASSES = 3, 4


def pictures(size: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 1, 6, 6, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (size,), generator=generator))


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def data() -> AugmentedViews:
    return AugmentedViews(pictures(), noisy, VIEWS, seed=7)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES)
    )


def private(model: nn.Module, data: Any, **options: Any) -> tuple[Any, ...]:
    """Make a model private with the noise off."""
    engine = options.pop("engine", None) or PrivacyEngine()
    made: tuple[Any, ...] = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(data, batch_size=6, generator=torch.Generator().manual_seed(3)),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        **{"clipping": "backprop"} | options,
    )
    return made


def trained(way: str, **options: Any) -> Tensor:
    """Return the parameters after two epochs of the user's loop."""
    inner, criterion = cnn(), nn.CrossEntropyLoss()
    torch.manual_seed(1)
    if way in ("criterion", "padded"):
        options["criterion"] = criterion
    if way == "padded":
        options["physical_batch_size"] = 4
    fixed = TensorDataset(*map(torch.stack, zip(*data(), strict=True)))
    model, optimizer, *criteria, loader = private(FoldViews(inner, VIEWS), fixed, **options)
    criterion = criteria[0] if criteria else criterion

    def epoch(batches: Any) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    for _ in range(2):
        if way == "physical batches":
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
            ) as parts:
                epoch(parts)
        else:
            epoch(loader)
    return flat(inner.parameters())


@pytest.mark.parametrize("way", ["criterion", "physical batches", "padded"])
@pytest.mark.parametrize("allocation", ["joint", "dimension"])
def test_every_way_to_read_and_to_sum_trains_the_same(allocation: str, way: str) -> None:
    options = {"backprop": BackpropClipping(allocation=allocation)}
    plain = trained("plain", **options)
    assert (plain - flat(cnn().parameters())).norm() > 0.1
    assert (trained(way, **options) - plain).norm() < 1e-5


def test_a_sum_adds_the_views_up_and_stays_within_its_sensitivity() -> None:
    model, optimizer, loader = private(FoldViews(cnn(), VIEWS), data(), loss_reduction="sum")
    optimizer.keep_summed_grad = True
    x, y = next(batch for batch in loader if len(batch[0]))
    nn.CrossEntropyLoss(reduction="sum")(model(x), y).backward()
    optimizer.step()
    assert 0 < flat(p.summed_grad for p in model.parameters()).norm() <= 0.1 * len(x)


def test_in_evaluation_the_model_is_what_it_is_alone() -> None:
    inner = cnn()
    fold = FoldViews(inner, VIEWS)
    x = torch.randn(5, VIEWS, 1, 6, 6)
    assert fold(x).shape == (5, CLASSES, VIEWS)
    assert torch.allclose(fold(x)[2, :, 1], inner(x[2, 1:2])[0], atol=1e-6)
    assert torch.equal(fold.eval()(x[:, 0]), inner(x[:, 0]))
    assert not FoldViews(cnn().eval(), VIEWS).training
    assert FoldViews(nn.Conv2d(1, 2, 3), 2)(x[:, :2]).shape == (5, 2, 4, 4, 2)


def test_arguments_by_keyword_are_folded_and_others_passed_on() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: Tensor, plus: int = 0) -> Tensor:
            return x * by + plus

    x = torch.randn(2, 3, 4)
    assert torch.equal(FoldViews(Scaled(), 3)(x, by=x, plus=1), (x * x + 1).movedim(1, -1))


def test_a_copy_trains_as_the_original() -> None:
    model, optimizer, loader = private(FoldViews(cnn(), VIEWS), data())
    made = [(model, optimizer, loader), copy.deepcopy((model, optimizer, loader))]
    for own, step, batches in made:
        for x, y in batches:
            step.zero_grad()
            nn.CrossEntropyLoss()(own(x), y).backward()
            step.step()
    found = [flat(own.parameters()) for own, _, _ in made]
    assert torch.equal(*found)
    made[1][0].eval()
    assert model(torch.zeros(4, VIEWS, 1, 6, 6)).shape == (4, CLASSES, VIEWS)


class Windows(nn.Module):
    """Folds two parts of each row into the batch once more."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Linear(18, 5), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.tanh(self.part(x.reshape(2 * len(x), 18)))
        return self.head(parts.view(len(x), 10))


class Scaled(nn.Module):
    """Has a parameter outside of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(36)), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) * self.scale)


class ScaledRule(BroadcastRule):
    """A rule of the user's for the parameter above."""

    parameters = ("scale",)
    dims: ClassVar = {"scale": 2}


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("make", [Windows, Scaled])
def test_functions_are_followed_where_a_rule_has_no_form_for_views(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], registered: bool
) -> None:
    if registered:
        monkeypatch.setitem(RULES, Scaled, ScaledRule)
    torch.manual_seed(0)
    inner = make()
    plain = copy.deepcopy(inner)
    model, optimizer, loader = private(FoldViews(inner, VIEWS), data())
    optimizer.keep_summed_grad = True
    x, y = next(batch for batch in loader if len(batch[0]) > 2)
    nn.CrossEntropyLoss()(model(x), y).backward()
    optimizer.step()
    found = flat(p.summed_grad for p in inner.parameters())
    total = torch.zeros_like(found)
    for views, labels in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(plain(views), labels)
        gradient = flat(torch.autograd.grad(loss, list(plain.parameters())))
        total += gradient * min(1.0, 0.1 / float(gradient.norm()))
    assert (found - total).norm() < 1e-4 * total.norm()


class Interleaved(nn.Module):
    """Has the first views of all examples before the second ones in its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x.flatten(1))).unflatten(0, (-1, VIEWS))
        y = self.second(y.transpose(0, 1).flatten(0, 1))
        return y.unflatten(0, (VIEWS, -1)).transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_views_that_do_not_stay_side_by_side_are_refused(allocation: str) -> None:
    with pytest.raises(CoverageError) as refusal:
        private(
            FoldViews(Interleaved(), VIEWS),
            data(),
            backprop=BackpropClipping(allocation=allocation),
        )
    assert str(refusal.value) == (
        "model.second (Linear): in FoldViews, each 3 rows side by side must be the views of one "
        "example, which are measured together. Here the rows are in another order: an example "
        "would contribute up to 3 times what the noise is made for. Keep the batch's order inside "
        "the model."
    )


NOT_VIEWS = (
    r"FoldViews got a tensor of shape \(2, 1, 6, 6\) in training, and needs \[B, 3, ...\], 3 views "
    r"of each example. Make the items with opacus_bpclip.AugmentedViews\(dataset, transform, "
    r"views=3\). To evaluate on single rows, call eval\(\) first."
)


def test_calls_that_are_not_of_views_are_refused() -> None:
    fold = FoldViews(cnn(), VIEWS)
    with pytest.raises(ValueError, match=NOT_VIEWS):
        fold(torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match="FoldViews was called without a tensor"):
        fold([torch.zeros(2, 3, 1, 6, 6)])
    with pytest.raises(TypeError, match="The model in FoldViews returns a tuple, and not a tensor"):
        FoldViews(nn.LSTM(4, 2, batch_first=True), 2)(torch.zeros(2, 2, 3, 4))
    for views in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"Expected views={views!r} to be an integer >= 1"):
            FoldViews(cnn(), views)  # type: ignore[arg-type]


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x[:, 0])[0][:, -1]

    return PrivacyEngine.get_compatible_module(Last(), clipping="backprop")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: FoldViews(nn.Sequential(FoldViews(cnn(), 3)), 3),
            {},
            "FoldViews is inside of two FoldViews",
        ),
        (
            lambda: FoldViews(cnn(), VIEWS),
            {"batch_first": False},
            "FoldViews has the examples on the first axis and the views on the second, but "
            "batch_first=False says that the examples are on the second. Leave batch_first out.",
        ),
        (
            lambda: FoldViews(recurrent(), VIEWS),
            {},
            "is a part of a recurrent network inside FoldViews",
        ),
    ],
    ids=["two folds", "batch second", "recurrent"],
)
def test_models_that_no_rule_bounds_are_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CoverageError) as refusal:
        private(make(), data(), **options)
    assert message in str(refusal.value)


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize("engine", [PrivacyEngine, opacus.PrivacyEngine])
@pytest.mark.parametrize(
    "options",
    [
        {"grad_sample_mode": "hooks"},
        {"grad_sample_mode": "functorch"},
        {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()},
    ],
    ids=["hooks", "functorch", "ghost"],
)
def test_opacus_own_modes_are_refused_before_they_count_views_as_examples(
    options: dict[str, Any], engine: type[opacus.PrivacyEngine]
) -> None:
    fold = FoldViews(cnn(), VIEWS)
    model, _, *_, loader = private(fold, data(), clipping="flat", engine=engine(), **options)
    x, _ = next(batch for batch in loader if len(batch[0]))
    with pytest.raises(
        ValueError, match="an example would contribute up to 3 times what the noise"
    ):
        model(x)


def test_a_loss_that_is_no_mean_of_examples_is_refused_by_the_criterion() -> None:
    model, _, criterion, loader = private(
        FoldViews(cnn(), VIEWS), data(), criterion=nn.CrossEntropyLoss()
    )
    x, y = next(batch for batch in loader if len(batch[0]) > 1)
    flat_output = model(x).movedim(-1, 1).flatten(0, 1)
    with pytest.raises(ValueError, match="Its rows are not the examples"):
        criterion(flat_output, y.flatten())
