"""Every mutant is killed, of what it breaks, by a check that the real code passes."""

import pytest

from tests.mutants import MUTANTS
from tests.mutants.document import PAGE, render

KILLERS = {m.killer.__name__: m.killer for m in MUTANTS}


@pytest.fixture(scope="module")
def _mutants_have_lived():
    for mutant in MUTANTS:
        with mutant.alive():
            pass


# After every mutant has lived once: none may leave a trace.
@pytest.mark.usefixtures("_mutants_have_lived")
@pytest.mark.parametrize("killer", KILLERS)
def test_the_real_code_passes_the_killer(killer):
    KILLERS[killer]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.name} by {m.killer.__name__}")
def test_the_mutant_is_killed(mutant):
    with mutant.alive(), pytest.raises(AssertionError) as death:
        mutant.killer()
    assert mutant.died(death.value), f"{mutant.name} died of something else: {death.value}"


def test_names_are_not_used_twice():
    patches = {m.patch for m in MUTANTS}
    assert len({patch.__name__ for patch in patches}) == len(patches)
    assert len({m.killer for m in MUTANTS}) == len(KILLERS)


def test_the_document_lists_the_mutants_as_they_are():
    assert PAGE.read_text() == render(), "out of date: python -m tests.mutants.document"
