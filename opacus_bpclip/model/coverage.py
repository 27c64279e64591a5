"""Check before training that a rule bounds every trainable parameter.

Without such checks, backpropagation clipping fails open: autograd computes ``p.grad`` for every
parameter, clipped or not. These checks, and those of `guard` on every batch, make it fail closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.attention import attention_axes
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.recurrence import recurrent_linears, renamed_parameters
from opacus_bpclip.model.views import folds_of
from opacus_bpclip.replacements import mixes_examples, replacer_of
from opacus_bpclip.rules import BroadcastRule, FunctionRule, Rule, registered_kind
from opacus_bpclip.rules.precision import ACCEPTED


@dataclass(frozen=True)
class Finding:
    """The result of the examination of one module.

    Attributes:
        name: dotted path in the model, ``"(root)"`` for the model itself.
        module: the module.
        parameters: its own trainable parameters, by name.
        rule: the rule that bounds their gradient, ``None`` if there is none.
        problems: the reasons to refuse the model, each with its remedy.
    """

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    rule: Rule | None
    problems: tuple[str, ...] = ()


def examine(model: nn.Module) -> list[Finding]:
    """Return a finding for each module that has trainable parameters or mixes examples."""
    findings: list[Finding] = []
    mixing = {
        name: norm for name, norm in batch_normalizations(model).items() if mixes_examples(norm)
    }
    for name, module in _owners(model):
        own = _own_trainable(module)
        problems = []
        rule = None
        if mixing.pop(name, None):
            problems.append(batch_normalization_problem(name, module))
        else:
            rule, problem = _rule_for(module, own)
            if rule is None:
                problems.append(f"{name} ({type(module).__name__}): {problem}")
        findings.append(Finding(name, module, own, rule, tuple(problems)))
    findings += [
        Finding(name, norm, {}, None, (batch_normalization_problem(name, norm),))
        for name, norm in mixing.items()
    ]
    return findings


def trainable_layers(
    model: nn.Module, uses: Mapping[str, int] | None = None, *, batch_first: bool = True
) -> dict[str, Layer]:
    """Return the layers to clip, by dotted name, in the model's order.

    Args:
        model: the model.
        uses: the number of uses in one forward pass, by layer, where it is more than one.
        batch_first: whether the batch is the first axis of the layers' inputs; otherwise the
            second.

    Raises:
        CoverageError: no rule bounds a trainable parameter, the model has no trainable parameter,
            or ``uses`` names a layer that the model does not have. The message lists every problem
            with its remedy.
    """
    uses = uses or {}
    findings = examine(model)
    problems = [problem for finding in findings for problem in finding.problems]
    if problems:
        raise CoverageError(
            "Backpropagation clipping cannot bound every trainable parameter of this model:\n"
            + "\n".join(f"- {problem}" for problem in problems)
        )
    recurrences = recurrent_linears(model)
    axes = {**attention_axes(model), **dict.fromkeys(recurrences, 0)}
    folds = folds_of(model, recurrences, batch_first=batch_first)
    layers: dict[str, Layer] = {}
    for found in findings:
        if found.rule is None:
            continue
        # A module without a rule is clipped call by call, also in a recurrent network.
        followed = isinstance(found.rule, FunctionRule)
        recurrence = None if followed else recurrences.get(found.module)
        default = axes.get(found.module, 0 if batch_first else 1)
        layers[found.name] = Layer.of(
            found.name,
            found.module,
            found.rule,
            found.parameters,
            batch_axis=default,
            uses=uses.get(found.name, 1),
            recurrence=recurrence,
            fold=folds.get(found.module),
        )
    if not layers:
        raise CoverageError(
            "The model has no trainable parameter. Set requires_grad=True on the layers to train."
        )
    _refuse_layers_inside_layers(layers)
    unknown = sorted(set(uses) - set(layers))
    if unknown:
        raise CoverageError(
            f"uses names layers that the model does not train: {', '.join(unknown)}. The trainable "
            f"layers are: {', '.join(layers)}."
        )
    return layers


def _refuse_layers_inside_layers(layers: Mapping[str, Layer]) -> None:
    """Refuse a layer with a rule that has other trainable layers inside it.

    Clipping detaches the outer layer's output, so the inner layers would get no gradient. Broadcast
    parameters are an exception: they are replaced by copies, and nothing is detached.

    Raises:
        CoverageError: there is such a layer.
    """
    modules = {layer.module: layer.name for layer in layers.values()}
    for layer in layers.values():
        if isinstance(layer.rule, (BroadcastRule, FunctionRule)):
            continue
        inside = [modules[m] for m in layer.module.modules() if m in modules][1:]
        if inside:
            raise CoverageError(
                f"{layer.name} ({type(layer.module).__name__}) has a rule for parameters of its "
                f"own and contains {', '.join(inside)}, which would get no gradient from the loss. "
                "Put its own parameters into a separate module, or write a BroadcastRule for them."
            )


def unclipped_inputs(
    layers: Mapping[str, Layer], passed_by: Iterable[str], max_input_norm: float | None
) -> str | None:
    """Return a message if ``max_input_norm`` is set, but some layers' inputs cannot be clipped.

    Args:
        layers: the layers, by name.
        passed_by: the names of layers whose rule does not hold for their calls, see `Plan`.
        max_input_norm: the option.
    """
    clipped = [name for name in passed_by if layers[name].rule.clips_input]
    if max_input_norm is None or not clipped:
        return None
    return (
        f"{', '.join(sorted(clipped))}: max_input_norm={max_input_norm!r} clips an input only if "
        "its first axis is the batch alone. Here the batch is on another axis or folded with "
        "others, or the input is the same for every example. Leave max_input_norm out."
    )


def declared_uses(config: BackpropClipping) -> Mapping[str, int]:
    """Return the option ``uses`` as a mapping.

    It is empty for ``"auto"``, if no trial has counted the uses: then a layer may be used once, and
    more uses are refused.
    """
    return {} if isinstance(config.uses, str) else config.uses


def batch_normalizations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's batch normalisations, trained or not, by dotted name."""
    return {
        name or "(root)": module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    }


def batch_normalization_problem(name: str, norm: nn.Module) -> str:
    """Return the message for a batch normalisation that mixes examples."""
    return (
        f"{name} normalises over the batch, so each example's output depends on the other "
        f"examples. {_replacement(norm)} Or use GroupNorm, or keep it in evaluation mode with "
        "running statistics."
    )


def _replacement(module: nn.Module) -> str:
    """Say whether `get_compatible_module` replaces this module, and if not, why.

    Empty if it never replaces modules of this class.
    """
    replacer = replacer_of(module)
    if replacer is None:
        return ""
    obstacle = replacer.obstacle(module)
    method = 'PrivacyEngine.get_compatible_module(model, clipping="backprop")'
    return f"{method} does not replace it: it {obstacle}." if obstacle else f"{method} replaces it."


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _own_trainable(module):
            yield name or "(root)", module


def _own_trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    renamed = renamed_parameters(module)
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad and name not in renamed
    }


def _rule_for(
    module: nn.Module, own: Mapping[str, nn.Parameter]
) -> tuple[Rule, None] | tuple[None, str]:
    """Return the module's rule, or why it has none and what to do."""
    if any(
        isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in own.values()
    ):
        return None, "is not initialised yet. Run one batch through the model first."
    registered = registered_kind(type(module))
    replacement = _replacement(module)
    if registered is None and replacement:
        return None, (
            f"no rule bounds the gradient of {', '.join(own)}. {replacement} Or freeze it "
            "(requires_grad=False)."
        )
    kind, rule = registered or (None, FunctionRule)
    if kind is not None and not _fits(module, kind, rule, own):
        rule = FunctionRule
    dtypes = {parameter.dtype for parameter in own.values()}
    if any(dtype.is_complex for dtype in dtypes):
        return None, (
            "its parameters are complex, and Opacus's noise is real. Keep real and imaginary parts "
            "in real parameters, and compute with them. Or freeze it (requires_grad=False)."
        )
    if isinstance(module, ScriptModule):
        return None, (
            "it is TorchScript, and what that computes with its parameters cannot be followed. "
            "Use the module that it was made of, or freeze it (requires_grad=False)."
        )
    if not dtypes <= set(ACCEPTED):
        return None, (
            f"its parameters are {', '.join(str(dtype) for dtype in dtypes)}. This dtype needs a "
            "GradScaler, whose scale depends on the data. Keep trainable parameters in "
            "torch.float32 or torch.bfloat16."
        )
    try:
        return rule.from_module(module), None
    except CoverageError as error:
        return None, str(error)


def _fits(
    module: nn.Module,
    kind: type[nn.Module],
    rule: type[Rule],
    own: Mapping[str, nn.Parameter],
) -> bool:
    """Return whether a module computes what the rule of its class describes."""
    overridden = any(
        getattr(type(module), method) is not getattr(kind, method) or method in vars(module)
        for method in rule.methods
    )
    # A parametrization (weight_norm, spectral_norm, pruning) computes the weight from parameters
    # that the rule does not know.
    unknown = set(own) - set(rule.parameters)
    return not (overridden or unknown or is_parametrized(module))
