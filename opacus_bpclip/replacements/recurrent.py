"""Recurrent networks that compute what PyTorch's do, built from Opacus's cells.

Opacus's own networks differ from PyTorch's with dropout: they apply it to the last layer's outputs,
too, and pass the result on to the next time step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from opacus_bpclip.replacements.base import Copies

State = tuple[Tensor, ...]  # h, and c for an LSTM
# Given the number of a layer and its inputs by time step, sets some of their numbers to zero.
Drop = Callable[[int, list[Tensor]], list[Tensor]]


class Recurrent(DPRNNBase):
    """Base class of the three networks; names of parameters and state dict are PyTorch's.

    The linear layers inside run once per time step, and row ``i`` of every time step is the same
    example.
    """

    @classmethod
    def of(cls, module: nn.RNNBase, copies: Copies) -> Self:
        """Return the replacement of a network, with copies of its parameters.

        Args:
            module: the network to replace, without ``proj_size``.
            copies: makes one copy of each parameter.
        """
        options: dict[str, Any] = {}
        if isinstance(module, nn.RNN):
            options["nonlinearity"] = module.nonlinearity
        # On the meta device: no memory, no random numbers. Every parameter is replaced below.
        with torch.device("meta"):
            made = cls(
                module.input_size,
                module.hidden_size,
                num_layers=module.num_layers,
                bias=module.bias,
                batch_first=module.batch_first,
                bidirectional=module.bidirectional,
                **options,
            )
        made.dropout, made.mode = module.dropout, module.mode
        for name, parameter in module._parameters.items():
            kind, matrix, cell = name.split("_", 2)  # weight_ih_l0_reverse
            assert parameter is not None
            setattr(made.get_submodule(f"{cell}.{matrix}"), kind, copies.parameter(parameter))
        made._register_renamed_parameters()
        for name in module._parameters:  # PyTorch's order, on which optimizers' states rely
            made._parameters[name] = made._parameters.pop(name)
        # Opacus's hook does not work for a network inside of a model.
        made._state_dict_hooks.clear()
        made.register_state_dict_post_hook(_save_once)
        made.register_load_state_dict_pre_hook(_load_twice)
        made.register_load_state_dict_post_hook(_tie)
        return made.train(module.training)

    load_state_dict = nn.Module.load_state_dict  # Opacus's accepts no option but `strict`

    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: Any = None,
    ) -> tuple[Any, Any]:
        """Run over a batch of sequences, as PyTorch's network does.

        Args:
            input: ``[B, T, D]`` if ``batch_first``, otherwise ``[T, B, D]``; ``[T, D]`` for a
                single example; or a ``PackedSequence``.
            hx: the initial state, ``[layers * directions, B, H]``, for an LSTM a pair of them;
                zeros if ``None``.

        Returns:
            The last layer's outputs, of the shape of ``input`` with ``H * directions`` features,
            and the last state, of the shape of ``hx``.
        """
        if isinstance(input, PackedSequence):
            steps = list(input.data.split(input.batch_sizes.tolist()))
            for cell in self.cells:
                cell.set_max_batch_length(len(steps[0]))
            initial = self._initial(hx, steps[0], input.sorted_indices)
            drop = self._drop_of_packed(len(steps[0]), input.sorted_indices)
            outputs, last = self._run(steps, initial, drop)
            if input.unsorted_indices is not None:
                last = tuple(state.index_select(1, input.unsorted_indices) for state in last)
            return input._replace(data=torch.cat(outputs)), self._as_passed(last)
        alone = input.dim() == 2
        axis = 0 if alone or not self.batch_first else 1
        x = input.unsqueeze(1) if alone else input
        if alone and hx is not None:
            hx = tuple(h.unsqueeze(1) for h in hx) if self.has_cell_state else hx.unsqueeze(1)
        steps, p = list(x.unbind(axis)), self.dropout
        initial = self._initial(hx, steps[0], None)
        outputs, last = self._run(steps, initial, lambda _, xs: [F.dropout(x, p) for x in xs])
        y = torch.stack(outputs, dim=axis)
        if alone:
            return y.squeeze(1), self._as_passed(tuple(state.squeeze(1) for state in last))
        return y, self._as_passed(last)

    def flatten_parameters(self) -> None:
        """Do nothing. Models written for PyTorch's networks call this method."""

    def _as_passed(self, state: State) -> Any:
        return state if self.has_cell_state else state[0]

    def _initial(self, hx: Any, first: Tensor, order: Tensor | None) -> State:
        """Return the initial state in the order of the rows of the first step."""
        if hx is None:
            shape = (self.num_layers * self.num_directions, len(first), self.hidden_size)
            return (first.new_zeros(shape),) * (1 + self.has_cell_state)
        state: State = tuple(hx) if self.has_cell_state else (hx,)
        return state if order is None else tuple(h.index_select(1, order) for h in state)

    def _drop_of_packed(self, count: int, order: Tensor | None) -> Drop:
        """Return a dropout whose masks of a sequence do not depend on the lengths of the others.

        With masks of the packed numbers, other lengths would change every sequence's masks, for
        the same random numbers, and the search for coupled examples could not tell why.

        Args:
            count: the number of sequences.
            order: by the place in the packed batch, each sequence's place in the model's batch.
        """
        p, draws = self.dropout, self.num_layers > 1 and self.dropout and self.training
        seed = int(torch.randint(2**31, ())) if draws else 0

        def drop(layer: int, steps: list[Tensor]) -> list[Tensor]:
            generator = torch.Generator(steps[0].device).manual_seed(seed + layer)
            made = []
            for x in steps:
                kept = x.new_empty(count, x.shape[1]).bernoulli_(1 - p, generator=generator)
                kept = kept if order is None else kept.index_select(0, order)
                made.append(x * kept[: len(x)] / max(1 - p, 1e-12))
            return made

        return drop

    def _run(self, steps: list[Tensor], initial: State, drop: Drop) -> tuple[list[Tensor], State]:
        """Run all layers; return the last layer's outputs by time step, and the last state.

        Args:
            steps: the inputs by time step, ``[B_t, D]`` each.
            initial: the initial state of all layers and directions.
            drop: the dropout between layers.
        """
        last: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                steps = drop(layer, steps)
            outputs = []
            for direction in range(self.num_directions):
                index = layer * self.num_directions + direction
                ys, state = _run_cell(
                    self.cells[index],
                    steps[::-1] if direction else steps,
                    tuple(part[index] for part in initial),
                )
                outputs.append(ys[::-1] if direction else ys)
                last.append(state)
            steps = [torch.cat(both, dim=1) for both in zip(*outputs, strict=True)]
        return steps, tuple(torch.stack(part) for part in zip(*last, strict=True))


class RNN(Recurrent, DPRNN):
    """Drop-in replacement of ``nn.RNN``: the same results and state dict."""


class LSTM(Recurrent, DPLSTM):
    """Drop-in replacement of ``nn.LSTM`` without ``proj_size``: the same results, state dict."""


class GRU(Recurrent, DPGRU):
    """Drop-in replacement of ``nn.GRU``: the same results and state dict."""


def _save_once(module: Recurrent, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Remove the layers' own names from a state dict, which then has only PyTorch's names."""
    for inner in module.old_to_new:
        state.pop(prefix + inner, None)


def _load_twice(module: Recurrent, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add the layers' own names to a state dict: PyTorch loads the layers inside, too."""
    for inner, name in module.old_to_new.items():
        if prefix + name in state:
            state[prefix + inner] = state[prefix + name]


def _tie(module: Recurrent, _: Any) -> None:
    """Make the layers use the network's parameters, which loading may have replaced."""
    for inner, name in module.old_to_new.items():
        if name in module._parameters:
            layer, _, kind = inner.rpartition(".")
            module.get_submodule(layer)._parameters[kind] = module._parameters[name]


def _run_cell(
    cell: nn.Module, steps: Sequence[Tensor], initial: State
) -> tuple[list[Tensor], State]:
    """Run one direction of one layer over its time steps, ``[B_t, D]`` each.

    In a packed batch the last row ends first. In the backward direction the last row starts last.
    """
    state = tuple(part[: len(steps[0])] for part in initial)
    ended: list[State] = []
    outputs = []
    for x in steps:
        before, now = len(state[0]), len(x)
        if now < before:
            ended.append(tuple(part[now:] for part in state))
            state = tuple(part[:now] for part in state)
        elif now > before:
            new = (part[before:now] for part in initial)
            state = tuple(torch.cat(both) for both in zip(state, new, strict=True))
        after = cell(x, state if len(state) > 1 else state[0])
        state = after if isinstance(after, tuple) else (after,)
        outputs.append(state[0])
    rows = [state, *reversed(ended)]
    return outputs, tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
