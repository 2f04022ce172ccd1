"""Contract: report is one self-contained HTML file with every plot the run has data for; compare pairs the same rows;
results are measured once, resumed, and rendered into the docs; answers match their JSON schemas.

Not checked here: how the page looks (it was looked at in a browser when it was made).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.errors import RequestError
from launch.compare import compare, rows_file, table
from launch.provenance import ROOT
from launch.report import render, write_report
from launch.results import PAGE, markdown, measure, read_table, results_command
from trainer.row_metrics import RowMetrics, read_row_metrics, write_row_metrics

SCHEMAS = ROOT / "docs" / "schemas"


def validate(answer: object, name: str) -> None:
    """Check an answer against docs/schemas/NAME.schema.json."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)


def test_the_schemas_are_schemas() -> None:
    for path in SCHEMAS.glob("*.schema.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


def test_the_answer_of_eval_in_the_design_is_valid() -> None:
    answer: dict[str, Any] = {
        "metrics": {"hr@10": 0.2, "ndcg@10": 0.1},
        "n": 2000,
        "exclude_seen": True,
        "invalid": {"constrained": 0, "unconstrained": 0.1},
        "ci95": {"hr@10": [0.1, 0.3]},
    }
    validate(answer, "eval")
    with pytest.raises(jsonschema.ValidationError):
        validate({**answer, "metrics": {"HR@10": 0.2}}, "eval")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("figcaption", "h2") and data.strip():
            self.captions.append(data.strip())


def test_report_has_every_part_and_needs_no_network(finished_run: Path) -> None:
    validate(json.loads((finished_run / "summary.json").read_text()), "summary")
    target = finished_run / "out" / "report.html"
    write_report(finished_run, target)
    page = _Page()
    page.feed(target.read_text())
    assert page.addresses == []
    for part in ("Stages", "Paired differences", "HR by K", "NDCG by K", "Reward", "Loss", "NDCG while training"):
        assert part in page.captions
    for part in ("Policy gap: engine against learner", "Legal mass", "Time per phase", "Configuration"):
        assert part in page.captions
    assert target.read_text().count("<svg") == 11
    assert '<td class="best">0.1200<small>0.1080 – 0.1320</small></td>' in target.read_text()
    assert "[-0.0010, +0.0050]" in target.read_text()


def test_report_draws_the_strata_of_a_run(finished_run: Path) -> None:
    strata = [
        {"difficulty": bin_, "policy_rank_low": low, "policy_rank_high": high, "discriminable": tells}
        | {"correction": 1.5, "oracle_correction": 2.0, "gain": None if bin_ else 0.01, "gain_ci95": [0.0, 0.02]}
        for bin_, (low, high) in enumerate([(1, 4), (9, 9)])
        for tells in (False, True)
    ]
    (finished_run / "strata.json").write_text(json.dumps({"metric": "ndcg@10", "strata": strata}))
    text = render(finished_run)
    assert text.count("<svg") == 13
    for words in ("Rank correction of the reward by difficulty", "NDCG@10 gained by difficulty", "1–4"):
        assert words in text
    (finished_run / "strata.json").write_text(json.dumps({"strata": [{"difficulty": 0}]}))
    with pytest.raises(RequestError, match=r"strata\.json: strata"):
        render(finished_run)


def test_report_of_half_a_run(finished_run: Path) -> None:
    (finished_run / "summary.json").unlink()
    text = render(finished_run)
    assert "Loss" in text
    assert "Stages" not in text
    (finished_run / "metrics.jsonl").unlink()
    with pytest.raises(RequestError, match=r"neither metrics.jsonl nor summary.json"):
        render(finished_run)


def test_report_escapes_what_it_shows(finished_run: Path) -> None:
    (finished_run / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    assert "<script>" not in render(finished_run)


def rows(values: Sequence[float], name: str = "a", shift: int = 0, dataset: str = "f") -> RowMetrics:
    """Row metrics of one evaluation, two rows per user."""
    n = len(values)
    sample_id_N = np.arange(shift, n + shift, dtype=np.int64)
    return RowMetrics(
        name=name,
        split="test",
        dataset=dataset,
        sample_id_N=sample_id_N,
        user_id_N=(sample_id_N // 2).astype(np.int32),
        value_N={"ndcg@10": np.asarray(values, np.float32)},
    )


def test_row_metrics_read_back_in_order_of_samples(tmp_path: Path) -> None:
    shuffled = rows([1, 2, 3])
    object.__setattr__(shuffled, "sample_id_N", np.asarray([9, 4, 7]))
    back = read_row_metrics(write_row_metrics(tmp_path, shuffled))
    assert back.sample_id_N.tolist() == [4, 7, 9]
    assert back.value_N["ndcg@10"].tolist() == [2, 3, 1]
    (tmp_path / "rows" / "bad.parquet").write_text("rubbish")
    with pytest.raises(RequestError, match=r"bad\.parquet"):
        read_row_metrics(tmp_path / "rows" / "bad.parquet")


def test_compare_pairs_rows() -> None:
    noise = np.random.default_rng(0).random(400)
    answer = compare(rows(noise), rows(noise + 0.01), resamples=500)
    validate(answer, "compare")
    difference = answer["differences"]["ndcg@10"]
    # The same constant on every row: pairing leaves no spread although the rows vary a lot.
    assert difference["low"] == pytest.approx(0.01, abs=1e-6)
    assert difference["high"] == pytest.approx(0.01, abs=1e-6)
    assert answer["users"] == 200
    assert "+0.0100" in table(answer, "a", "b")


def test_compare_resamples_users_not_rows() -> None:
    per_user = np.repeat(np.random.default_rng(1).normal(size=100), 2)
    difference = compare(rows(np.zeros(200)), rows(per_user))["differences"]["ndcg@10"]
    # Both rows of a user are equal, so there are 100 independent values, not 200.
    expected = 2 * 1.96 * per_user.std() / np.sqrt(100)
    assert difference["high"] - difference["low"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (rows([1.0, 2.0], shift=1), "2 and 2 rows, 1 of them the same"),
        (rows([1.0, 2.0], dataset="g"), "compare: dataset: f and g"),
    ],
)
def test_other_rows_are_refused(other: RowMetrics, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        compare(rows([1.0, 2.0]), other)
    with pytest.raises(RequestError, match="--metrics: hr@1; legal: ndcg@10"):
        compare(rows([1.0]), rows([1.0]), ("hr@1",))


def test_rows_are_found_by_run_and_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no evaluated rows"):
        rows_file(str(tmp_path))
    path = write_row_metrics(tmp_path, rows([1.0], name="sft"))
    assert rows_file(str(tmp_path)) == path
    write_row_metrics(tmp_path, rows([1.0], name="rl"))
    assert rows_file(f"{tmp_path}:sft") == path
    with pytest.raises(RequestError, match=f"several evaluations; legal: {tmp_path}:rl, {tmp_path}:sft"):
        rows_file(str(tmp_path))


TABLE: dict[str, Any] = {
    "format": 1,
    "title": "A table",
    "columns": {"NDCG@10": "metrics.ndcg@10", "rows": "n"},
    "rows": [
        {"name": "published", "result": {"metrics": {"ndcg@10": 0.0962}}},
        {"name": "first", "command": ["eval", "a"], "result": None},
        {"name": "second", "command": ["eval", "b"], "result": None},
    ],
}


def test_results_resume_and_keep_to_their_time(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE))
    asked: list[Sequence[str]] = []
    clock = iter(range(100))

    def run(command: Sequence[str]) -> Mapping[str, Any]:
        asked.append(command)
        return {"metrics": {"ndcg@10": 0.1}, "n": len(asked)}

    measure(path, run, deadline=1, now=lambda: next(clock))
    assert asked == [["eval", "a"]]
    measure(path, run, deadline=100, now=lambda: next(clock))
    assert asked == [["eval", "a"], ["eval", "b"]]
    measure(path, run, deadline=100, now=lambda: next(clock))
    assert len(asked) == 2
    validate(json.loads(path.read_text()), "results-table")
    assert markdown(read_table(path)).splitlines()[-3:] == [
        "| published | 0.0962 | – |",
        "| first | 0.1000 | 1 |",
        "| second | 0.1000 | 2 |",
    ]


def test_rows_of_one_command_share_a_run_and_keep_their_part(tmp_path: Path) -> None:
    path = tmp_path / "shared.json"
    rows = [{"name": n, "before": [["train", "x"]], "command": ["demo"], "part": f"stages.{n}"} for n in ("a", "b")]
    path.write_text(json.dumps({"format": 1, "columns": {"HR": "hr"}, "rows": rows}))
    ran: list[list[str]] = []

    def run(command: Sequence[str]) -> dict[str, Any]:
        ran.append(list(command))
        return {"stages": {"a": {"hr": 0.1}, "b": {"hr": 0.2}}}

    measure(path, run, deadline=math.inf)
    assert ran == [["train", "x"], ["demo"]]
    assert [row["result"] for row in read_table(path)["rows"]] == [{"hr": 0.1}, {"hr": 0.2}]
    content = json.loads(path.read_text())
    content["rows"].append({"name": "c", "command": ["demo"], "part": "stages.c"})
    path.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="part of c"):
        measure(path, run, deadline=math.inf)


def test_results_are_written_between_their_markers(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "t.json").write_text(json.dumps(TABLE))
    (tmp_path / "results.md").write_text("before\n<!-- results:t -->\nold\n<!-- /results:t -->\nafter\n")
    answer = results_command(("t",), only_render=True, docs=tmp_path)
    validate(answer, "results")
    assert answer["tables"]["t"]["missing"] == ["first", "second"]
    text = (tmp_path / "results.md").read_text()
    assert re.fullmatch(r"before\n<!-- results:t -->\n\*\*A table.*\n<!-- /results:t -->\nafter\n", text, re.DOTALL)
    assert "old" not in text
    assert "0.0962" in text
    results_command(("t",), only_render=True, docs=tmp_path)
    assert (tmp_path / "results.md").read_text() == text
    with pytest.raises(RequestError, match="results: u; legal: t"):
        results_command(("u",), docs=tmp_path)
    (tmp_path / "results.md").write_text("no place")
    with pytest.raises(RequestError, match="no place for the table t"):
        results_command(("t",), only_render=True, docs=tmp_path)


def test_the_tables_of_the_docs_are_what_their_files_say() -> None:
    """The pages are regenerated, not edited: rendering again changes nothing."""
    docs = ROOT / "docs"
    for path in sorted((docs / "results").glob("*.json")):
        validate(json.loads(path.read_text()), "results-table")
        table = read_table(path)
        page = (docs / table.get("page", PAGE)).read_text()
        assert markdown(table) in page, f"run `windlass results {path.stem} --only-render`"
