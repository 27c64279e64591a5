"""The registry: which rule bounds which layer. A layer that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from opacus_bpclip.rules.base import Rule
from opacus_bpclip.rules.bilinear import BilinearRule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.conv_transpose import ConvTransposeRule
from opacus_bpclip.rules.embedding import EmbeddingRule
from opacus_bpclip.rules.embedding_bag import EmbeddingBagRule
from opacus_bpclip.rules.group_norm import GroupNormRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.normalization import LayerNormRule, RMSNormRule
from opacus_bpclip.rules.prelu import PReLURule
from opacus_bpclip.rules.sequence_bias import SequenceBiasRule
from opacus_bpclip.rules.torchvision import ClassTokenRule, LayerScaleRule, PositionEmbeddingRule
from opacus_bpclip.rules.transformers import TransposedLinearRule

RuleClass = TypeVar("RuleClass", bound=type[Rule])

# By class; by dotted path where the class belongs to a package that need not be installed.
RULES: dict[type[nn.Module] | str, type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.ConvTranspose1d: ConvTransposeRule,
    nn.ConvTranspose2d: ConvTransposeRule,
    nn.ConvTranspose3d: ConvTransposeRule,
    nn.Bilinear: BilinearRule,
    nn.PReLU: PReLURule,
    nn.Embedding: EmbeddingRule,
    nn.EmbeddingBag: EmbeddingBagRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.InstanceNorm1d: GroupNormRule,
    nn.InstanceNorm2d: GroupNormRule,
    nn.InstanceNorm3d: GroupNormRule,
    "opacus.layers.dp_multihead_attention.SequenceBias": SequenceBiasRule,
    "transformers.pytorch_utils.Conv1D": TransposedLinearRule,
    "torchvision.models.vision_transformer.VisionTransformer": ClassTokenRule,
    "torchvision.models.vision_transformer.Encoder": PositionEmbeddingRule,
    "torchvision.models.convnext.CNBlock": LayerScaleRule,
}


def registered_kind(kind: type[nn.Module]) -> tuple[type[nn.Module], type[Rule]] | None:
    """Return the nearest class in ``kind``'s ancestry that has a rule, and the rule."""
    for base in kind.__mro__:
        rule = RULES.get(base) or RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            return base, rule
    return None


def supported_layers() -> list[str]:
    """Return the names of the classes that have a rule."""
    names = (kind if isinstance(kind, str) else kind.__name__ for kind in RULES)
    return sorted(name.rpartition(".")[2] for name in names)


def register_rule(
    *kinds: type[nn.Module], replace: bool = False
) -> Callable[[RuleClass], RuleClass]:
    """Register the decorated rule for layers of these classes.

    The guarantee then rests on the rule as well: no bound of it may be below the norm of an
    example's gradient, and nothing it does to one example may depend on another.

    Args:
        *kinds: the layers' classes. A layer's parameters must be named in the rule's
            ``parameters``, and it takes one tensor, batch first, and returns one.
        replace: take the place of a rule that is registered already.

    Raises:
        TypeError: the decorated object is not a `Rule` class, or a kind is not a module class.
        ValueError: a kind has a rule already and ``replace`` is not set.

    Example:
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(2 * x)
        >>> @register_rule(Doubled)
        ... class DoubledRule(LinearRule):
        ...     def measure(self, x):
        ...         return super().measure(2 * x)
        ...
        ...     def columns(self, x):
        ...         return super().columns(2 * x)
        >>> RULES.pop(Doubled).__name__
        'DoubledRule'
    """

    def decorate(rule: RuleClass) -> RuleClass:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise TypeError(f"Expected {rule!r} to be a subclass of Rule.")
        for kind in kinds:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise TypeError(f"Expected {kind!r} to be a class of modules.")
            if kind in RULES and not replace:
                raise ValueError(
                    f"{kind.__name__} has a rule already, {RULES[kind].__name__}. Pass "
                    "replace=True to take its place."
                )
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return decorate
