"""Error messages about the rows of a step, with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

TWO_SAMPLES = (
    "One step would add up two sampled batches, which may share an example: it would contribute "
    "twice. A step must use one batch of the loader that make_private returned, or all of its "
    "physical batches. Do not signal_skip_step over several batches, and finish a logical batch "
    "before leaving a loop over physical batches (after this error, zero_grad() discards the "
    "sums of an unfinished one). For larger batches, make the loader's batch_size larger."
)
LEFT_OUT = (
    "The loop left out a physical batch that has rows, so the following ones would be assigned "
    "to the wrong sample, and one step would add up two samples. Moreover, if one of its rows "
    "decides whether a batch is left out, that example changes what the others contribute. Call "
    "optimizer.step() for each physical batch; after zero_grad() it adds nothing."
)
SEVERAL_ITERATORS = (
    "Several iterators over the loader are open, each with a batch that had no step. This step's "
    "batch may be of any of them, so one step might add up two samples. Close or exhaust the other "
    "iterator first, for example `del it`; to evaluate on the loader, finish or leave that loop, "
    "and read the next batch before its step. Then begin the training loop anew: no step may use "
    "the batches of these iterators any more. A notebook keeps the traceback of a loop that was "
    "interrupted, and its iterator with it."
)


def too_many(rows: int | None, total: int, waiting: Sequence[int], *, padded: bool) -> str:
    """Return the message for a step on more rows than the loader has drawn items.

    Args:
        rows: the rows of the current gradients, ``None`` if unknown.
        total: the rows of the whole step.
        waiting: the items of each sample that may be trained on.
        padded: whether the loader pads batches; recognised rows of padding are not counted.
    """
    if not any(waiting):
        return (
            f"The model trains on a batch{f' of {rows} rows' * bool(rows)}, but the data "
            "loader that make_private returned has drawn no batch that was not used yet: this one "
            "came from elsewhere, or it is used a second time. The accountant counts each step as "
            "a Poisson sample of its own, drawn by that loader. Iterate over the loader that "
            "make_private returned for this model, and take one step for each of its batches. If "
            "two models train on the same batches, put both in one module whose forward runs "
            "them, with one optimizer over both."
        )
    if padded:
        return (
            f"The model trains on a batch of {total} rows that are not padding, but the data "
            f"loader sampled {max(waiting)} items. The rows that physical_batch_size adds are "
            "zeros, and recognised as such. Something before the model has changed them "
            "(normalisation or noise in the training loop, a mask or positions that are made "
            "there), or an item has several rows. Rows that were not sampled would count as data. "
            "Make such changes in the data set, the collate_fn, or the model's forward."
        )
    return (
        f"The model trains on a batch of {total} rows, but the data loader sampled "
        f"{max(waiting)} items: an item has several rows, or some rows are not an item's (crops, "
        "augmented copies, generated examples). The bound holds for one row of each item; an "
        "item with several rows contributes several times as much. Make one row of each item "
        "in the dataset or collate_fn, and train on nothing but the loader's batch. For several "
        "views of each item, use opacus_bpclip.AugmentedViews and FoldViews."
    )
