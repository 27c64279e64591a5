"""What would become of a model, layer by layer: facts and a table of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from opacus_bpclip.config import BackpropClipping, is_positive_number
from opacus_bpclip.jobs.tables import aligned

if TYPE_CHECKING:
    from torch import nn

    from opacus_bpclip.probe import Batch


@dataclass(frozen=True)
class Row:
    """What is to be said of one module.

    Attributes:
        module: dotted path in the model.
        type: its class.
        parameters: trainable scalars.
        rule: what bounds their gradient, ``None`` where nothing does.
        max_input_norm: what its input is clipped to, ``None`` where it is not.
        bound: how its gradient is bounded.
        uses: how often it may be used in one forward pass.
        sensitivity: Delta_l, one for all layers that share a parameter (with a joint budget, all of
            ``max_grad_norm``); ``None`` while any module
            is refused.
        problem: why the model is refused, with the remedy; empty if it is not.
        functions: the functions that are called on its parameters outside of layers with a rule,
            each with how the examples' gradients are made; found with a batch only.
    """

    module: str
    type: str
    parameters: int
    rule: str | None
    max_input_norm: float | None
    bound: str
    uses: int
    sensitivity: float | None
    problem: str
    functions: tuple[str, ...] = ()


def inspect(
    model: nn.Module,
    config: BackpropClipping | None = None,
    max_grad_norm: float = 1.0,
    batch: Batch | None = None,
) -> list[Row]:
    """Return a row for each module that would be trained or refused.

    Args:
        model: the model; it is not changed.
        config: how it would be clipped.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        batch: examples to try the model on, for coupling and for ``uses="auto"``.

    Raises:
        CoverageError: the allocation or the uses name other layers than the model has.
        UntriedError: the model does not run on the batch.
        ValueError: ``max_grad_norm`` is not a finite number above zero.

    Example:
        >>> from torch import nn
        >>> [(row.module, row.rule, row.sensitivity) for row in inspect(nn.Linear(3, 2))]
        [('(root)', 'LinearRule', 1.0)]
    """
    from opacus_bpclip.clipping.allocation import layer_fractions
    from opacus_bpclip.model.coverage import (
        Finding,
        declared_uses,
        examine,
        trainable_layers,
        unclipped_inputs,
    )
    from opacus_bpclip.model.plan import Plan
    from opacus_bpclip.model.tying import tied_groups
    from opacus_bpclip.probe import Problem, count_uses, try_model

    if not is_positive_number(max_grad_norm):
        raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} to be a finite number > 0.")
    config = config or BackpropClipping()
    findings = {found.name: found for found in examine(model)}
    fine = bool(findings) and not any(found.problems for found in findings.values())
    plan = Plan({})
    if fine and batch is not None:
        problem, plan = try_model(
            model,
            batch,
            loss_reduction="mean",
            layers=trainable_layers(model),
            # One factor for all layers belongs to an example in each of them.
            ordered=config.allocation == "joint",
            search=config.probe,
        )
        if config.uses == "auto":
            config = replace(config, uses=count_uses(model, batch, plan))
        layers = trainable_layers(model)
        text = unclipped_inputs(layers, plan.passed_by, config.max_input_norm)
        if problem is None and text is not None:
            problem = Problem(min(plan.passed_by), text)
        if problem is not None:
            fine = False
            module = model if problem.module == "(root)" else model.get_submodule(problem.module)
            found = findings.get(problem.module, Finding(problem.module, module, {}, None))
            findings[problem.module] = replace(found, problems=(problem.text,))
    uses = declared_uses(config) if fine else {}
    groups = tied_groups(trainable_layers(model, uses)).values() if fine else ()
    parts = dict.fromkeys((group.name for group in groups), 1.0)
    if fine and config.allocation != "joint":
        parts = layer_fractions({group.name: group.size for group in groups}, config.allocation)
    sensitivities = {
        layer.name: parts[group.name] * max_grad_norm for group in groups for layer in group.layers
    }
    rows = []
    for found in findings.values():
        rule = None if found.rule is None else type(found.rule).__name__
        if found.name in plan.passed_by:
            rule = "FunctionRule"
        clips = found.rule is not None and found.rule.clips_input
        rows.append(
            Row(
                module=found.name,
                type=type(found.module).__name__,
                parameters=sum(parameter.numel() for parameter in found.parameters.values()),
                rule=rule,
                max_input_norm=config.max_input_norm if clips else None,
                bound="exact" if rule == "FunctionRule" else config.bound,
                uses=uses.get(found.name, 1),
                sensitivity=sensitivities.get(found.name),
                problem=" ".join(found.problems),
                functions=plan.functions_of(found.name),
            )
        )
    return rows


def render(rows: list[Row]) -> str:
    """Return the rows as a table, and the problems below it."""
    lines = [["module", "type", "parameters", "rule", "input norm", "bound", "uses", "sensitivity"]]
    lines += [
        [
            row.module,
            row.type,
            f"{row.parameters:,}",
            "REFUSED" if row.problem or row.rule is None else row.rule,
            "-" if row.max_input_norm is None else f"{row.max_input_norm:g}",
            row.bound,
            str(row.uses),
            "-" if row.sensitivity is None else f"{row.sensitivity:.4f}",
        ]
        for row in rows
    ]
    parts = [aligned(lines, left=(0, 1, 3, 5))]
    followed = [f"- {row.module}: {', '.join(row.functions)}" for row in rows if row.functions]
    if followed:
        head = "By the functions that are called on them, and how gradients are made:"
        parts.append("\n".join([head, *followed]))
    problems = _grouped(rows)
    if problems:
        parts.append("\n".join(["Refused:", *problems]))
    return "\n\n".join(parts)


def _grouped(rows: list[Row]) -> list[str]:
    """Return the problems, each once, with the modules that have it."""
    modules: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            modules.setdefault(row.problem.replace(row.module, "{}", 1), []).append(row.module)
    lines = []
    for problem, names in modules.items():
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        shown = ", ".join(names[:2] if more else names) + more
        lines.append(f"- {problem.replace('{}', shown, 1)}")
    return lines
