"""Contract: correlate tells, by K, the rank correlation of AUC and WPAUC with recall over a run's scored evaluations,
and refuses runs and cut-offs that have none.

Not checked here: the correlations themselves (tests/reward/test_checkpoint_correlation.py); the scores of a real run
(tests/launch/test_whole_job.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from data.errors import RequestError
from launch.correlate import correlate_command
from launch.provenance import ROOT
from trainer.row_scores import RowScores, write_row_scores
from trainer.run_settings import NegativeSource


def write(run: Path, ranks: list[list[int]], recall: list[dict[int, float]]) -> None:
    """Evaluations in which the target of row i has `ranks[...][i]` of five negatives above it."""
    for step, (above, values) in enumerate(zip(ranks, recall, strict=True)):
        negatives = np.tile(np.arange(5.0), (len(above), 1))
        score_NM = np.concatenate([4.5 - np.array(above)[:, None], negatives], axis=1).astype(np.float32)
        number_N = np.arange(len(above))
        scores = RowScores(sample_id_N=number_N, user_id_N=number_N.astype(np.int32), score_NM=score_NM, unreachable=0)
        write_row_scores(run, f"step-{step:06d}", scores, values, source=NegativeSource.BEAM)


def test_answers_by_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Recall@1 rises; recall@5 does not change; AUC falls from the second to the third.
    write(tmp_path, [[4, 1], [1, 1], [0, 5]], [{1: 0.0, 5: 0.5}, {1: 0.1, 5: 0.5}, {1: 0.5, 5: 0.5, 9: 1.0}])
    answer = correlate_command(tmp_path)
    schema = json.loads((ROOT / "docs" / "schemas" / "correlate.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert list(answer["k"]) == ["1", "5"]
    assert answer["k"]["1"]["auc"]["values"] == pytest.approx([0.5, 0.8, 0.5])
    assert answer["k"]["1"]["wpauc@1"]["values"] == [0.0, 0.0, 0.5]
    assert answer["k"]["1"]["auc"]["spearman"] == pytest.approx(0.0, abs=1e-9)
    assert answer["k"]["1"]["wpauc@1"]["spearman"] == pytest.approx(np.sqrt(3) / 2)
    assert answer["k"]["5"]["auc"]["kendall"] is None
    printed = capsys.readouterr().out
    assert "3 checkpoints, 2 rows against 5 negatives (beam)" in printed
    assert "+0.866" in printed
    assert list(correlate_command(tmp_path, k=(5,))["k"]) == ["5"]


def test_what_has_no_correlation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"evaluation\.scores\.rows above 0"):
        correlate_command(tmp_path)
    write(tmp_path, [[1], [2]], [{1: 0.0, 9: 1.0}] * 2)
    with pytest.raises(RequestError, match="at least 3"):
        correlate_command(tmp_path)
    for k in (3, 9):
        with pytest.raises(RequestError, match=f"--k: {k}; legal: 1$"):
            correlate_command(tmp_path, k=(k,))
