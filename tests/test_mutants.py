"""`make mutants`: every mutation still fits the source, and the tool tells killed, survived and broken ones apart.

Does not run the mutations of the stages, which takes minutes: `make mutants` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutation, MutationError, Outcome, chosen, mutated, outcome, read_mutations

STAGES = ("advantage", "aggregation", "losses", "several_rewards", "anchor", "window", "gate", "gate_scores")
STAGES += ("tempering", "truncation", "objective")


def test_every_mutation_fits_the_source_exactly_once() -> None:
    mutations = read_mutations()
    assert len(mutations) >= 20
    assert len({mutation.name for mutation in mutations}) == len(mutations)
    for mutation in mutations:
        text = (ROOT / mutation.file).read_text()
        assert mutated(text, mutation) != text
        compile(mutated(text, mutation), mutation.file, "exec")
        assert all((ROOT / file).is_file() for file in mutation.tests)
    assert {f"trainer/{stage}.py" for stage in STAGES} <= {mutation.file for mutation in mutations}


def test_old_text_that_is_gone_or_not_alone_is_refused() -> None:
    mutation = Mutation("shift", "part.py", "+ 1", "- 1", ())
    for text, count in (("x", 0), ("a + 1 + 1", 2)):
        with pytest.raises(MutationError, match=rf"shift: its old text occurs {count} times in part\.py"):
            mutated(text, mutation)
    with pytest.raises(MutationError, match="no mutation is called nothing"):
        chosen(["nothing"])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("x + 1", "x - 1", Outcome.KILLED),
        ("unseen = 1", "unseen = 2", Outcome.SURVIVED),
        ("def grown", "def other", Outcome.BROKEN),
    ],
)
def test_outcomes(tmp_path: Path, old: str, new: str, expected: Outcome) -> None:
    source = "unseen = 1\n\n\ndef grown(x):\n    return x + 1\n"
    (tmp_path / "part.py").write_text(source)
    (tmp_path / "test_part.py").write_text("from part import grown\n\n\ndef test_it():\n    assert grown(1) == 2\n")
    assert outcome(tmp_path, Mutation("one", "part.py", old, new, ("test_part.py",))) is expected
    assert (tmp_path / "part.py").read_text() == source
