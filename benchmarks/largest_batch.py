"""Search for the largest batch that fits, by few measurements of its peak."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest_batch(peak: Callable[[int], float], limit: float) -> int:
    """Return the largest batch found whose peak is within a limit, or 0.

    A peak is nearly a line over the batch. So the line through the two batches nearest to the
    limit leads to one whose peak should be a little below it, until a peak is less than a
    twentieth below it.

    Args:
        peak: of a batch, measured at large cost.
        limit: in the same unit.
    """
    peaks = {batch: peak(batch) for batch in (8, 16)}
    for _ in range(8):
        if any(0.95 * limit < own <= limit for own in peaks.values()):
            break
        small, large = sorted(sorted(peaks, key=lambda batch: abs(limit - peaks[batch]))[:2])
        growth = (peaks[large] - peaks[small]) / (large - small)
        # Small batches may need no more than what came before them.
        guess = large + (0.975 * limit - peaks[large]) / growth if growth > 0 else math.inf
        guess = max(1, int(min(guess, 4 * max(peaks))))
        if guess in peaks:
            break
        peaks[guess] = peak(guess)
    return max((batch for batch, own in peaks.items() if own <= limit), default=0)
