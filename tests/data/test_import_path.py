"""Contract: an object is found by its path; whatever prevents that is one `RequestError` with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import RequestError
from data.import_path import load_by_path


def test_objects_are_found_by_their_path() -> None:
    assert load_by_path("pathlib:Path", "ranker", "a class") is Path
    assert load_by_path("os.path:join", "ranker", "a function")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("", "has no attribute 'f'"),
    ],
)
def test_modules_that_cannot_be_imported_are_refused_with_their_reason(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"module_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RequestError) as error:
        load_by_path(f"{module}:f", "objective.stages", "package.module:function")
    assert error.value.where == "objective.stages"
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", ":", "os", "os:", ":f", "..x:f", "a b:c", "nowhere:f"])
def test_other_forms_are_refused(path: str) -> None:
    with pytest.raises(RequestError, match="legal: package"):
        load_by_path(path, "ranker", "package.module:Class")
