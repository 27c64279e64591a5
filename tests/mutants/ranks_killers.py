"""Killers of mutants of several ranks; they run on two processes."""

from __future__ import annotations

from tests.ranks.checks import (
    check_agreement,
    check_leaving,
    check_noise_law,
    check_sampling,
    check_seeds,
    check_union,
)


def noise_of_two_ranks() -> None:
    """The audit's test of 60 steps without examples, on two ranks."""
    check_noise_law("DPDDP")


def noise_of_two_shards() -> None:
    """The audit's test of 60 steps without examples, on two shards."""
    check_noise_law("FSDP2")


def sum_of_two_ranks() -> None:
    """Two steps on two ranks, against one process on the union of their batches."""
    check_union("DPDDP")


def refusal_of_one_rank() -> None:
    """A step on more rows than items, on one of two ranks."""
    check_agreement()


def samples_of_two_ranks() -> None:
    """Two hundred samples of forty items on two ranks, which are seeded alike."""
    check_sampling()


def seeds_of_two_shards() -> None:
    """The seeds of two shards' generators, all of which the user has seeded alike."""
    check_seeds("FSDP2")


def step_that_one_rank_lacks() -> None:
    """Steps after one in which a hook has failed on one of two ranks."""
    check_leaving("DPDDP", "hook")
