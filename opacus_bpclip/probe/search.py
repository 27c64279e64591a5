"""Runs of one copy of a model on the same examples with other companions, compared row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opacus_bpclip.model.changed import edited_problem
from opacus_bpclip.model.coverage import (
    batch_normalization_problem,
    batch_normalizations,
)
from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import (
    Companions,
    Layout,
    differ,
    distance,
    equal,
    fitting,
    layouts,
    partitions,
    vanish,
)
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.order import Rows, constant_layers, disturbed, out_of_order
from opacus_bpclip.probe.problems import Problem, UntriedError
from opacus_bpclip.probe.randomness import SEEDS, Steady, tolerated
from opacus_bpclip.probe.recording import CallRecord, Recording

_SIDES = ("inputs", "outputs")

Compare = Callable[[Tensor, Tensor, Sequence[Layout], Companions, float], bool]


class _Trial(NamedTuple):
    """The same examples with other companions, and the mode for random numbers."""

    other: Batch
    companions: Companions
    steady: Steady | None


class Search:
    """Compares runs of one copy of a model.

    Args:
        copy: the copy, inside its ``with`` statement.
        batch: two or more examples.
        loss_reduction: ``"mean"`` or ``"sum"``: what an output without a batch axis must be.
        rows: the layers whose rows must be in order, with the places of the batch.
    """

    def __init__(self, copy: Copy, batch: Batch, loss_reduction: str, rows: Rows) -> None:
        self.copy = copy
        self.batch = batch
        self.mean = loss_reduction == "mean"
        self.rows = rows
        self.steady = Steady()
        self.tolerance = 0.0
        self.layouts: dict[tuple[str, int, str, int], list[Layout] | None] = {}

    def problem(self) -> Problem | None:
        """Return what is wrong: first for other values of the companions, then for fewer of them.

        Raises:
            UntriedError: the model makes no finite number.
            Exception: whatever the model's own code raises.
        """
        base = self._first_run()
        for name in self.copy.edited():
            return Problem(problems.owner(name), edited_problem(name))
        pairs = list(partitions(self.batch.size))
        runs = self._runs_of_parts(base, pairs)
        return (
            self._problem_of_values(base)
            or self._problem_of_numbers(base, runs)
            or self._problem_of_order(base, runs)
            or self._problem_of_constants(base)
        )

    def problem_of_numbers(self) -> Problem | None:
        """Return what is wrong with the outputs or the order of rows in half of the batch.

        Raises:
            Exception: whatever the model's own code raises.
        """
        base, runs = self._half_runs()
        problem = self._problem_of_numbers(base, runs, inside=False)
        return problem or self._problem_of_order(base, runs)

    def problem_of_order(self) -> Problem | None:
        """Return which layer has its rows in another order than the batch.

        Raises:
            Exception: whatever the model's own code raises.
        """
        return self._problem_of_order(*self._half_runs())

    def _half_runs(self) -> tuple[Recording, list[tuple[_Trial, Recording]]]:
        inside = bool(self.rows)
        base = self._first_run(inside=inside)
        pairs = [next(partitions(self.batch.size))]
        return base, self._runs_of_parts(base, pairs, inside=inside)

    def _first_run(self, *, inside: bool = True) -> Recording:
        base = self.copy.run(self.batch, self.steady, inside=inside)
        made = (x for call in base.calls for x in call.outputs)
        if not any(bool(x.isfinite().any()) for x in made):
            raise UntriedError("nothing in it makes a finite number")
        self.tolerance = tolerated(self.steady, self.copy.device)
        return base

    def _runs_of_parts(
        self, base: Recording, pairs: Sequence[tuple[list[int], list[int]]], *, inside: bool = True
    ) -> list[tuple[_Trial, Recording]]:
        """Run the parts of each pair, and find the batch axes from the sizes of tensors."""
        made = []
        for rows in (rows for pair in pairs for rows in pair):
            trial = _Trial(self.batch.select(rows), self._among(rows), self.steady)
            run = self.copy.run(trial.other, self.steady, inside=inside)
            self._learn(base, run, trial.companions)
            made.append((trial, run))
        return made

    def _problem_of_values(self, base: Recording) -> Problem | None:
        if not self.steady.random:
            return self._problem_of_companions(base, 0)
        # With one seed a random order of rows may happen to be the batch's.
        for seed in SEEDS if self.rows else SEEDS[:1]:
            seeded = self.copy.run(self.batch, None, seed=seed)
            problem = self._problem_of_companions(seeded, seed)
            if problem is not None:
                return problem
        return None

    def _problem_of_companions(self, seeded: Recording, seed: int) -> Problem | None:
        size = self.batch.size
        kept, *second = partitions(size)
        # Equal random numbers would hide an order that depends on them. With seeded ones, further
        # partitions are needed to tell all examples apart.
        drawn = [pair[0] for pair in second if self.rows and self.steady.random]
        runs = []
        for rows in (*kept, *drawn):
            among = Companions(size, size, rows, rows)
            trial = _Trial(self.batch.swapped(rows, seed=2), among, None)
            run = self.copy.run(trial.other, None, seed=seed)
            if self._coupled(seeded, run, among):
                return self._located(trial, "the values of the other examples in the batch")
            runs.append((trial, run))
        return self._problem_of_order(seeded, runs)

    def _problem_of_numbers(
        self,
        base: Recording,
        runs: Sequence[tuple[_Trial, Recording]],
        *,
        inside: bool = True,
    ) -> Problem | None:
        for trial, run in runs:
            if self._coupled(base, run, trial.companions, inside=inside):
                return self._located(trial, "the number of other examples in the batch")
        for first in range(0, len(runs), 2):
            halves = [(run, trial.other.size) for trial, run in runs[first : first + 2]]
            if not self._adds_up(base, halves):
                return Problem("(root)", problems.not_additive(mean=self.mean), of_loss=True)
        return None

    def _problem_of_order(
        self, base: Recording, runs: Sequence[tuple[_Trial, Recording]]
    ) -> Problem | None:
        """Return which layer has an example's row at another place than the batch."""
        for trial, run in runs:
            name = out_of_order(base, run, self.rows, trial.companions, self.tolerance)
            if name is not None:
                return self._moved_problem(name)
        return None

    def _problem_of_constants(self, base: Recording) -> Problem | None:
        """Return which layer, with an output equal for all examples, has its rows out of order."""
        constant = constant_layers(base, self.rows, self.batch.size)
        for kept, _ in partitions(self.batch.size) if constant else ():
            with disturbed(self.copy.model, constant, kept, self.batch.size):
                run = self.copy.run(self.batch, self.steady)
            among = Companions(self.batch.size, self.batch.size, kept, kept)
            others = {name: at for name, at in self.rows.items() if name not in constant}
            if self._coupled(base, run, among, inside=False) or out_of_order(
                base, run, others, among, self.tolerance
            ):
                return self._moved_problem(next(iter(constant)))
        return None

    def _moved_problem(self, name: str) -> Problem:
        return Problem(name, problems.moved(name, self._module(name), self.rows[name][0].entries))

    def _module(self, name: str) -> nn.Module:
        return self.copy.model if name == "(root)" else self.copy.model.get_submodule(name)

    def _among(self, rows: Sequence[int]) -> Companions:
        return Companions(self.batch.size, len(rows), rows, range(len(rows)))

    def _learn(self, base: Recording, run: Recording, companions: Companions) -> None:
        """Find the batch axis of every tensor, from its shapes in two batches."""
        for call, other in base.matched(run):
            for side in _SIDES:
                pairs = zip(getattr(call, side), getattr(other, side), strict=False)
                for index, (x, y) in enumerate(pairs):
                    key = (call.name, call.index, side, index)
                    self.layouts.setdefault(key, layouts(x.shape, y.shape, companions))

    def _coupled(
        self, base: Recording, run: Recording, companions: Companions, *, inside: bool = True
    ) -> bool:
        """Return whether an example's row changed in an output of the model, or of a module in it.

        The model's own outputs are in the batch's order. Inside the model the rows may be sorted,
        and shapes may depend on the examples' values.
        """
        *modules, root = base.matched(run)
        return self._moved(*root, "outputs", companions, differ, strict=True) or any(
            self._moved(*calls, "outputs", companions, vanish) for calls in modules * inside
        )

    def _moved(
        self,
        call: CallRecord,
        other: CallRecord,
        side: str,
        companions: Companions,
        compare: Compare,
        *,
        strict: bool = False,
    ) -> bool:
        ours, theirs = getattr(call, side), getattr(other, side)
        if len(ours) != len(theirs):
            return strict
        for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            known = self.layouts.get((call.name, call.index, side, index), [])
            where = fitting(known or (), x, y, companions) if x.dim() == y.dim() else []
            if where and compare(x, y, where, companions, self.tolerance):
                return True
            if not where and strict and (known is None or known or x.shape != y.shape):
                # Entries for pairs of examples, or a size that depends on values.
                return True
        return False

    def _adds_up(self, base: Recording, halves: Sequence[tuple[Recording, int]]) -> bool:
        """Return whether outputs without a batch axis are constants, or sums over the examples."""
        root = base.calls[-1]
        for index, whole in enumerate(root.outputs):
            if self.layouts.get((root.name, root.index, "outputs", index)):
                continue
            parts = [run.outputs[index] for run, _ in halves]
            weights = [count / self.batch.size if self.mean else 1.0 for _, count in halves]
            total = torch.stack([w * x for w, x in zip(weights, parts, strict=True)]).sum(dim=0)
            gaps = [float(distance(whole[None], x[None]).max()) for x in (total, *parts)]
            if gaps[0] > self.tolerance and max(gaps[1:]) > self.tolerance:
                return False
        return True

    def _located(self, trial: _Trial, cause: str) -> Problem:
        """Return the problem, with the module in which the coupling begins."""
        again = self.copy.run(self.batch, trial.steady, inputs=True)
        if not same(again, self.copy.run(self.batch, trial.steady), self.tolerance):
            return Problem("(root)", problems.NOT_REPEATABLE)
        rows = next(partitions(self.batch.size))[0]
        part = self.copy.run(self.batch.select(rows), self.steady, inputs=True)
        self._learn(again, part, self._among(rows))
        run = self.copy.run(trial.other, trial.steady, inputs=True)
        # A module returns before its caller, so the first one found is the innermost.
        name = next(
            (
                call.name
                for call, other in again.matched(run)
                if self._moved(call, other, "outputs", trial.companions, vanish, strict=True)
                and not self._moved(call, other, "inputs", trial.companions, vanish, strict=True)
            ),
            "(root)",
        )
        module = self._module(name)
        if name in batch_normalizations(self.copy.model):
            return Problem(name, batch_normalization_problem(name, module))
        return Problem(name, problems.coupled(name, type(module).__name__, cause))


def same(one: Recording, other: Recording, tolerance: float = 0.0) -> bool:
    """Return whether the model's outputs in two runs are equal, up to a tolerance."""
    return equal(one.outputs, other.outputs, tolerance)
