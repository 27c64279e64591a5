"""What may be wrong with the rows of a step, each with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

TWO_SAMPLES = (
    "One step would add up two sampled batches, which may share an example: it would contribute "
    "twice. A step is of one batch of the loader that make_private returned, or of all its parts. "
    "Do not signal_skip_step over several batches, and finish a logical batch before leaving "
    "a loop over physical batches (zero_grad() throws away what an unfinished one has collected, "
    "after this error). For larger batches, make the loader's batch_size larger."
)
LEFT_OUT = (
    "The loop left out a physical batch that has rows, so what follows would be "
    "taken for a part of another sample, and one step would add up two. Whether a batch is left "
    "out may depend on one of its rows, too, and then changes what the others contribute. Call "
    "optimizer.step() for each physical batch; after zero_grad() it adds nothing."
)


def too_many(rows: int | None, total: int, waiting: Sequence[int], *, padded: bool) -> str:
    """Say that there are more rows than the loader has drawn items.

    Args:
        rows: of the gradients at hand, ``None`` if unknown.
        total: of the whole step.
        waiting: the items of each batch that may be trained on.
        padded: whether the loader fills batches up; rows that were known for padding do not count.
    """
    if not any(waiting):
        return (
            f"The model trains on a batch{f' of {rows} rows' * bool(rows)}, but the data "
            "loader that make_private returned has drawn none that was not used yet: the batch "
            "came from elsewhere, or it is used a second time. The accountant takes each step for "
            "a Poisson sample of its own, drawn by that loader. Iterate over the loader that "
            "make_private returned for this model, and take one step for each of its batches. If "
            "two models train on the same batches, put both in one module whose forward runs "
            "them, with one optimizer over both."
        )
    if padded:
        return (
            f"The model trains on a batch of {total} rows that are not padding, but the data "
            f"loader sampled {max(waiting)} items. The rows that physical_batch_size adds are "
            "zeros, and known by that: something before the model has changed them (normalisation "
            "or noise in the training loop, a mask or positions that are made there), or an item "
            "has several rows. They would count as data that nobody has sampled. Do it in the "
            "data set, the collate_fn, or the model's forward."
        )
    return (
        f"The model trains on a batch of {total} rows, but the data loader sampled "
        f"{max(waiting)} items: an item has several rows, or some rows are of no item (crops, "
        "augmented copies, generated examples). The bound holds for one row of each item; an "
        "item with several rows contributes several times as much. Make one row of each item "
        "in the dataset or collate_fn, and train on nothing but the loader's batch."
    )
