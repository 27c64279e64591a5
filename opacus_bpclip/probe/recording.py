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

from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.problems import UntriedError
from opacus_bpclip.probe.randomness import Steady, repeatable
from opacus_bpclip.probe.stand_ins import StandIns, lazy_parameter
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


class ChangedLaterError(Exception):
    """What a module returned was worked on in place afterwards, and nobody has a copy."""


@dataclass
class Recording:
    """One run of a model.

    Attributes:
        copied: whether what the modules inside the model take and return is copied. It costs as
            much as the run itself, and is needed only where somebody works in place on it.
        calls: of its modules, in the order in which they returned; the model's own is the last.
        state: the model's persistent buffers after the run, by name.
    """

    copied: bool = True
    calls: list[CallRecord] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def keep(self, value: Any, *, copied: bool) -> list[Tensor]:
        """Return the floating-point tensors in a value, as they are now."""
        kept = floats(value)
        if copied:
            return [x.clone() for x in kept]
        self._versions += [(x, x._version) for x in kept]
        return kept

    @property
    def outputs(self) -> list[Tensor]:
        """Return the tensors that the model returned."""
        return self.calls[-1].outputs

    def matched(self, other: Recording) -> Iterator[tuple[CallRecord, CallRecord]]:
        """Yield each call with the same one of another run, where there is one.

        Raises:
            ChangedLaterError: a tensor is no longer what it was; record copies.
        """
        for x, version in (*self._versions, *other._versions):
            if x._version != version:
                raise ChangedLaterError
        calls = {(call.name, call.index): call for call in other.calls}
        for call in self.calls:
            match = calls.get((call.name, call.index))
            if match is not None:
                yield call, match


class Copy:
    """A model with copies of its numbers, for trial runs inside a ``with`` statement.

    What runs change is not the model's: afterwards it is what it was (`StandIns`). Between runs,
    buffers start anew; what a run leaves in plain attributes is there in the next one, as it would
    be in training.

    Args:
        model: the model.
        double: compute in float64, so that rounding can be told from anything else.
        copied: record copies of what modules return, as `Recording` has it.

    Raises:
        UntriedError: a parameter has no shape yet.
    """

    def __init__(self, model: nn.Module, *, double: bool, copied: bool = True) -> None:
        lazy = lazy_parameter(model)
        if lazy is not None:
            raise UntriedError(f"{lazy} has no shape yet: run one batch through the model first")
        self.model = model
        self.dtype = torch.float64 if double else None
        self.device = device_of(model)
        self._copied = copied
        self._fits = self.fits(model)
        self._parameters = dict(model.named_parameters())
        self._seeds = {id(p): seed for seed, p in enumerate(self._parameters.values())}
        self._versions = {id(p): _version(p) for p in self._parameters.values()}
        self._stand_ins = StandIns(model, self._shown)

    def __enter__(self) -> Copy:
        self._stand_ins.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stand_ins.__exit__(*error)

    def edited(self) -> list[str]:
        """Return the parameters that runs have changed in place."""
        return [name for name, own in self._parameters.items() if self._is_edited(own)]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether the model is small enough to be copied in double precision."""
        sizes = (p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
        return sum(sizes) <= _LARGEST_IN_DOUBLE

    def run(
        self, batch: Batch, steady: Steady | None, *, inputs: bool = False, inside: bool = True
    ) -> Recording:
        """Run the model.

        Args:
            batch: on what.
            steady: makes random numbers the same for every example; ``None`` seeds them.
            inputs: record the modules' inputs, too.
            inside: record what the modules inside the model return, too.
        """
        batch = batch.to(self.device, self.dtype)
        self._stand_ins.begin_run()
        recording = Recording(copied=self._copied)
        with (
            torch.no_grad(),
            repeatable(self.device),
            _recorded(self.model, recording, inputs=inputs, inside=inside),
            steady or nullcontext(),
        ):
            self.model(*batch.args, **batch.kwargs)
        return recording

    def _shown(self, tensor: Tensor) -> Tensor:
        """Return what stands in for a tensor: a copy; of a trainable zero, small values."""
        seed = self._seeds.get(id(tensor))
        if seed is None:
            return self._cast(tensor)
        trained = tensor.requires_grad
        if not (trained or self._fits):
            return tensor
        own = self._cast(tensor)
        if trained and _is_zero(own):
            drawn = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
            own = (2 * _ZERO_STANDS_FOR * drawn).to(own)
        stand_in = nn.Parameter(own, requires_grad=trained)
        vars(stand_in).update(vars(tensor))
        return stand_in

    def _is_edited(self, parameter: Tensor) -> bool:
        stand_in = self._stand_ins.of(parameter)
        if stand_in is parameter:
            return self._versions[id(parameter)] != _version(parameter)
        return not alike(stand_in, self._shown(parameter))

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.detach().to(dtype, copy=True)


def _is_zero(x: Tensor) -> bool:
    # Most have no zero in the first place, and need no second look.
    return not (bool(x.flatten()[:1].any()) or bool(x.any()))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's inputs belong."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, nan included."""
    return one.shape == other.shape and bool(
        ((one == other) | (one != one) & (other != other)).all()
    )


def floats(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a value, packed sequences padded, as real numbers.

    Objects are looked into as well: a model may return any.
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


@contextmanager
def _recorded(
    model: nn.Module, recording: Recording, *, inputs: bool, inside: bool
) -> Iterator[None]:
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
            if module is model:
                recording.state = {
                    key: value.detach().clone() for key, value in _state(model).items()
                }

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    try:
        for name, module in model.named_modules() if inside else [("", model)]:
            watch(name or "(root)", module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(model: nn.Module) -> dict[str, Tensor]:
    buffers = {id(buffer) for buffer in model.buffers()}
    kept = model.state_dict(keep_vars=True)
    return {name: value for name, value in kept.items() if id(value) in buffers}
