"""Items that a data set holds several times: each copy would be sampled and clipped by itself."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset, TensorDataset

# Of a data set's items: numbers, or keys of another kind; `None` for all of them.
_Keys: TypeAlias = "NDArray[np.int64] | Sequence[Any] | None"


def count_of_repeats(dataset: Any) -> int:
    """Return how many of a data set's items are there already, under another index.

    It follows what `torch.utils.data.Subset` and `ConcatDataset` are made of, however deep. Two
    data sets of one's own that read the same files count as different ones.
    """
    try:
        parts: dict[Hashable, list[Any]] = defaultdict(list)
        for base, keys in _parts(dataset, None):
            parts[_identity(base)].append((base, keys))
        return sum(_repeats(named) for named in parts.values())
    except Exception:
        # The user's own code, whose error training will report; or keys that cannot be compared.
        return 0


def _parts(dataset: Any, keys: _Keys) -> Iterator[tuple[Any, _Keys]]:
    """Yield the data sets that items come from, each with the keys that they have there."""
    read = type(dataset).__getitem__
    if read is Subset.__getitem__:
        indices = _numbers(dataset.indices)
        yield from _parts(dataset.dataset, indices if keys is None else _chosen(indices, keys))
    elif read is not ConcatDataset.__getitem__:
        yield dataset, keys
    elif keys is None:
        for part in dataset.datasets:
            yield from _parts(part, None)
    else:
        places = _from_start(np.asarray(keys, dtype=np.int64), len(dataset))
        numbers = np.searchsorted(dataset.cumulative_sizes, places, side="right")
        starts = np.array([0, *dataset.cumulative_sizes])
        for number in np.unique(numbers):
            own = places[numbers == number] - starts[number]
            yield from _parts(dataset.datasets[number], own)


def _repeats(parts: Sequence[tuple[Any, _Keys]]) -> int:
    """Return how many keys of one data set are there several times."""
    base = parts[0][0]
    if len(parts) == 1 and parts[0][1] is None:
        return 0
    named = [np.arange(len(base)) if keys is None else keys for _, keys in parts]
    if all(isinstance(keys, np.ndarray) for keys in named):
        places = np.concatenate(named)
        if places.min(initial=0) < 0:
            places = _from_start(places, len(base))
        places.sort()
        return int(np.count_nonzero(places[1:] == places[:-1]))
    listed = [key for keys in named for key in keys]
    return len(listed) - len(set(listed))


def _identity(base: Any) -> Hashable:
    """Return what tells a data set: for tensors their memory, which several may share."""
    if type(base) is TensorDataset and base.tensors:
        first = base.tensors[0]
        return first.data_ptr(), first.shape, first.stride()
    return id(base)


def _chosen(keys: Sequence[Any] | NDArray[np.int64], places: _Keys) -> _Keys:
    if isinstance(keys, np.ndarray) and isinstance(places, np.ndarray):
        return keys[places]
    return [keys[place] for place in (() if places is None else places)]


def _numbers(keys: Any) -> NDArray[np.int64] | Sequence[Any]:
    """Return keys as an array, if they are whole numbers of any type; else as they are."""
    array = np.asarray(keys)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    try:
        return np.fromiter(map(operator.index, keys), dtype=np.int64)
    except TypeError:
        return list(keys)


def _from_start(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return indices of which those below zero count from the end as such from the start."""
    return np.where(places < 0, places + size, places)
