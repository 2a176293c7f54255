"""The list of deliberate bugs is not stale, and a sample of them is really caught (slow)."""

import shlex

import pytest
from mutants import MUTANTS, ROOT, Mutant, main, mutated

SAMPLE = list({mutant.file: mutant for mutant in MUTANTS}.values())  # one of every file


def test_every_bug_can_be_applied():
    for mutant in MUTANTS:
        wrong = mutated((ROOT / mutant.file).read_text(encoding="utf-8"), mutant)
        if mutant.file.endswith(".py"):
            compile(wrong, mutant.file, "exec")
        file = shlex.split(mutant.tests)[0]
        assert file.startswith("test_") and (ROOT / "tests" / file).is_file(), mutant.name
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("source", ["", "a a"])
def test_a_stale_entry_is_an_error(source):
    with pytest.raises(ValueError, match="not once"):
        mutated(source, Mutant("m", "f.py", "a", "b", "test_x.py"))


@pytest.mark.slow
def test_a_sample_of_the_bugs_is_caught():
    assert main([mutant.name for mutant in SAMPLE]) == 0
