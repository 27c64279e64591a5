"""`CrossEntropy` against torch, one example at a time, in different batches."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opacus_bpclip import CrossEntropy

CLASSES, LENGTH = 5, 4
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 4.0], dtype=torch.float64)


def drawn(examples: int, *, positions: bool, last: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(examples)
    shape = (examples, LENGTH) if positions else (examples,)
    logits = torch.randn(*shape, CLASSES, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(CLASSES, shape, generator=generator)
    return logits if last or not positions else logits.movedim(-1, 1), labels


def torchs_mean(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, labels, **options)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_without_weights_and_ignored_positions_it_is_torchs(positions, smoothing):
    logits, labels = drawn(7, positions=positions)
    for reduction in ("mean", "sum") if not positions else ("mean",):
        own = CrossEntropy(label_smoothing=smoothing, reduction=reduction)(logits, labels)
        theirs = torchs_mean(logits, labels, label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_an_examples_loss_is_torchs_mean_over_its_own_positions(last, smoothing):
    logits, labels = drawn(6, positions=True, last=last)
    labels[0, :2] = labels[1, 1:] = labels[2, 3] = -100
    own = CrossEntropy(
        label_smoothing=smoothing, reduction="none", class_axis=-1 if last else None
    )(logits, labels)
    rows = logits.movedim(-1, 1) if last else logits
    for i in range(len(labels)):
        alone = torchs_mean(rows[i : i + 1], labels[i : i + 1], label_smoothing=smoothing)
        torch.testing.assert_close(own[i], alone)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("positions", [False, True])
def test_class_weights_scale_terms_and_enter_no_divisor(positions, smoothing):
    logits, labels = drawn(6, positions=positions)
    options = {"weight": WEIGHT, "label_smoothing": smoothing}
    own = CrossEntropy(reduction="none", **options)(logits, labels)
    terms = F.cross_entropy(logits, labels, reduction="none", **options)
    torch.testing.assert_close(own, terms.flatten(1).mean(dim=1) if positions else terms)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_probabilities_are_as_good_as_classes(positions, weight):
    for axis in (1, -1) if positions else (1,):
        logits, _ = drawn(6, positions=positions, last=axis == -1)
        targets = torch.softmax(logits.flip(0), dim=axis)
        own = CrossEntropy(weight=weight, class_axis=axis)(logits, targets)
        rows = (x.movedim(axis, 1) for x in (logits, targets))
        torch.testing.assert_close(own, torchs_mean(*rows, weight=weight))


def test_another_ignore_index_is_ignored():
    logits, labels = drawn(3, positions=True)
    labels[:, 2] = 0
    own = CrossEntropy(ignore_index=0, reduction="none")(logits, labels)
    for i in range(3):
        alone = torchs_mean(logits[i : i + 1], labels[i : i + 1], ignore_index=0)
        torch.testing.assert_close(own[i], alone)


def test_an_example_without_counted_positions_contributes_exactly_zero():
    logits, labels = drawn(3, positions=True)
    labels[1] = -100
    logits.requires_grad_()
    for reduction in ("mean", "sum"):
        loss = CrossEntropy(reduction=reduction)(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert not gradient[1].any()
        assert gradient[0].any()


@pytest.mark.parametrize("shape", [(0, CLASSES), (0, CLASSES, LENGTH)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_gives_zero_with_a_graph(shape, reduction):
    logits = torch.zeros(shape, requires_grad=True)
    loss = CrossEntropy(reduction=reduction)(logits, torch.zeros(0, *shape[2:]).long())
    loss.backward()
    assert loss == 0
    assert logits.grad is not None


def test_a_language_model_predicts_the_next_token():
    logits, labels = drawn(5, positions=True, last=True)
    labels[0, 2:] = labels[1, :3] = labels[2] = -100
    own = CrossEntropy(shift=True, reduction="none")(logits, labels)
    assert own[2] == 0
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(own[i], torchs_mean(logits[i, :-1], labels[i, 1:]))
    first = CrossEntropy(shift=True, class_axis=1, reduction="none")
    torch.testing.assert_close(first(logits.movedim(-1, 1), labels), own)


@given(st.data())
def test_an_examples_term_depends_on_nothing_but_the_example(data):
    shift, last = data.draw(st.booleans()), data.draw(st.booleans())
    loss = CrossEntropy(
        weight=data.draw(st.sampled_from([None, WEIGHT])),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.2])),
        reduction="sum",
        shift=shift,
        class_axis=-1 if last else 1,
    )
    logits, _ = drawn(data.draw(st.integers(1, 4)), positions=True, last=last)
    ragged = st.lists(st.sampled_from([-100, 0, 1, 4]), min_size=LENGTH, max_size=LENGTH)
    labels = torch.tensor(data.draw(st.lists(ragged, min_size=len(logits), max_size=len(logits))))

    def gradient(keep: slice) -> Tensor:
        rows = logits[keep].detach().requires_grad_()
        (found,) = torch.autograd.grad(loss(rows, labels[keep]), rows)
        return found

    together = gradient(slice(None))
    for i in range(len(logits)):
        torch.testing.assert_close(together[i : i + 1], gradient(slice(i, i + 1)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: OrderedDict(loss=None, logits=logits),
        lambda logits: (torch.tensor(3.0), logits, "cache"),
        lambda logits: [logits],
    ],
    ids=["tensor", "object", "mapping", "tuple", "list"],
)
def test_logits_are_found_in_what_models_return(wrap):
    logits, labels = drawn(3, positions=False)
    # As Hugging Face's Trainer calls it; the private number of tokens changes nothing.
    own = CrossEntropy()(wrap(logits), labels, num_items_in_batch=torch.tensor(17))
    torch.testing.assert_close(own, torchs_mean(logits, labels))


@pytest.mark.parametrize("outputs", [{"scores": 1}, (torch.tensor(1.0),), None, "logits"])
def test_outputs_without_logits_are_refused(outputs):
    with pytest.raises(ValueError, match="contain no logits"):
        CrossEntropy()(outputs, torch.zeros(2).long())


@pytest.mark.parametrize(
    ("options", "logits", "labels"),
    [
        ({}, (2, LENGTH, CLASSES), (2 * LENGTH,)),
        ({}, (2, LENGTH, CLASSES), (2, LENGTH)),
        ({"class_axis": -1}, (2, CLASSES, LENGTH), (2, LENGTH)),
        ({}, (2, CLASSES), (3,)),
        ({}, (2, CLASSES), (2, 1)),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(options, logits, labels):
    with pytest.raises(
        ValueError, match=r"do not match labels of shape .* Each example is one row"
    ):
        CrossEntropy(**options)(torch.zeros(logits), torch.zeros(labels).long())


def test_logits_without_examples_are_refused():
    with pytest.raises(ValueError, match=r"Expected logits of shape \(5,\) to have an axis of ex"):
        CrossEntropy()(torch.zeros(CLASSES), torch.tensor(1))


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(2, CLASSES), torch.zeros(2).long()),
        (torch.zeros(2, LENGTH, CLASSES), torch.zeros(2, LENGTH, CLASSES)),
    ],
)
def test_only_sequences_of_classes_can_be_shifted(logits, labels):
    with pytest.raises(ValueError, match=r"shift=True needs integer labels of shape \[B, T\], got"):
        CrossEntropy(shift=True)(logits, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, 'Expected reduction=\'avg\' to be "mean", "sum" or "none".'),
        ({"label_smoothing": 1.1}, "Expected label_smoothing=1.1 to be in [0, 1]."),
        ({"class_axis": 2}, "Expected class_axis=2 to be 1 or -1."),
        ({"weight": torch.ones(1, 2)}, "Expected weight of shape (1, 2) to have one axis."),
    ],
)
def test_options_outside_their_values_are_refused(options, message):
    with pytest.raises(ValueError, match="Expected") as refusal:
        CrossEntropy(**options)
    assert str(refusal.value) == message


def test_it_can_be_copied_and_says_what_it_is():
    loss = CrossEntropy(weight=WEIGHT, shift=True)
    logits, labels = drawn(2, positions=True, last=True)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(logits, labels), loss(logits, labels))
    assert repr(CrossEntropy()) == (
        "CrossEntropy(ignore_index=-100, label_smoothing=0.0, reduction='mean', shift=False, "
        "class_axis=1)"
    )
