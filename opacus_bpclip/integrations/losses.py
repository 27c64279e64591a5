"""The losses of Hugging Face's models as means of one term for each example.

The loss that such a model computes from its labels is a mean over all positions that count in the
whole batch. Its divisor is private, and shared by all examples.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from opacus_bpclip.losses.losses import CrossEntropy, Reduction, logits_of

_NEXT_TOKEN = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)
_EACH_TOKEN = (
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
_WHOLE_INPUT = (
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
)


class Classification(nn.Module):
    """The loss of a model that classifies whole inputs, or regresses to numbers.

    As in the models, ``problem_type`` decides. Where it is ``None``, one output is a regression,
    integer labels are classes, and float labels are one flag for each class.

    Args:
        problem_type: the model's ``config.problem_type``.
        label_smoothing: of classes, in [0, 1].
        reduction: over the examples: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
    """

    def __init__(
        self,
        problem_type: str | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.problem_type = problem_type
        self.of_classes = CrossEntropy(label_smoothing=label_smoothing, reduction="none")
        self.reduction = reduction

    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss, a scalar; ``[B]`` with ``reduction="none"``.

        Args:
            outputs: logits ``[B, C]``, or an output that contains them.
            labels: ``[B]`` classes or numbers, or ``[B, C]`` flags or numbers.
            num_items_in_batch: accepted and not used: it is private.
        """
        logits = logits_of(outputs)
        kind = self.problem_type or _kind(logits, labels)
        if kind == "single_label_classification":
            losses = self.of_classes(logits, labels)
        else:
            of_each = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
            targets = labels.reshape(logits.shape).to(logits.dtype)
            losses = of_each(logits, targets, reduction="none").mean(1)
        if self.reduction == "none":
            return losses
        return losses.sum() / (max(len(losses), 1) if self.reduction == "mean" else 1)


def loss_of(model: nn.Module, *, label_smoothing: float = 0.0) -> nn.Module:
    """Return the loss of a model's task, with one term for each example.

    Args:
        model: a model of transformers, with or without peft's adapters.
        label_smoothing: in [0, 1].

    Raises:
        ValueError: the task is none of those whose loss is known.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):  # of peft
        base = base.get_base_model()
    name = type(base).__name__
    if _is_one_of(name, _NEXT_TOKEN) and not base.config.is_encoder_decoder:
        return CrossEntropy(shift=True, label_smoothing=label_smoothing)
    if _is_one_of(name, (*_NEXT_TOKEN, *_EACH_TOKEN)):
        return CrossEntropy(class_axis=-1, label_smoothing=label_smoothing)
    if _is_one_of(name, _WHOLE_INPUT):
        return Classification(base.config.problem_type, label_smoothing)
    raise ValueError(
        f"The loss of {name} is not known with one term for each example, and the loss that a "
        "model computes itself may divide by what the whole batch holds. Pass "
        "compute_loss_func, a module that is called with (outputs, labels) and has a `reduction`, "
        "'mean', which is set to 'none' for one loss per example. opacus_bpclip.CrossEntropy is "
        "such a module."
    )


def without_labels(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return the inputs from which a model computes no loss of its own, and the labels."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shifted(labels=labels)
    return inputs, labels


def _kind(logits: Tensor, labels: Tensor) -> str:
    if logits.shape[1] == 1:
        return "regression"
    flags = labels.is_floating_point()
    return "multi_label_classification" if flags else "single_label_classification"


def _is_one_of(name: str, tasks: tuple[Any, ...]) -> bool:
    return any(name in _names(classes) for task in tasks for classes in task.values())


def _names(classes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classes,) if isinstance(classes, str) else classes
