"""Every Hypothesis strategy of the suite: layers, architectures, options and hostile batches."""

from tests.strategies.architectures import Branches, architectures
from tests.strategies.batches import hostile_batches, hostile_examples, sequences
from tests.strategies.layers import (
    CASES,
    NO_EMPTY_BATCH,
    NORMS,
    LayerCase,
    layer_cases,
    norm_cases,
    product_cases,
    single_layers,
)
from tests.strategies.numbers import scales, seed_torch, seeds
from tests.strategies.options import BOUNDS, MODES, accepted, clippings, whitenings

__all__ = [
    "BOUNDS",
    "CASES",
    "MODES",
    "NORMS",
    "NO_EMPTY_BATCH",
    "Branches",
    "LayerCase",
    "accepted",
    "architectures",
    "clippings",
    "hostile_batches",
    "hostile_examples",
    "layer_cases",
    "norm_cases",
    "product_cases",
    "scales",
    "seed_torch",
    "seeds",
    "sequences",
    "single_layers",
    "whitenings",
]
