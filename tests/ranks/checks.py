"""Checks of two ranks that the tests run, and the mutants that they must kill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.audit.noise_law import SAMPLE, judge
from opacus_bpclip.optimizer import optimizer
from opacus_bpclip.sampling.records import Pass
from tests.ranks.models import Mean, Net, Private, examples, make_private, share
from tests.ranks.pair import pair

SIGMA, CLIP = 1.3, 0.5
_STEPS = 60


def noises(rank: int, wrapper: str, steps: int, seed: int = 0) -> NDArray[np.float64]:
    """Return the noise of steps without examples, in units of its claimed deviation."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 4))  # shards of one size
    data = TensorDataset(torch.randn(40, 40), torch.zeros(40, dtype=torch.long))
    private = make_private(
        wrapper,
        model=model,
        data=data,
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        # Seeded alike on both ranks, as most training code has it.
        noise_generator=torch.Generator().manual_seed(seed),
    )
    found = []
    for _ in range(steps):
        private.step(torch.zeros(0, 40), torch.zeros(0, dtype=torch.long))
        found.append(private.released() / (SIGMA * CLIP))
    return torch.stack(found).double().numpy()


def seeds(rank: int, wrapper: str) -> list[int]:
    """Return the seeds of this rank's generators, where the user has seeded all alike."""
    private = make_private(
        wrapper,
        generator=torch.Generator().manual_seed(7),
        noise_generator=torch.Generator().manual_seed(7),
    )
    return [g.initial_seed() for g in (private.optimizer.generator, private.loader.generator)]


def check_seeds(wrapper: str) -> None:
    """No two generators of two ranks draw the same, for noise or for samples."""
    found = [seed % 2**32 for own in pair().run(seeds, wrapper) for seed in own]
    used = found if wrapper == "FSDP2" else [found[0], *found[1::2]]  # rank 0's noise is all
    assert len(set(used)) == len(used), "two generators are seeded alike"


def check_noise_law(wrapper: str) -> None:
    """The noise is one Gaussian of the claimed scale, the same for both ranks."""
    one, other = pair().run(noises, wrapper, _STEPS)
    assert np.array_equal(one, other), "the ranks step by other noise"
    assert one.size >= SAMPLE
    law = judge(one, "no examples", 1e-4)
    assert not law.violations + law.doubts, "the audit says: " + "; ".join(law.violations)


def union(
    rank: int, wrapper: str, allocation: str, sizes: tuple[int, int], parts: tuple[int, int]
) -> Tensor:
    """Take two steps; return what the last one released, and the parameters."""
    private = make_private(wrapper, allocation=allocation, lr=0.1, max_grad_norm=0.5)
    for seed in (5, 6):
        private.step(*share(examples(12, seed), rank, sizes), parts=parts[rank])
    assert private.engine.accountant.history == [(0.0, 0.25, 2)]
    return torch.stack([private.released(), private.values()])


def check_union(
    wrapper: str,
    allocation: str = "joint",
    sizes: tuple[int, int] = (6, 6),
    parts: tuple[int, int] = (1, 1),
) -> None:
    """Two ranks release what one process does on the union of their batches."""
    one, other = pair().run(union, wrapper, allocation, sizes, parts)
    alone = union(0, "", allocation, (12, 0), (1, 1))
    assert torch.equal(one, other), "the ranks release different sums"
    gap = float((one - alone).abs().max())
    assert gap < 1e-6, f"the sum of two ranks is off by {gap}"


def drawn(rank: int, seed: int) -> list[list[int]]:
    """Return the items of many samples, drawn with the same seeds on both ranks."""
    generator = torch.Generator().manual_seed(seed)
    private = make_private("DPDDP", data=TensorDataset(*examples(40)), generator=generator)
    return [items for _ in range(50) for items in private.loader.batch_sampler]


def check_sampling() -> None:
    """Each item is on one rank, and drawn as often as the others and independently of them."""
    ranks = pair().run(drawn, 0)
    held = [{item for batch in batches for item in batch} for batches in ranks]
    assert not held[0] & held[1], "an item is on both ranks"
    assert held[0] | held[1] == set(range(40)), "an item is on no rank"
    drawn_at = np.zeros((len(ranks[0]), 40))
    for batches in ranks:
        assert len(batches) == len(drawn_at), "an empty batch was left out"
        for step, batch in enumerate(batches):
            drawn_at[step, batch] += 1
    rates = drawn_at.mean(axis=0)
    # 200 draws at a rate of 0.25: 0.03 is one standard deviation.
    assert abs(rates - 0.25).max() < 0.13, f"an item is drawn at a rate of {rates.max()}"
    together = np.corrcoef(drawn_at.T) - np.eye(40)
    assert together.max() < 0.4, "two items are drawn together"


def step_in_parts(
    private: Private, x: Tensor, y: Tensor, parts: int, loss_of: Callable[..., Tensor]
) -> list[str]:
    """Take one step by physical batches; return what was refused.

    Args:
        private: trains.
        x: inputs of all of them.
        y: their labels.
        parts: how many there are.
        loss_of: returns the loss of a part's inputs, labels and number.
    """
    errors = []
    for index, part in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        private.optimizer.zero_grad()
        private.optimizer.signal_skip_step(do_skip=index + 1 < parts)
        try:
            loss_of(*part, index).backward()
        except PrivacyViolationError as error:
            errors.append(str(error))
        try:
            private.optimizer.step()
        except PrivacyViolationError as error:
            errors.append(str(error))
    private.optimizer.zero_grad()
    return errors


def stepped_after(rank: int, wrapper: str, where: str) -> dict[str, Any]:
    """Train a step that rank 1 refuses, then another; return what was raised, and what became."""
    private = make_private(wrapper, lr=0.1)
    x, y = share(examples(12), rank, (5, 7))
    bad = rank == 1
    private.loader.samples.draw(len(x) - (bad and where == "step"), Pass())
    parts = 3 if bad and where == "middle of a batch" else 1

    def loss_of(own: Tensor, labels: Tensor, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(private.model(own), labels)
        penalty = bad and where != "step" and index == parts // 2
        return loss + private.optimizer.params[0].sum() if penalty else loss

    errors = step_in_parts(private, x, y, parts, loss_of)
    before = private.values()
    private.step(*share(examples(12, seed=7), rank, (5, 7)))
    return {
        "errors": errors,
        "before": before,
        "released": private.released(),
        "values": private.values(),
        "history": private.engine.accountant.history,
    }


def lone_step(rank: int) -> bool:
    """Return whether a rank steps where rank 1 refuses to; nobody waits for another's sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "released", lambda sums, *_: list(sums))
        private = make_private("DPDDP")
        private.loader.samples.draw(6 - rank, Pass())
        private.backward(*examples(6))
        try:
            private.optimizer.step()
        except PrivacyViolationError:
            return False
        return True


def check_agreement() -> None:
    """Where one rank refuses, none steps."""
    steps = pair().run(lone_step)
    assert not steps[1]
    assert not steps[0], "rank 0 stepped on, while rank 1 refused"


def check_refusal(wrapper: str, where: str) -> None:
    """What rank 1 refuses neither rank releases; both say why, and their next step is whole."""
    one, other = pair().run(stepped_after, wrapper, where)
    reason = other["errors"][0] if other["errors"] else "nothing"
    assert one["errors"], f"rank 0 stepped on, while rank 1 refused: {reason}"
    text = f"Rank 1 of 2 has refused its part of this step, so no rank takes it: {reason}"
    assert one["errors"] == [text], f"rank 0 says: {one['errors']}"
    begun = make_private().values()
    for rank in (one, other):
        assert torch.equal(rank["before"], begun), "a refused step has moved the parameters"
        assert rank["history"] == [(0.0, 0.25, 1)], f"the accountant saw {rank['history']}"
    assert torch.equal(one["values"], other["values"])
    alone = make_private()
    alone.step(*examples(12, seed=7))
    torch.testing.assert_close(one["released"], alone.released(), atol=1e-6, rtol=0)


def steps_of_which_one_fails(rank: int, wrapper: str, where: str) -> list[str]:
    """Return what three steps raise, of which the first one fails on rank 1 alone."""
    private = make_private(wrapper, lr=0.1)
    errors, step_of = [], private.optimizer.original_optimizer.step
    for step in range(3):
        fails = step == 0 and rank == 1
        if where == "hook":
            private.optimizer.attach_step_hook(fail if fails else lambda _: None)
        else:
            private.optimizer.original_optimizer.step = fail if fails else step_of
        try:
            private.step(*share(examples(12), rank, (5, 7)))
            errors.append("")
        except RuntimeError as error:  # PrivacyViolationError is one
            errors.append(str(error))
        private.optimizer.zero_grad()
    return errors


def fail(*_: Any) -> None:
    raise RuntimeError("full disk")


def check_leaving(wrapper: str, where: str) -> tuple[list[str], list[str]]:
    """Where a rank lacks a step of the others, none goes on; return what later steps raise."""
    one, other = pair().run(steps_of_which_one_fails, wrapper, where)
    assert (one[0], other[0]) == ("", "full disk")
    for errors in (one[1:], other[1:]):
        assert all(errors), "the ranks stepped on, though one lacks a step"
    return one[1:], other[1:]


def moves(rank: int, wrapper: str, cases: int) -> list[float]:
    """Return by how much one example moves the released sum, over the claim, in drawn cases."""
    generator = np.random.default_rng(7)
    found = []
    for case in range(cases):
        limit = float(generator.choice([0.1, 1.0, 7.0]))
        allocation = ("joint", "equal", "dimension")[case % 3]
        bound = str(generator.choice(["exact", "weighted"]))
        torch.manual_seed(case)
        private = make_private(
            wrapper,
            model=Net() if case % 2 else nn.Sequential(nn.Embedding(7, 4), Mean(), nn.Linear(4, 3)),
            max_grad_norm=limit,
            allocation=allocation,
            bound=bound,
            probe=False,
        )
        sizes = generator.integers(0, 6, size=2)
        added = int(generator.integers(2))  # the rank that has one example more
        scale = float(generator.choice([1e-2, 1.0, 1e4]))
        parts = int(generator.integers(1, 3))
        batch = examples(12, seed=case)
        sums = []
        for more in (0, 1):
            # The one more comes last on its rank.
            count = sizes[rank] + more * (rank == added)
            x, y = (half[:count] for half in share(batch, rank, (6, 6)))
            private.step(x, y, parts=min(parts, max(len(x), 1)), scale=scale)
            sums.append(private.released().double())
        found.append(float((sums[1] - sums[0]).norm()) / limit)
    return found


def check_sensitivity(wrapper: str) -> None:
    """No example moves the sum over the ranks by more than the claim; some move it by all of it."""
    one, other = pair().run(moves, wrapper, 24)
    assert one == other, "the ranks release different sums"
    assert max(one) <= 1 + 1e-4, f"one example moves the sum by {max(one)} > 1 of the claim"
    assert max(one) >= 0.999, f"no example moves the sum by more than {max(one)} of the claim"
