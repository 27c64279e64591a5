"""Models that mix examples: each is refused by name, with the reason and the remedy.

Only positions that the whole batch shares train: each example's part of their gradient is its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.followed import check_followed
from tests.helpers import (
    CLASSES,
    FEATURES,
    assert_refused_until_zero_grad,
    batch,
    loss_of,
    make_private,
    mlp,
    model_of,
    switchable,
    train_step,
)
from tests.traps import HEADER, refused_before_training

COUPLED = (
    "The bound holds for an example's own contribution; in a model that couples examples, one "
    "example also changes the contributions of others. Compute each example's output from that "
    "example alone: no mean, softmax, normalisation or division over the batch, no other rows "
    "(GroupNorm or LayerNorm in place of BatchNorm). If you are certain that the loss never uses "
    "it, set BackpropClipping(probe=False)."
)
VALUES = "its output for one example changes with the values of the other examples in the batch. "
NUMBER = "its output for one example changes with the number of other examples in the batch. "


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


class Table(nn.Module):
    """Adds a learned position embedding, made of a Linear layer over one-hot positions."""

    def __init__(self, share: bool) -> None:
        super().__init__()
        self.positions = nn.Linear(2, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.eye(2, dtype=x.dtype)[None]
        if not self.share:
            tokens = tokens.expand(len(x), 2, 2)
        return self.head(x[:, None] + self.positions(tokens)).mean(dim=1)


@pytest.mark.parametrize("share", [True, False])
def test_position_embedding_of_the_whole_batch_counts_for_each_example(share: bool) -> None:
    check_followed(lambda: Table(share))


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
        "The model returns a tensor without a batch axis that is not the mean of its values for "
        "each example alone, which loss_reduction='mean' requires. A loss that divides by the "
        "number of tokens or labels that count in the whole batch (ignored positions, padding, "
        "class weights) is an example. The bound holds for an example's own contribution; in a "
        "model that couples examples, one example also changes the contributions of others. "
        "Return one loss for each example; or do not pass the labels to the model, and compute "
        "the loss from its logits with the criterion that "
        "make_private(criterion=opacus_bpclip.CrossEntropy(ignore_index=...)) returns, which a "
        "transformers Trainer takes as compute_loss_func. If you are certain that the loss never "
        "uses this tensor, set BackpropClipping(probe=False).",
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
        "Whether examples influence each other inside the model cannot be tried, since it does "
        "not run on a part of its batch (RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(4x6 and 4x4)): one example might change the contributions of others. Pass the examples "
        "as tensors that have one row each, batch first. If you are certain that no example's "
        "output depends on another's, set BackpropClipping(probe=False). The argument of "
        "shape (6, 6) is taken for one row of each example, since it is as long as the batch. If "
        "it is the same for all examples (a mask over pairs of tokens), make it a buffer of the "
        "model (register_buffer), or expand it to one for each example; with physical_batch_size, "
        "another size helps, too."
    )


def test_mixup_inside_the_model() -> None:
    refused_before_training(
        Around(Apply(lambda h: 0.9 * h + 0.1 * h[torch.randperm(len(h))])),
        f"middle (Apply) couples examples: {VALUES}{COUPLED}",
    )


MIXED = (
    "{} normalises over the batch, so each example's output depends on the other examples. "
    'PrivacyEngine.get_compatible_module(model, clipping="backprop") replaces it. Or use '
    "GroupNorm, or keep it in evaluation mode with running statistics."
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
        "The buffer middle.average stores values computed from the batch, without noise: the "
        "trained model would contain private data. Keep its module from updating it (evaluation "
        "mode, frozen statistics). Later outputs and gradients did not depend on it: if you only "
        "watch it, register it with persistent=False, and keep it out of all that you publish.",
    )


def test_loss_of_several_batches() -> None:
    private = switchable()
    with pytest.raises(
        PrivacyViolationError,
        match="One backward pass came from two forward passes of the model",
    ):
        (loss_of(private.model, *batch()) + loss_of(private.model, *batch())).backward()
