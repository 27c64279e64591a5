"""Records of the inputs and outputs of all modules of a model in one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.leaves import batch_leaves


@dataclass(frozen=True)
class CallRecord:
    """One call of one module: its floating-point inputs and outputs."""

    name: str
    index: int  # among the calls of this module
    inputs: list[Tensor]
    outputs: list[Tensor]


class ChangedLaterError(Exception):
    """A module's output was changed in place after it was recorded without a copy."""


@dataclass
class Recording:
    """One run of a model.

    Attributes:
        copied: whether the inputs and outputs of the modules inside the model are copied. This
            costs as much as the run itself, and is needed only if they are changed in place later.
        calls: the modules' calls in the order in which they returned; the model's is the last.
        gradients: the gradients of the trained parameters, if they were asked for.
    """

    copied: bool = True
    calls: list[CallRecord] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def keep(self, value: Any, *, copied: bool) -> list[Tensor]:
        """Return the floating-point tensors in a value, and record their versions or copy them."""
        kept = floats(value)
        if copied:
            return [x.clone() for x in kept]
        self._versions += [(x, x._version) for x in kept]
        return kept

    @property
    def outputs(self) -> list[Tensor]:
        """Return the model's outputs."""
        return self.calls[-1].outputs

    def matched(self, other: Recording) -> Iterator[tuple[CallRecord, CallRecord]]:
        """Yield each call with the corresponding one of another run, where there is one.

        Raises:
            ChangedLaterError: a tensor has changed since; the run must record copies.
        """
        for x, version in (*self._versions, *other._versions):
            if x._version != version:
                raise ChangedLaterError
        calls = {(call.name, call.index): call for call in other.calls}
        for call in self.calls:
            match = calls.get((call.name, call.index))
            if match is not None:
                yield call, match


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, with nan equal to nan."""
    return one.shape == other.shape and bool(
        ((one == other) | (one != one) & (other != other)).all()
    )


def floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a value, also those in attributes of its objects.

    Packed sequences are padded, batch first. Complex tensors are returned as real ones.
    """
    found: list[Tensor] = []
    for leaf in batch_leaves(value):
        if is_packed(leaf):
            leaf = pad_packed_sequence(leaf, batch_first=True)[0]
        if isinstance(leaf, Tensor):
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf)
            if leaf.is_floating_point():
                found.append(leaf.clone() if leaf.is_inference() else leaf.detach())
    return found


def gradients_of(output: Any, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters' gradients for made-up gradients of the tensors in an output.

    A parameter that has none gets an empty tensor. No tensor's ``grad`` is changed.
    """
    found = (leaf.data if is_packed(leaf) else leaf for leaf in batch_leaves(output))
    outputs = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]
    own = list(parameters)
    if not outputs or not own:
        return []
    # Not torch's random numbers: `Steady` would make them equal, and take the model to be random.
    generator = np.random.default_rng(6)
    upstream = [_upstream(x.detach(), generator) for x in outputs]
    # Not `torch.autograd.grad`, since reentrant checkpoints run only in a whole backward pass.
    leaves = {id(leaf): leaf for leaf in (*own, *_leaves_of(outputs))}.values()
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, upstream)
        return [torch.zeros(0) if x.grad is None else x.grad for x in own]
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _upstream(output: Tensor, generator: np.random.Generator) -> Tensor:
    """Return a gradient that depends on the output's values, as that of a loss does."""
    drawn = torch.from_numpy(generator.standard_normal(output.shape)).to(output)
    return drawn * (1 + (output / (1 + output.abs())).nan_to_num())


def _leaves_of(outputs: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors whose ``grad`` a backward pass would change."""
    waiting, seen = [x.grad_fn for x in outputs if x.grad_fn is not None], set()
    yield from (x for x in outputs if x.grad_fn is None)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                yield leaf
            waiting += [above for above, _ in node.next_functions if above is not None]


@contextmanager
def recorded(
    model: nn.Module, recording: Recording, *, inputs: bool, inside: bool
) -> Iterator[None]:
    """Record the run of a model inside a ``with`` statement.

    Args:
        model: the model.
        recording: the recording that is filled.
        inputs: record the modules' inputs, too.
        inside: record the modules inside the model, too.
    """
    counts: Counter[str] = Counter()
    entered: list[list[Tensor]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        copied = recording.copied or module is model

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept = recording.keep((args, kwargs), copied=copied) if inputs else []
            entered.append(kept)

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            made = recording.keep(output, copied=copied)
            recording.calls.append(CallRecord(name, counts[name], entered.pop(), made))
            counts[name] += 1

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules() if inside else [("", model)]:
            watch(name or "(root)", module)
        yield
    finally:
        for handle in handles:
            handle.remove()
