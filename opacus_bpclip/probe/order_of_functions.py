"""Whether functions on parameters have their rows in the batch's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opacus_bpclip.model.places import Place
from opacus_bpclip.model.plan import Method, Template
from opacus_bpclip.probe import problems
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.comparison import Companions, close, partitions
from opacus_bpclip.probe.problems import Problem, RefusedError
from opacus_bpclip.probe.recorder import Replaying, Seen

# For each tensor of a call, arguments first, the places where it may hold the batch.
Places = list[list[Place]]

# For calls, by their number, how to change the result.
Changes = Mapping[int, Callable[[Any], Any]]


def pairs_problem(seen: Seen) -> Problem:
    """Return the problem of a call whose sizes are not in proportion to the batch's."""
    return Problem("(root)", problems.pairs_in_function(_names(seen), seen.call.name))


def _moved_problem(seen: Seen) -> Problem:
    return Problem("(root)", problems.moved_in_function(_names(seen), seen.call.name))


def _names(seen: Seen) -> str:
    return ", ".join(sorted(seen.call.names))


def narrow(
    seen: Mapping[int, Seen],
    other: Mapping[int, Seen],
    found: Mapping[int, Places],
    where: Companions,
    tolerance: float,
) -> None:
    """Remove the places of each tensor at which the common examples differ between two runs.

    Args:
        seen: the calls of one run.
        other: the calls of a run on some of the examples.
        found: the possible places, by the number of the call; changed in place.
        where: the examples that the runs have in common.
        tolerance: the largest relative difference of equal numbers.

    Raises:
        RefusedError: no place is left for a tensor.
    """
    for number, one in seen.items():
        if number not in other:
            raise RefusedError(Problem("(root)", problems.unsteady_functions()))
        pairs = zip(
            (*one.call.leaves, *one.results),
            (*other[number].call.leaves, *other[number].results),
            found[number],
            strict=True,
        )
        for x, y, places in pairs:
            if not places or not isinstance(x, Tensor):
                continue
            places[:] = [p for p in places if _same_rows(x, y, p, where, tolerance)]
            if not places:
                raise RefusedError(_moved_problem(one))


def check_replayed(one: Replaying, other: Replaying, where: Companions, tolerance: float) -> None:
    """Check that the common examples of two runs are at their places in every call.

    Args:
        one: a run.
        other: another run.
        where: the examples that the runs have in common.
        tolerance: the largest relative difference of equal numbers.

    Raises:
        RefusedError: they are not.
    """
    if [seen.call.key for seen in one.seen.values()] != [
        seen.call.key for seen in other.seen.values()
    ]:
        raise RefusedError(Problem("(root)", problems.unsteady_functions()))
    for number, template in one.templates.items():
        seen, again = one.seen[number], other.seen[number]
        places = (*template.arguments, *template.outputs)
        tensors = (*seen.call.leaves, *seen.results), (*again.call.leaves, *again.results)
        for x, y, place in zip(*tensors, places, strict=True):
            if place is None or not isinstance(x, Tensor):
                continue
            fits = place.fits(x, where.before) and place.fits(y, where.after)
            if not fits or not _same_rows(x, y, place, where, tolerance):
                raise RefusedError(_moved_problem(seen))


def check_copies(
    run: Replaying, batch: Batch, tolerance: float, rerun: Callable[[Changes], Sequence[Tensor]]
) -> None:
    """Check the order of results that are the same for every example, as `in_order` does.

    Args:
        run: a run.
        batch: the batch of the run.
        tolerance: the largest relative difference of equal numbers.
        rerun: runs the model again with changed results, and returns its outputs.

    Raises:
        RefusedError: a row of a result affects the output of an example at another place.
    """
    if not _outputs_stay(run.seen, run.templates, batch, run.outputs, tolerance, rerun):
        raise RefusedError(_first_moved(run.seen, run.templates, batch.size))


def _first_moved(seen: Mapping[int, Seen], templates: Mapping[int, Template], size: int) -> Problem:
    alike = (one for number, one in seen.items() if _alike(one, templates[number], size))
    return _moved_problem(next(alike))


def _same_rows(x: Tensor, y: Tensor, place: Place, where: Companions, tolerance: float) -> bool:
    x, y = (_real(t.detach()) for t in (x, y))
    before = place.rows(x, where.before)[list(where.rows)]
    after = place.rows(y, where.after)[list(where.places)]
    return before.shape == after.shape and close(before, after, tolerance)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def in_order(
    seen: Mapping[int, Seen],
    found: Mapping[int, Places],
    batch: Batch,
    outputs: Sequence[Tensor],
    tolerance: float,
    rerun: Callable[[Changes], Sequence[Tensor]],
) -> dict[int, Template]:
    """Return the templates of the calls.

    Where a call's results are the same for every example, its effect on the outputs shows the
    order: the model runs again with some examples' results changed, and the outputs of the others
    must not change.

    Args:
        seen: the calls, by their number.
        found: the possible places of each call's tensors.
        batch: the batch of the run.
        outputs: the model's outputs.
        tolerance: the largest relative difference of equal numbers.
        rerun: runs the model again with changed results, and returns its outputs.

    Raises:
        RefusedError: no choice of places passes the check.
    """
    templates: dict[int, Template] = {}
    for inner in (False, True):
        made = {number: _template(one, found[number], inner=inner) for number, one in seen.items()}
        if made == templates:
            break
        templates = made
        if _outputs_stay(seen, templates, batch, outputs, tolerance, rerun):
            return templates
    raise RefusedError(_first_moved(seen, templates, batch.size))


def _template(seen: Seen, places: Places, *, inner: bool) -> Template:
    """Return a template; a tensor with several possible places gets the layout of the others.

    Args:
        seen: the call.
        places: the possible places.
        inner: the layout to choose where no tensor has a single place.
    """
    tensors = zip((*seen.call.leaves, *seen.results), places, strict=True)
    known = {
        left[0].inner
        for x, left in tensors
        if isinstance(x, Tensor) and len(left) == 1 and left[0].entries > 1
    }
    inner = known.pop() if len(known) == 1 else inner
    chosen = [
        None if not left else next((p for p in left if p.inner == inner), left[0])
        for left in places
    ]
    count = len(seen.call.leaves)
    for index, result in enumerate(seen.results, start=count):
        if not (isinstance(result, Tensor) and result.requires_grad):
            chosen[index] = None  # Without a gradient, such as the indices that max returns.
    method: Method = "graph" if seen.random else "vmap"
    return Template(tuple(chosen[:count]), tuple(chosen[count:]), method)


def _outputs_stay(
    seen: Mapping[int, Seen],
    templates: Mapping[int, Template],
    batch: Batch,
    outputs: Sequence[Tensor],
    tolerance: float,
    rerun: Callable[[Changes], Sequence[Tensor]],
) -> bool:
    size, axis = batch.size, batch.axis
    alike = [number for number, one in seen.items() if _alike(one, templates[number], size)]
    if alike and not any(x.dim() > axis and x.shape[axis] == size for x in outputs):
        return False  # No output shows to which example each row belongs.
    for kept, _ in partitions(size) if alike else ():
        changed = rerun({number: _change(templates[number], kept, size) for number in alike})
        # The model's own outputs are in the batch's order.
        for x, y in zip(outputs, changed, strict=True):
            if x.dim() <= axis or x.shape[axis] != size:
                continue
            if not close(x.movedim(axis, 0)[kept], y.movedim(axis, 0)[kept], tolerance):
                return False
    return True


def _alike(seen: Seen, template: Template, size: int) -> bool:
    """Return whether a result of a call is the same for every example."""
    for x, place in template.placed(seen.results):
        rows = place.rows(x.detach(), size)
        if x.is_floating_point() and close(rows, rows[:1].expand_as(rows), 0.0):
            return True
    return False


def _change(template: Template, kept: Sequence[int], size: int) -> Callable[[Any], Any]:
    def change(result: Any) -> Any:
        leaves, spec = pytree.tree_flatten(result)
        # Not torch's: where random numbers are steady, these would be taken for the model's.
        generator = np.random.default_rng(3)
        for index, place in enumerate(template.outputs):
            x = leaves[index]
            if place is not None and x.is_floating_point():
                rows = place.rows(x.detach(), size)
                # Positive noise: a scale stays positive.
                noise = torch.from_numpy(generator.random(rows.shape)).to(rows)
                noise[list(kept)] = 0
                leaves[index] = place.put_back(rows + noise)
        return pytree.tree_unflatten(leaves, spec)

    return change
