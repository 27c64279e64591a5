"""Before training, what cannot be bounded is refused: by its path, with reason and remedy."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import CoverageError
from opacus_bpclip.model.coverage import trainable_layers
from opacus_bpclip.model.tying import tied_groups
from opacus_bpclip.rules import RULES, FunctionRule
from tests.followed import check_followed
from tests.helpers import make_private, mlp, train_step

HEADER = "Backpropagation clipping cannot bound every trainable parameter of this model:\n"


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class OddConv(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias)


class WithExtra(nn.Linear):
    """Inherits forward, but its bias is made of another parameter."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.extra = nn.Parameter(torch.ones(4))

    @property
    def bias(self) -> Tensor:
        return self.extra.square()


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


def patched_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    return layer


def lazy(kind: Callable[..., nn.Module], *arguments: int) -> nn.Module:
    with warnings.catch_warnings():
        # PyTorch says so of every lazy layer.
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        return kind(*arguments)


def half() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.float16)


def scripted() -> nn.Module:
    with pytest.warns(FutureWarning, match="jit.script"):
        return torch.jit.script(nn.Linear(4, 4))  # type: ignore[no-any-return]


def untrained(dtype: str) -> str:
    return (
        f"its parameters are torch.{dtype}. This dtype needs a GradScaler, whose scale depends on "
        "the data. Keep trainable parameters in torch.float32 or torch.bfloat16."
    )


NOT_YET = "is not initialised yet. Run one batch through the model first."


@pytest.mark.parametrize(
    ("make", "where", "problem"),
    [
        pytest.param(lambda: lazy(nn.LazyLinear, 4), "0 (LazyLinear)", NOT_YET, id="lazy linear"),
        pytest.param(
            lambda: lazy(nn.LazyConv2d, 4, 3), "0 (LazyConv2d)", NOT_YET, id="lazy convolution"
        ),
        pytest.param(half, "0 (Linear)", untrained("float16"), id="float16"),
        pytest.param(
            lambda: nn.Linear(4, 4, dtype=torch.complex64),
            "0 (Linear)",
            "its parameters are complex, and Opacus's noise is real. Keep real and imaginary parts "
            "in real parameters, and compute with them. Or freeze it (requires_grad=False).",
            id="complex",
        ),
        pytest.param(
            scripted,
            "0 (RecursiveScriptModule)",
            "it is TorchScript, and what that computes with its parameters cannot be followed. "
            "Use the module that it was made of, or freeze it (requires_grad=False).",
            id="TorchScript",
        ),
    ],
)
def test_what_cannot_be_bounded_is_refused(
    make: Callable[[], nn.Module], where: str, problem: str
) -> None:
    with pytest.raises(CoverageError) as refusal:
        trainable_layers(nn.Sequential(make(), nn.Linear(4, 4)))
    assert str(refusal.value) == f"{HEADER}- {where}: {problem}"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(Scale, (4,), id="raw parameter"),
        pytest.param(patched_forward, (4,), id="forward replaced on the instance"),
        pytest.param(lambda: OddConv(4, 4, 3), (4, 3, 3), id="overridden _conv_forward"),
        pytest.param(WithExtra, (4,), id="extra parameter"),
    ],
)
def test_what_no_rule_describes_is_bounded_by_the_functions_that_it_calls(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    layers = trainable_layers(nn.Sequential(make(), nn.Linear(4, 4)))
    assert [isinstance(layer.rule, FunctionRule) for layer in layers.values()] == [True, False]
    check_followed(make, torch.randn(4, *shape).double())


def test_a_parameter_of_the_model_itself_is_named_root() -> None:
    with pytest.raises(CoverageError) as refusal:
        trainable_layers(half())
    assert str(refusal.value) == f"{HEADER}- (root) (Linear): {untrained('float16')}"


def test_every_problem_is_listed_at_once() -> None:
    uninitialised = lazy(nn.LazyLinear, 4)
    model = nn.Sequential(half(), nn.Linear(4, 4), nn.Sequential(uninitialised, half()))
    with pytest.raises(CoverageError) as refusal:
        trainable_layers(model)
    assert str(refusal.value) == HEADER + "\n".join(
        [
            f"- 0 (Linear): {untrained('float16')}",
            f"- 2.0 (LazyLinear): {NOT_YET}",
            f"- 2.1 (Linear): {untrained('float16')}",
        ]
    )


def test_tied_weights_may_stay_where_they_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    assert list(trainable_layers(model)) == ["0", "2"]


@pytest.mark.parametrize(
    "model", [nn.Flatten(), mlp().requires_grad_(False)], ids=["none", "all frozen"]
)
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(CoverageError) as refusal:
        trainable_layers(model)
    assert str(refusal.value) == (
        "The model has no trainable parameter. Set requires_grad=True on the layers to train."
    )


def test_a_subclass_that_changes_nothing_is_accepted() -> None:
    layers = trainable_layers(nn.Sequential(Renamed(4, 4)))
    assert layers["0"].rule == RULES[nn.Linear].from_module(nn.Linear(4, 4))


def test_a_lazy_layer_is_accepted_once_it_is_initialised() -> None:
    model = nn.Sequential(lazy(nn.LazyLinear, 4))
    model(torch.zeros(2, 3))
    assert tied_groups(trainable_layers(model))["0"].size == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_precision_is_accepted(dtype: torch.dtype) -> None:
    assert list(trainable_layers(mlp(dtype=dtype))) == ["0", "2"]


@pytest.mark.parametrize(
    "frozen",
    [nn.LSTM(4, 4), Scale(), nn.Linear(4, 4, dtype=torch.bfloat16), nn.BatchNorm1d(4).eval()],
    ids=lambda module: type(module).__name__,
)
def test_a_frozen_layer_needs_no_rule(frozen: nn.Module) -> None:
    model = nn.ModuleList([frozen.requires_grad_(False), nn.Linear(4, 4)])
    assert list(trainable_layers(model)) == ["1"]


def test_size_and_parameters_count_what_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    layers = trainable_layers(model)
    first, second = layers.values()
    assert [group.size for group in tied_groups(layers).values()] == [32, 27]
    assert first.parameters == (model[0].weight,)
    assert second.parameters == (model[1].weight, model[1].bias)


def test_lora_style_fine_tuning_leaves_frozen_layers_without_hooks() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    private = make_private(model)
    assert list(private.optimizer.layer_sensitivities) == ["2"]
    for hooks in (model[0]._forward_hooks, model[0]._forward_pre_hooks):
        assert not hooks
    before = model[0].weight.clone()
    train_step(private)
    assert torch.equal(model[0].weight, before)


def test_batch_norm_in_evaluation_mode_mixes_no_examples_and_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False).eval())
    private = make_private(model)
    train_step(private)
    assert private.steps == 1
