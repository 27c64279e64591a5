"""Ways to be wrong, each patched into the real code, each killed by a check of the suite."""

from tests.mutants import (
    bounds,
    compiled,
    coupling,
    functions,
    joint,
    layers,
    losses,
    noise,
    padding,
    precision,
    probe,
    ranks,
    release,
    replacements,
    sampling,
    trainers,
)
from tests.mutants.registry import MUTANTS, Mutant, mutant

__all__ = [
    "MUTANTS",
    "Mutant",
    "bounds",
    "compiled",
    "coupling",
    "functions",
    "joint",
    "layers",
    "losses",
    "mutant",
    "noise",
    "padding",
    "precision",
    "probe",
    "ranks",
    "release",
    "replacements",
    "sampling",
    "trainers",
]
