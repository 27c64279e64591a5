"""The log of sampled batches, by itself: honest use passes, and no sample is used twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opacus_bpclip.sampling.log import SampleLog


@st.composite
def honest_uses(draw: st.DrawFn) -> list[tuple[int, list[int], bool]]:
    """Sampled batches, each with the parts that it is trained in and whether it is left out."""
    uses = []
    for _ in range(draw(st.integers(1, 12))):
        parts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        uses.append((sum(parts), parts, draw(st.booleans()) and draw(st.booleans())))
    return uses


@given(honest_uses(), st.integers(0, 3), st.booleans())
def test_honest_use_is_never_refused(
    uses: list[tuple[int, list[int], bool]], ahead: int, announced: bool
) -> None:
    log = SampleLog()
    log.attached = True
    iteration = log.begin()
    drawn = 0
    for index, (_, parts, left_out) in enumerate(uses):
        while drawn < min(len(uses), index + 1 + (0 if announced else ahead)):
            log.draw(uses[drawn][0], iteration)
            drawn += 1
        if left_out and not announced:
            continue
        # Without announcements, a plain loop: whole batches.
        rows = parts if announced else [sum(parts)]
        for part, count in enumerate(rows):
            skip = part < len(rows) - 1
            if announced:
                log.signal(skip)
            assert log.skips(pop=True, rows=count) is (skip and announced)
            assert log.spend(count) is None
            if not skip:
                log.close()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 9), st.data())
def test_no_sample_is_used_by_more_rows_or_steps_than_it_has(
    items: list[int], extra: int, data: st.DataObject
) -> None:
    log = SampleLog()
    log.attached = True
    iteration = log.begin()
    for count in items:
        log.draw(count, iteration)
    assert log.spend(max(items) + extra) is not None
    accepted = 0
    for _ in range(len(items) + 3):
        rows = data.draw(st.integers(1, 12))
        if log.spend(rows) is None:
            accepted += rows
            log.close()
    assert accepted <= sum(items)
