"""Hypothesis profiles and the thread count for the whole suite."""

import os

import torch
from hypothesis import HealthCheck, settings

# A list, not tests; collected for its doctests it would be imported, and filled, a second time.
collect_ignore = ["mutants"]

# Tiny steps on two threads are many times slower than on one.
torch.set_num_threads(1)

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=200,
    database=None,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=_SLOW_IS_FINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
