"""The traps of this method, one test each: named, with the module, the reason and the remedy.

Each model here trains without complaint in ordinary PyTorch, and would break the guarantee.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm
from torch.utils.data import TensorDataset

from opacus_bpclip import CoverageError, PrivacyViolationError
from opacus_bpclip.rules import supported_layers
from tests.helpers import (
    CLASSES,
    FEATURES,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
    loss_of,
    make_private,
    mlp,
    model_of,
    switchable,
    train_step,
    tricked,
)

HEADER = "Backpropagation clipping cannot bound every trainable parameter of this model:\n- "
REMEDIES = (
    f"Freeze it (requires_grad=False), build the model from supported layers "
    f"({', '.join(supported_layers())}), or write a rule for it and register that with "
    "opacus_bpclip.register_rule."
)
DIRECT = (
    "Use the parameter through its layer only, not directly (F.linear(x, layer.weight), a penalty "
    "on the weights in the loss)"
)
COUPLED = (
    "The bound holds for what an example contributes on its own; coupled examples move each "
    "other's gradients beyond it. Compute from each example alone: no mean, softmax, normalisation "
    "or division over the batch, no neighbours (GroupNorm or LayerNorm in place of BatchNorm). If "
    "you are certain that the loss never sees it, set BackpropClipping(probe=False)."
)
VALUES = "what it makes of one changes with the values of its companions in the batch. "
NUMBER = "what it makes of one changes with the number of its companions in the batch. "


def refused_before_training(model: nn.Module, message: str, data: TensorDataset | None = None):
    with pytest.raises(CoverageError) as refusal:
        make_private(model, data=data)
    assert str(refusal.value) == message


def refused_on_the_batch(trick: Callable[[Switchable, Tensor], object], message: str) -> None:
    private = switchable(lr=1.0)
    train_step(private)
    private.optimizer.zero_grad()
    with pytest.raises(PrivacyViolationError) as refusal:
        tricked(trick)(private)
    assert str(refusal.value) == message
    assert_refused_until_zero_grad(private)


class Around(nn.Module):
    """A layer, something done to its output, and a head."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.middle = nn.Linear(FEATURES, 8), middle
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body(x)))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# A parameter that its layer's rule never sees


def test_bypass_beside_the_layer() -> None:
    refused_on_the_batch(
        lambda m, x: m.head(h := m.body(x)) + F.linear(h, m.head.weight),
        f"head.weight got gradient from outside its layer's call, and nothing bounds it. {DIRECT}, "
        "and without hooks that change gradients.",
    )


def test_bypass_in_place_of_the_layer() -> None:
    refused_on_the_batch(
        lambda m, x: F.linear(m.body(x), m.head.weight),
        f"head.weight got a gradient that did not come from its layer's call. {DIRECT}; attach "
        "privacy before torch.compile.",
    )


def test_multihead_attention_bypasses_its_own_layer() -> None:
    # out_proj is a Linear, but nn.MultiheadAttention reads its weight and never calls it.
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0].mean(dim=1)

    refused_before_training(
        Attention(),
        f"{HEADER}attention (MultiheadAttention): no rule bounds the gradient of in_proj_weight, "
        f"in_proj_bias. PrivacyEngine.get_compatible_module replaces it. {REMEDIES}",
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_raw_parameter() -> None:
    refused_before_training(
        nn.Sequential(Scale(), *mlp()),
        f"{HEADER}0 (Scale): no rule bounds the gradient of gain. {REMEDIES}",
    )


class Unknown(nn.Module):
    """A layer of somebody's own: a matrix product, but not nn.Linear's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


def test_unknown_layer() -> None:
    refused_before_training(
        nn.Sequential(Unknown(FEATURES), *mlp()),
        f"{HEADER}0 (Unknown): no rule bounds the gradient of table. {REMEDIES}",
    )


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_overridden_forward() -> None:
    refused_before_training(
        nn.Sequential(Doubled(FEATURES, FEATURES), *mlp()),
        f"{HEADER}0 (Doubled): overrides Linear.forward, so the rule for Linear says nothing about "
        "it. Use Linear itself and put the extra work in a module around it.",
    )


def test_unfrozen_later() -> None:
    model = Switchable()
    model.head.bias.requires_grad_(False)
    private = make_private(model)
    train_step(private)
    private.optimizer.zero_grad()
    model.head.bias.requires_grad_(True)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == (
        "head.bias was frozen when make_private was called and has been unfrozen since: nothing "
        "clips its gradient. Unfreeze it first, then call make_private again."
    )
    model.head.bias.requires_grad_(False)
    assert_refused_until_zero_grad(private)


def test_used_twice_undeclared() -> None:
    refused_on_the_batch(
        lambda m, x: m.head(m.body(x)) + m.head(torch.tanh(m.body(x))),
        "body is used more than once in a forward pass: each use adds to one example's "
        "contribution, and the bound counts 1. Give each use its own layer, or declare how many "
        "there are: BackpropClipping(uses={'body': ...}).",
    )


# A weight that is not what the layer multiplies with

REWRITTEN = (
    "are not Linear's own; a reparametrization (weight_norm, spectral_norm, pruning) rewrites the "
    "weight in the forward pass, outside what the rule bounds. Remove it."
)


def test_weight_norm_old_style() -> None:
    with warnings.catch_warnings():
        # PyTorch announces the removal of the old style, which models in use still have.
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated")
        layer = weight_norm(nn.Linear(FEATURES, FEATURES))
    refused_before_training(
        nn.Sequential(layer, *mlp()),
        f"{HEADER}0 (Linear): its parameters weight_g, weight_v {REWRITTEN}",
    )


def test_pruning() -> None:
    layer = prune.l1_unstructured(nn.Linear(FEATURES, FEATURES), "weight", 0.5)
    refused_before_training(
        nn.Sequential(layer, *mlp()),
        f"{HEADER}0 (Linear): its parameters weight_orig {REWRITTEN}",
    )


@pytest.mark.parametrize(
    ("parametrize", "originals"),
    [
        pytest.param(parametrized_weight_norm, "original0, original1", id="weight norm"),
        pytest.param(spectral_norm, "original", id="spectral norm"),
    ],
)
def test_parametrization(parametrize: Callable[[nn.Module], nn.Module], originals: str) -> None:
    refused_before_training(
        nn.Sequential(parametrize(nn.Linear(FEATURES, FEATURES)), *mlp()),
        f"{HEADER}0.parametrizations.weight (ParametrizationList): no rule bounds the gradient of "
        f"{originals}. {REMEDIES}",
    )


def edit_data(m: Switchable, x: Tensor) -> Tensor:
    m.head.weight.data.mul_(1 + x.mean())
    return m.head(m.body(x))


def edit_without_grad(m: Switchable, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.head.weight.mul_(1 + x.mean())
    return m.head(m.body(x))


EDITED = (
    "head.weight was changed by the model's own forward pass: what it takes up from a batch is "
    "neither bounded nor noised. Compute with a changed copy of it, in a module with a rule, or "
    "change it between steps, from public values."
)


@pytest.mark.parametrize("edit", [edit_data, edit_without_grad], ids=["data", "no_grad"])
def test_weight_edited_in_the_forward_pass(
    edit: Callable[[Switchable, Tensor], Tensor],
) -> None:
    model = Switchable()
    model.trick = edit
    before = model.head.weight.clone()
    refused_before_training(model, EDITED)
    assert torch.equal(model.head.weight, before)


def test_weight_edited_in_a_later_forward_pass() -> None:
    refused_on_the_batch(edit_without_grad, EDITED)


# Examples that meet


class Table(nn.Module):
    """Adds a learned position embedding, made of a Linear layer over one-hot positions."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.positions = nn.Linear(2, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.eye(2)[None] if self.share else torch.eye(2).expand(len(x), 2, 2)
        return self.head(x[:, None] + self.positions(tokens)).mean(dim=1)


def test_broadcast_position_embedding() -> None:
    shared = make_private(Table(share=True))
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(shared)
    assert str(refusal.value) == (
        "positions got an input of shape (1, 2, 2) in a batch of 6 examples: its first axis must "
        "be the batch, or one factor would scale a mix of examples. Expand inputs that are shared "
        "by the batch (such as position embeddings) and keep the batch axis first."
    )
    train_step(make_private(Table(share=False)))


def test_batch_mean() -> None:
    refused_before_training(
        Around(Apply(lambda h: h - h.mean(dim=0))),
        f"middle (Apply) couples examples: {VALUES}{COUPLED}",
    )


def test_batchwise_softmax() -> None:
    refused_before_training(
        Around(Apply(lambda h: h.softmax(dim=0))),
        f"middle (Apply) couples examples: {VALUES}{COUPLED}",
    )


def test_division_by_the_batch_size() -> None:
    refused_before_training(
        Around(Apply(lambda h: h / len(h))), f"middle (Apply) couples examples: {NUMBER}{COUPLED}"
    )


def test_contrastive_similarities() -> None:
    refused_before_training(
        nn.Sequential(*mlp(), Apply(lambda h: F.normalize(h) @ F.normalize(h).T)),
        f"3 (Apply) couples examples: {VALUES}{COUPLED}",
    )


def test_contrastive_loss_inside_the_model() -> None:
    def info_nce(h: Tensor) -> Tensor:
        similarities = F.normalize(h) @ F.normalize(h).T
        return F.cross_entropy(similarities / 0.1, torch.arange(len(h)))

    refused_before_training(
        nn.Sequential(*mlp(), Apply(info_nce)),
        "The model returns a tensor without a batch axis that is not the mean of what its examples "
        "give alone, as loss_reduction='mean' has it. The bound holds for what an example "
        "contributes on its own; coupled examples move each other's gradients beyond it. Return "
        "one value for each example. If you are certain that the loss never sees it, set "
        "BackpropClipping(probe=False).",
    )


class GraphConvolution(nn.Module):
    """Mixes each node with the next one; the batch is the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + x.roll(1, dims=0))


def test_neighbour_mixing_as_in_a_graph_network() -> None:
    refused_before_training(
        nn.Sequential(GraphConvolution()),
        f"0 (GraphConvolution) couples examples: {VALUES}{COUPLED}",
    )


def test_neighbour_mixing_by_an_adjacency_matrix() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.linear(adjacency @ x)

    # A part of the nodes has no matrix of its own, so the model cannot be tried on it.
    private = make_private(Graph())
    with pytest.raises(PrivacyViolationError) as refusal:
        private.model(batch()[0], torch.eye(6).roll(1, dims=0))
    assert str(refusal.value) == (
        "Whether examples influence each other inside the model cannot be tried, since it does not "
        "run on a part of its batch (RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x6 "
        "and 4x4)): nothing would bound what one example does to the others. Pass the examples as "
        "tensors that have one row each, batch first. If you are certain that no example's output "
        "depends on another's, set BackpropClipping(probe=False)."
    )


def test_mixup_inside_the_model() -> None:
    refused_before_training(
        Around(Apply(lambda h: 0.9 * h + 0.1 * h[torch.randperm(len(h))])),
        f"middle (Apply) couples examples: {VALUES}{COUPLED}",
    )


MIXED = (
    "{} normalises over the batch: each example's value depends on its companions. Use GroupNorm "
    "(PrivacyEngine.get_compatible_module replaces it), or keep it in evaluation mode with running "
    "statistics."
)


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(lambda: nn.BatchNorm1d(8), id="trained"),
        pytest.param(lambda: nn.BatchNorm1d(8, affine=False), id="no parameters"),
        pytest.param(lambda: nn.BatchNorm1d(8).requires_grad_(False), id="frozen"),
        pytest.param(
            lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False).eval(),
            id="no running statistics",
        ),
    ],
)
def test_batch_norm(norm: Callable[[], nn.Module]) -> None:
    refused_before_training(Around(norm()), HEADER + MIXED.format("middle"))


def test_batch_norm_put_in_training_mode_later() -> None:
    # As a training loop's own model.train() does.
    private = make_private(Around(nn.BatchNorm1d(8, affine=False).eval()))
    private.model.train()
    with pytest.raises(PrivacyViolationError) as refusal:
        train_step(private)
    assert str(refusal.value) == MIXED.format("middle")
    model_of(private).middle.eval()
    assert_refused_until_zero_grad(private)


class Codebook(nn.Module):
    """Remembers a moving average of what it has seen, and adds nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(x.mean(dim=0), 0.1)
        return x


def test_buffer_that_takes_up_the_batch() -> None:
    refused_before_training(
        Around(Codebook()),
        "The buffer middle.average takes up values of the batch, and no noise is added to it: "
        "whoever gets the model gets them. Keep its module from updating it (evaluation mode, "
        "frozen statistics), or register it with persistent=False if it never influences an "
        "output.",
    )


def test_loss_of_several_batches() -> None:
    private = switchable()
    with pytest.raises(
        PrivacyViolationError,
        match=re.escape("head.bias got gradient from outside its layer's call, and nothing bounds"),
    ):
        (loss_of(private.model, *batch()) + loss_of(private.model, *batch())).backward()
