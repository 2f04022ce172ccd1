"""Contract: docs/configuration.md is what the settings in the code say now, and it tells every key of every job.

Not checked here: that the docstrings are true.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.configuration_page import PAGE, is_current, job_entries, main, may_change, page
from launch.run_directory import MAY_CHANGE
from launch.setting_names import keys
from trainer.jobs import JOBS


def test_the_page_is_current() -> None:
    assert is_current(PAGE), "run `python -m launch.configuration_page` and commit docs/configuration.md"


def test_every_key_of_every_job_has_one_row() -> None:
    lines = page().splitlines()
    for job, model in JOBS.items():
        for key in keys(model):
            if key.name == "job":
                continue
            rows = [line for line in lines if line.startswith(f"| `{key.name}` |")]
            assert len(rows) == 1, key.name
            assert job in rows[0]


def test_rows_are_tables_of_equal_width() -> None:
    for line in page().splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") in (3, 5, 7), line


def test_defaults_that_differ_between_jobs_are_told_for_each() -> None:
    assert job_entries()["limits.max_epochs"].defaults["ranker"] != job_entries()["limits.max_epochs"].defaults["sft"]
    [row] = [line for line in page().splitlines() if line.startswith("| `limits.max_epochs` |")]
    assert "(sft, rl, laac)" in row
    assert "(ranker)" in row


def test_what_may_change_names_keys_that_exist() -> None:
    names = list(job_entries())
    for key in MAY_CHANGE:
        assert any(name == key or name.startswith(key + ".") for name in names), key
    assert may_change("learner.ranks")
    assert not may_change("learner.lr")


def test_check_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "configuration.md"
    assert main(["--page", str(target)]) == 0
    assert main(["--check", "--page", str(target)]) == 0
    target.write_text(target.read_text() + "edited\n")
    assert main(["--check", "--page", str(target)]) == 1
    assert "not current" in capsys.readouterr().err
