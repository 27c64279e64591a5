"""Losses inside a model that divide by how much of the whole batch counts are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip import CoverageError, PrivacyEngine
from opacus_bpclip.probe import Batch, ragged
from opacus_bpclip.probe.values import invented
from tests.helpers import CLASSES, FEATURES
from tests.probing import found, made_up

transformers = pytest.importorskip("transformers")

LENGTH = 8
IDS = torch.zeros(4, LENGTH, dtype=torch.long)
FLAGS = torch.zeros(4, dtype=torch.long)
SMALL = {"vocab_size": 20, "num_labels": 3}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
REMEDY = (
    "Return one loss for each example; or do not pass the labels to the model, and compute the "
    "loss from its logits with the criterion that "
    "make_private(criterion=opacus_bpclip.CrossEntropy(ignore_index=...)) returns, which a "
    "transformers Trainer takes as compute_loss_func."
)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **SMALL, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bert(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = transformers.BertConfig(**SMALL, **BERT, intermediate_size=16)
        return getattr(transformers, f"BertFor{kind}")(config)

    return make


TOKEN_MEANS = [
    pytest.param(gpt2, id="GPT-2"),
    pytest.param(t5, id="T5"),
    pytest.param(bert("TokenClassification"), id="token classification"),
    pytest.param(bert("MaskedLM"), id="masked language model"),
]


@pytest.mark.parametrize("make", TOKEN_MEANS)
def test_a_mean_over_the_tokens_that_count_is_refused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    text = found(make(), made_up(input_ids=IDS, attention_mask=IDS.clone(), labels=IDS.clone()))
    assert text is not None
    assert text.startswith("The model returns a tensor without a batch axis that is not the mean")
    assert REMEDY in text


@pytest.mark.parametrize("make", TOKEN_MEANS)
def test_the_remedy_of_leaving_the_labels_out_passes(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    inputs: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": IDS.clone()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.clone()
    assert found(model, made_up(**inputs)) is None


def test_one_label_for_each_example_still_passes() -> None:
    torch.manual_seed(0)
    batch = made_up(
        input_ids=IDS, attention_mask=IDS.clone(), token_type_ids=IDS.clone(), labels=FLAGS
    )
    assert found(bert("SequenceClassification")(), batch) is None


def test_labels_that_are_the_input_ids_themselves_hold_nothing_to_ignore() -> None:
    torch.manual_seed(0)
    batch = made_up(input_ids=IDS, labels=IDS)
    assert batch.kwargs["labels"] is batch.kwargs["input_ids"]
    assert batch.select([0, 1]).to(torch.device("cpu")).swapped([0], seed=1).kwargs["labels"].any()
    assert found(gpt2(), batch) is None


class Text(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[0], "labels": IDS[0]}


def test_it_is_refused_before_training() -> None:
    model = bert("TokenClassification")()
    for parameter in (model.bert.embeddings.position_embeddings.weight,):
        parameter.requires_grad_(False)
    with pytest.raises(CoverageError, match=r"^The model returns a tensor without a batch axis"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(Text(), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            clipping="backprop",
        )


class Losing(nn.Module):
    """Computes its loss itself."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.loss = nn.Linear(FEATURES, CLASSES), loss

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head(x), labels)


def each(y: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(y.transpose(1, -1), labels, reduction="none", **options)


def own_masked(y: Tensor, mask: Tensor) -> Tensor:
    return (y.square().mean(dim=-1) * mask).sum() / mask.sum()


def by_minus_one(y: Tensor, labels: Tensor) -> Tensor:
    counts = labels != -1
    return (each(y, labels.clamp(min=0)) * counts).sum() / counts.sum()


def of_each(y: Tensor, labels: Tensor) -> Tensor:
    counts = labels != -100
    return ((each(y, labels) * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)).mean()


LONG = [torch.zeros(4, LENGTH, FEATURES), torch.zeros(4, LENGTH, dtype=torch.long)]


@pytest.mark.parametrize("length", [2, 3, LENGTH])
@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        pytest.param(lambda y, t: each(y, t).sum() / (t != -100).sum(), torch.long, id="-100"),
        pytest.param(by_minus_one, torch.long, id="-1"),
        pytest.param(by_minus_one, torch.int32, id="-1, int32"),
        pytest.param(own_masked, torch.long, id="loss mask of integers"),
        pytest.param(own_masked, torch.bool, id="loss mask of flags"),
        pytest.param(lambda y, t: each(y, t).sum(dim=1) / (t >= 0).sum(), torch.long, id="rows"),
    ],
)
def test_every_private_normaliser_is_found(loss: Any, kind: torch.dtype, length: int) -> None:
    if kind == torch.int32:
        inner = loss
        loss = lambda y, t: inner(y, t.long())  # noqa: E731
    x, labels = torch.zeros(4, length, FEATURES), torch.zeros(4, length, dtype=kind)
    assert found(Losing(loss), made_up(x, labels))


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(of_each, id="mean of each example's mean"),
        pytest.param(lambda y, t: each(y, t).mean(), id="ignored tokens count, with loss zero"),
        pytest.param(lambda y, t: each(y, t), id="one for each token"),
        pytest.param(lambda y, t: each(y, t, ignore_index=-1).mean(dim=1), id="-1"),
    ],
)
def test_a_mean_of_what_each_example_gives_alone_passes(loss: Any) -> None:
    assert found(Losing(loss), made_up(*LONG)) is None


def test_ignored_pixels_of_label_images_are_found() -> None:
    def loss(y: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(y.movedim(-1, 1), labels, ignore_index=255)

    labels = torch.zeros(4, 3, 6, dtype=torch.long)
    assert found(Losing(loss), made_up(torch.zeros(4, 3, 6, FEATURES), labels))


@pytest.mark.parametrize("weights", [[1.0, 5.0, 1.0], [2.0, 1.0, 1.0]])
def test_a_mean_weighted_by_class_is_found(weights: list[float]) -> None:
    def loss(y: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(y, labels, weight=torch.tensor(weights, dtype=y.dtype))

    assert found(Losing(loss), made_up(torch.zeros(4, FEATURES), FLAGS))


@given(st.integers(0, 200), st.sampled_from([(), (3,), (2, 5)]), st.sampled_from([2, 4, 6]))
def test_no_two_halves_have_equally_many_of_a_class(seed: int, shape: Any, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = invented(torch.zeros(1, *shape, dtype=torch.long), count, 0, 1.0, generator)
    assert drawn.shape == (count, *shape)
    assert set(drawn.flatten().tolist()) <= {0, 1}
    assert int(drawn.sum()) % 2 == 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([torch.long, torch.int32, torch.bool]),
    st.integers(0, 1),
)
def test_padding_keeps_the_first_position_and_another_number_of_each_half(
    sizes: list[int], dtype: torch.dtype, axis: int
) -> None:
    shape = [*sizes]
    shape.insert(min(axis, len(shape)), 4)
    axis = min(axis, len(sizes))
    leaf = torch.ones(shape, dtype=dtype)
    padded = ragged.padded(Batch((leaf,), {}, 4, axis))
    assert (padded is None) == all(size == 1 for size in sizes)
    if padded is not None:
        rows = padded.args[0].movedim(axis, 0).flatten(1).long()
        assert padded.args[0].dtype == dtype
        assert bool((rows[:, 0] == 1).all())
        assert int(rows[[0, 2]].sum()) > int(rows[[1, 3]].sum())


@pytest.mark.parametrize("accelerated", [True, False])
def test_only_what_is_called_a_label_is_tried_on_an_accelerator(accelerated: bool) -> None:
    class Model(nn.Module):
        def forward(self, ids: Tensor, target_ids: Tensor, loss_mask: Tensor, flags: Tensor):
            return None

    leaves = [torch.zeros(4, 5, dtype=torch.long) for _ in range(3)] + [torch.ones(4, 5).bool()]
    batch = Batch(tuple(leaves), {"x_labels": leaves[0] + 1}, 4, 0)
    possible = ragged.possible_labels(Model(), batch, accelerated=accelerated)
    first = 1 if accelerated else 0
    wanted = [*leaves[first:2], batch.kwargs["x_labels"]]
    assert [id(labels.leaf) for labels in possible] == [id(leaf) for leaf in wanted]


@pytest.mark.parametrize(
    ("use", "allowed"),
    [
        (lambda table, t: F.embedding(t, table), False),
        (lambda table, t: table[t], False),
        (lambda table, t: table.gather(0, t), False),
        (lambda table, t: table.index_select(0, t[0]), False),
        (lambda table, t: F.cross_entropy(table, t[:, 0], ignore_index=-1), False),
        (lambda table, t: F.cross_entropy(table, t[:, 0]), True),
        (lambda table, t: table * t, True),
    ],
)
def test_no_kernel_meets_a_negative_index(use: Any, allowed: bool) -> None:
    table, labels = torch.ones(3, 3), torch.tensor([[0, 1, 0], [-100, 0, 0], [1, 1, 1]])
    with ragged.NegativeIndices(-100):
        if allowed:
            use(table, labels)
        else:
            with pytest.raises(IndexError, match="out of range in aten::"):
                use(table, labels if "index_select" not in use.__code__.co_names else labels[1:2])
