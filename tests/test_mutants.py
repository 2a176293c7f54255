"""The list of deliberate bugs is not stale; `python tests/mutants.py` applies them."""

import shlex

import pytest
from mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_bug_can_be_applied(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    wrong = mutated(source, mutant)
    assert wrong != source
    if mutant.file.endswith(".py"):
        compile(wrong, mutant.file, "exec")
    file = shlex.split(mutant.tests)[0]
    assert file.startswith("test_") and (ROOT / "tests" / file).is_file()


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("source", ["", "a a"])
def test_a_stale_entry_is_an_error(source):
    with pytest.raises(ValueError, match="not once"):
        mutated(source, Mutant("m", "f.py", "a", "b", "test_x.py"))
