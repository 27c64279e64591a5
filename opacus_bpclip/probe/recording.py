"""Run a model once, without leaving a trace in it, and write down what every module returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

from opacus_bpclip.probe.batches import Batch, device_of, map_leaves
from opacus_bpclip.probe.randomness import Steady, repeatable
from opacus_bpclip.recurrence import is_packed

# Beyond this many numbers a second copy of the model in double precision is not worth its memory.
_LARGEST_IN_DOUBLE = 2**26

# A parameter that starts at zero hides what it is multiplied with. It gets values of this size.
_ZERO_STANDS_FOR = 0.1


@dataclass(frozen=True)
class CallRecord:
    """One call of one module: the floating-point tensors that went in and came out."""

    name: str
    index: int  # among the calls of this module
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass
class Recording:
    """One run of a model.

    Attributes:
        calls: of its modules, in the order in which they returned; the model's own is the last.
        state: the model's parameters and persistent buffers after the run, by name.
    """

    calls: list[CallRecord] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> list[Tensor]:
        """Return the tensors that the model returned."""
        return self.calls[-1].outputs

    def matched(self, other: Recording) -> Iterator[tuple[CallRecord, CallRecord]]:
        """Yield each call with the same one of another run, where there is one."""
        calls = {(call.name, call.index): call for call in other.calls}
        for call in self.calls:
            match = calls.get((call.name, call.index))
            if match is not None:
                yield call, match


class Copy:
    """Copies of a model's numbers for trial runs: what those change is not the model's.

    Args:
        model: the model.
        double: compute in float64, so that rounding can be told from anything else.
    """

    def __init__(self, model: nn.Module, *, double: bool) -> None:
        self.model = model
        self.dtype = torch.float64 if double else None
        self.device = device_of(model)
        generator = torch.Generator().manual_seed(1)
        self.parameters = {
            name: self._shown(parameter, generator) for name, parameter in model.named_parameters()
        }

    def edited(self) -> list[str]:
        """Return the parameters that runs have changed in place."""
        fresh = Copy(self.model, double=self.dtype is not None).parameters
        return [name for name, own in self.parameters.items() if not alike(own, fresh[name])]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether the model is small enough to be copied in double precision."""
        return sum(p.numel() for p in model.parameters()) <= _LARGEST_IN_DOUBLE

    def run(self, batch: Batch, steady: Steady | None, *, inputs: bool = False) -> Recording:
        """Run the model.

        Args:
            batch: on what.
            steady: makes random numbers the same for every example; ``None`` seeds them.
            inputs: record the modules' inputs, too.
        """
        batch = batch.to(self.device, self.dtype)
        buffers = {name: self._cast(b, copy=True) for name, b in self.model.named_buffers()}
        recording = Recording()
        with (
            torch.no_grad(),
            repeatable(self.device),
            _recorded(self.model, recording, inputs=inputs),
            steady or nullcontext(),
        ):
            torch.func.functional_call(
                self.model, {**self.parameters, **buffers}, batch.args, batch.kwargs
            )
        return recording

    def _shown(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        own = self._cast(parameter.detach(), copy=parameter.requires_grad or self.fits(self.model))
        if not parameter.requires_grad or bool(own.any()):
            return own
        drawn = torch.rand(own.shape, generator=generator) - 0.5
        return (2 * _ZERO_STANDS_FOR * drawn).to(own)

    def _cast(self, tensor: Tensor, *, copy: bool) -> Tensor:
        return tensor.to(self.dtype if tensor.is_floating_point() else None, copy=copy)


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, nan included."""
    return one.shape == other.shape and bool(
        ((one == other) | (one != one) & (other != other)).all()
    )


def floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a value, packed sequences padded, as real numbers.

    Objects that are no containers are looked into as well: a model may return any.
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(leaf: Any) -> None:
        if is_packed(leaf):
            leaf = pad_packed_sequence(leaf, batch_first=True)[0]
        if isinstance(leaf, Tensor):
            if leaf.is_complex():
                leaf = torch.view_as_real(leaf)
            if leaf.is_floating_point():
                # A copy: an activation may work in place on it afterwards.
                found.append(leaf.detach().clone())
        elif _is_plain_object(leaf) and id(leaf) not in seen:
            seen.add(id(leaf))
            map_leaves(dict(vars(leaf)), visit)

    map_leaves(value, visit)
    return found


def _is_plain_object(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))


@contextmanager
def _recorded(model: nn.Module, recording: Recording, *, inputs: bool) -> Iterator[None]:
    counts: Counter[str] = Counter()
    entered: list[list[Tensor]] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            entered.append(floats((args, kwargs)) if inputs else [])

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            record = CallRecord(name, counts[name], entered.pop(), floats(output))
            recording.calls.append(record)
            counts[name] += 1
            if module is model:
                recording.state = {
                    key: value.detach().clone() for key, value in _state(model).items()
                }

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules():
            watch(name or "(root)", module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True)
    return {name: value for name, value in kept.items() if isinstance(value, Tensor)}
