"""``make_private(criterion=...)``: the mean's value, and the sum's gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
import transformers
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipCriterion,
    BackpropClipHooks,
    CrossEntropy,
    PrivacyEngine,
    PrivacyViolationError,
    register,
    unregister,
)
from tests.budgets import layerwise
from tests.criteria import LENGTH, on_sequences, sequences, training
from tests.helpers import CLASSES, FEATURES, batch, dataset, flat, mlp
from tests.test_compile import fresh_compiler  # noqa: F401


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_trains_as_a_plain_mean_does(wrap_model, normalize, dtype):
    options = {"backprop": layerwise(normalize=normalize), "wrap_model": wrap_model}
    data = TensorDataset(dataset().tensors[0].to(dtype), dataset().tensors[1])
    plain, exact = (
        training(criterion, mlp(dtype=dtype), data=data, **options)
        for criterion in (None, nn.CrossEntropyLoss())
    )
    for size in (6, 1, 0, 4):
        x, y = batch(size)
        one, other = (t.sum_over(x.to(dtype), y, scale=20) for t in (plain, exact))
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
        grads = [flat(p.grad for p in t.optimizer.params) for t in (plain, exact)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)
        if size:
            value = exact.criterion(exact.model(x.to(dtype)), y)
            torch.testing.assert_close(value, F.cross_entropy(exact.model(x.to(dtype)), y))


@pytest.mark.parametrize("scale", [20.0, 1 / 4])
def test_the_gradient_is_the_sums_to_the_bit_and_knows_no_companions(scale):
    logits = torch.randn(7, CLASSES, requires_grad=True)
    y = torch.arange(7) % CLASSES
    criterion = BackpropClipCriterion(nn.CrossEntropyLoss())
    criterion.watch.enter_forward(None)
    (own,) = torch.autograd.grad(scale * criterion(logits, y), logits)
    (of_sum,) = torch.autograd.grad(scale * F.cross_entropy(logits, y, reduction="sum"), logits)
    assert torch.equal(own, of_sum)


def test_an_empty_batch_has_a_loss_of_zero_and_a_graph():
    t = training(nn.CrossEntropyLoss())
    loss = t.criterion(t.model(torch.zeros(0, FEATURES)), torch.zeros(0).long())
    assert loss == 0
    loss.backward()
    t.optimizer.step()
    assert not flat(p.summed_grad for p in t.optimizer.params).any()


# What a criterion makes of one example is what torch's own mean makes of it alone.
CRITERIONS = {
    "cross-entropy": (nn.CrossEntropyLoss(), (4, CLASSES, LENGTH), "ragged"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), (4, CLASSES, LENGTH), "ragged"),
    "nll": (nn.NLLLoss(ignore_index=1), (4, CLASSES, LENGTH), "ragged"),
    "probabilities": (nn.CrossEntropyLoss(), (4, CLASSES), "floats"),
    "squares": (nn.MSELoss(), (4, CLASSES, LENGTH), "floats"),
    "bce": (nn.BCEWithLogitsLoss(), (4, CLASSES), "floats"),
    "huber": (nn.SmoothL1Loss(), (4,), "floats"),
    "hinge": (nn.MultiMarginLoss(), (4, CLASSES), "classes"),
    "own": (CrossEntropy(), (4, CLASSES, LENGTH), "ragged"),
}


@pytest.mark.parametrize("case", CRITERIONS.values(), ids=CRITERIONS)
def test_each_example_gets_torchs_own_mean_over_it(case):
    criterion, shape, kind = case
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    y: Tensor
    if kind == "floats":
        y = torch.softmax(torch.randn(shape, generator=generator), dim=-1)
    else:
        y = torch.randint(CLASSES, (shape[0], *shape[2:]), generator=generator)
    if kind == "ragged":
        ignored = criterion.ignore_index
        y[...] = 2
        y[0, 1:] = y[1, :1] = ignored
    private = BackpropClipCriterion(criterion)
    alone = torch.stack([criterion(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(private(x, y), alone.mean())
    added = copy.deepcopy(criterion)
    added.reduction = "sum"
    private = BackpropClipCriterion(added, loss_reduction="sum")
    torch.testing.assert_close(private(x, y), added(x, y))


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_class_weights_and_ignored_labels_enter_no_divisor(kind):
    weight = torch.tensor([1.0, 5.0, 0.1])
    x, y = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, -100])
    private = BackpropClipCriterion(kind(weight=weight))
    terms = kind(weight=weight, reduction="none")(x, y)
    assert terms[3] == 0
    torch.testing.assert_close(private(x, y), terms.sum() / 4)
    torch.testing.assert_close(private(x, target=y), terms.sum() / 4)


@pytest.mark.parametrize("by_name", [False, True])
def test_connectionist_losses_are_divided_by_each_examples_target_length(by_name):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, CLASSES, generator=generator).log_softmax(dim=-1)
    y, given = torch.tensor([[1, 2, 1], [2, 0, 0], [1, 1, 0]]), torch.tensor([6, 5, 6])
    lengths = torch.tensor([3, 1, 2])
    private = BackpropClipCriterion(nn.CTCLoss())
    found = (
        private(x, y, given, target_lengths=lengths) if by_name else private(x, y, given, lengths)
    )
    torch.testing.assert_close(found, nn.CTCLoss()(x, y, given, lengths))


def test_class_weights_do_not_couple_examples():
    # 1.8 times the claim with torch's weighted mean, behind a plain loss.
    weight = torch.tensor([1.0, 1.0, 1000.0])
    t = training(nn.CrossEntropyLoss(weight=weight), max_grad_norm=0.01)
    x, y = dataset(64).tensors
    y = torch.cat([y[:-1].clamp(max=1), torch.tensor([2])])
    moved = (t.sum_over(x, y, scale=100) - t.sum_over(x[:-1], y[:-1], scale=100)).norm()
    assert moved <= 0.01 * (1 + 1e-3)


@pytest.mark.parametrize(
    "criterion", [CrossEntropy(), CrossEntropy(class_axis=1), nn.CrossEntropyLoss()]
)
def test_ragged_labels_do_not_couple_examples(criterion):
    t = on_sequences(criterion, max_grad_norm=0.01)
    x, y = sequences(64)
    y[:-1, 1:] = -100  # one token each, and the last example has all
    moved = (t.sum_over(x, y, scale=100) - t.sum_over(x[:-1], y[:-1], scale=100)).norm()
    assert moved <= 0.01 * (1 + 1e-3)


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("with_epsilon", [False, True])
def test_every_engine_returns_it_when_it_was_passed_and_only_then(stock, with_epsilon):
    if stock:
        register()
    try:
        engine = (opacus.PrivacyEngine if stock else PrivacyEngine)(accountant="gdp")
        call, options = engine.make_private, {"noise_multiplier": 1.0}
        if with_epsilon:
            call = engine.make_private_with_epsilon
            options = {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1}
        data = dataset()
        for criterion in ({}, {"criterion": None}, {"criterion": nn.CrossEntropyLoss()}):
            model = mlp()
            made = call(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
                data_loader=DataLoader(data, batch_size=8),
                max_grad_norm=1.0,
                clipping="backprop",
                **criterion,
                **options,
            )
            assert len(made) == (4 if any(criterion.values()) else 3)
        assert isinstance(made[2], BackpropClipCriterion)
        assert isinstance(made[3], DataLoader)
        x, y = next(iter(made[3]))
        made[2](made[0](x), y).backward()
        made[1].step()
    finally:
        unregister()


def test_the_original_is_left_alone():
    original = nn.CrossEntropyLoss()
    training(original).sum_over(*batch())
    assert original.reduction == "mean"


def test_physical_batches_are_one_batch():
    t = training(nn.CrossEntropyLoss(), noise_multiplier=1.0)
    steps = 0
    with BatchMemoryManager(
        data_loader=t.loader, max_physical_batch_size=2, optimizer=t.optimizer
    ) as loader:
        for x, y in loader:
            t.sum_over(x, y)
            steps += not t.optimizer._is_last_step_skipped
    assert steps == len(t.loader)


def test_evaluation_takes_any_number_of_rows():
    t = training(nn.CrossEntropyLoss())
    x, y = batch(6)
    loss = t.criterion(t.model(x), y)
    with torch.no_grad():
        assert t.criterion(t.model(x[:2]), y[:2]) > 0
    loss.backward()
    t.optimizer.step()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_computes_the_same_and_belongs_to_no_model(again):
    t = training(CrossEntropy(label_smoothing=0.1))
    x, y = batch()
    t.sum_over(x, y)
    other = again(t.criterion)
    with torch.no_grad():
        assert torch.equal(other(t.model(x), y), t.criterion(t.model(x), y))
    with pytest.raises(ValueError, match="The model of this criterion has made no forward pass"):
        other(t.model(x), y)
    other.watch.enter_forward(len(x))  # as a model copied with it would
    with pytest.raises(PrivacyViolationError, match="did not come through the criterion"):
        other(t.model(x), y).backward()


def test_hooks_without_an_engine_take_one_too():
    model = mlp()
    criterion = BackpropClipCriterion(nn.CrossEntropyLoss())
    hooks = BackpropClipHooks(model, criterion=criterion)
    x, y = batch()
    criterion(model(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="did not come through the criterion"):
        F.cross_entropy(model(x), y).backward()
    hooks.cleanup()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("loss_too", [False, True])
def test_compiled_models_and_losses_train_like_eager_ones(loss_too):
    eager, fast = (training(nn.CrossEntropyLoss()) for _ in range(2))
    fast.sum_over(*batch())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fast.criterion(fast.model(x), y)

    if loss_too:
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    else:
        model = torch.compile(fast.model, backend="aot_eager", fullgraph=True)
        compiled = lambda x, y: fast.criterion(model(x), y)  # noqa: E731
    for size in (6, 4):
        x, y = batch(size)
        torch.testing.assert_close(fast.step(lambda: compiled(x, y)), eager.sum_over(x, y))  # noqa: B023
    if not loss_too:
        with pytest.raises(PrivacyViolationError, match="did not come through the criterion"):
            F.cross_entropy(model(x), y).backward()


def test_a_causal_language_model_trains_on_ragged_labels():
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    torch.manual_seed(0)

    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: Tensor) -> Any:
            places = torch.arange(ids.shape[1]).expand_as(ids)
            return self.model(input_ids=ids, position_ids=places)

    ids = torch.randint(11, (16, 8))
    labels = ids.clone()
    for i in range(16):
        labels[i, 1 + i % 7 :] = -100
    options = {"data": TensorDataset(ids, labels), "max_grad_norm": 0.01}
    options["backprop"] = layerwise(uses="auto")
    t = training(CrossEntropy(shift=True), WithPositions(), **options)

    def total(rows: slice) -> Tensor:
        # As Trainer(compute_loss_func=...) calls it.
        return t.step(lambda: t.criterion(t.model(ids[rows]), labels[rows], num_items_in_batch=3))

    assert (total(slice(16)) - total(slice(15))).norm() <= 0.01 * (1 + 1e-3)
