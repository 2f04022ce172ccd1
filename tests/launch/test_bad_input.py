"""Contract: whatever is wrong with a request is exit code 2 (1 where a disk fails) and one line that names the field or
file, what was found and what is legal. No traceback.

Whole command lines, run in this process up to the first Ray actor (which stands in as a line of its own). With real
processes: test_failing_runs.py and test_kill.py. Files of imports: tests/data/test_damaged_files.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import launch.eval_command
import launch.train_command
from data.catalogue import Catalogue
from data.codes import Codes, codes_path
from data.dataset import Dataset
from data.errors import RunError
from launch import cli
from rollout.fleet import RolloutFleet
from tests.data.tiny import import_events
from tests.small_world import ITEMS, write_jobs, write_recipe
from trainer.checkpoints import MANIFEST, CheckpointStore, Facts
from trainer.initial_model import write_preset
from trainer.learner_group import LearnerGroup
from trainer.preflight import Node
from trainer.prompt_card import PromptCard
from trainer.run_settings import CheckpointSettings
from trainer.run_state import RunState

REACHED = "everything was accepted"
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, recipes, and a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("bad_input")
    dataset = write_jobs(folder)
    write_checkpoint(folder / "run", dataset)
    return folder


def write_checkpoint(run: Path, dataset: Dataset) -> Path:
    """A checkpoint as a job leaves it, but for the learners' state."""
    catalogue = Catalogue.build(dataset, "default")
    store = CheckpointStore(run / "checkpoints", CheckpointSettings())
    facts = Facts(catalogue_digest=catalogue.digest, vocabulary_size=catalogue.vocabulary.size)
    with store.writing(1, facts, metric="ndcg@10", score=0.1) as folder:
        write_preset("mini", catalogue, seed=0, dtype=torch.float32, target=folder / "hf")
        PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(folder / "hf")
        RunState(step=1).save(folder)
    return store.path(1)


@pytest.fixture
def call(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in `world`, without Ray: (exit code, the last line on standard error)."""

    def accepted(*_: Any, **__: Any) -> None:
        raise RunError(REACHED)

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("trainer.preflight.alive_nodes", lambda: [Node(address="here", cpus=8.0, gpus=0.0)])
    monkeypatch.setattr(launch.train_command, "cluster", nothing)
    monkeypatch.setattr(launch.eval_command, "cluster", nothing)
    monkeypatch.setattr(LearnerGroup, "start", accepted)
    monkeypatch.setattr(RolloutFleet, "start", accepted)
    monkeypatch.chdir(world)

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("windlass: ")]
        assert len(lines) == (code != 0), lines
        return code, "".join(lines)

    return run


def refused(answer: tuple[int, str], words: str) -> None:
    """The request was wrong, in these words."""
    code, line = answer
    assert words in line
    assert code == 2
    assert "; legal: " in line


# -- requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rollout.width", ITEMS + 1], f"rollout.width: {ITEMS + 1}; legal: 2 to {ITEMS}, the items"),
        (["--evaluation.k", "[1, 49]", "--evaluation.metric", "hr@1"], "evaluation.k: [1, 49]; legal: at most 48"),
        (["--evaluation.metric", "fairness@10"], "which is not measured; legal with this k: hr@1"),
        (["--evaluation.metric", "ndcg"], "which is not measured; legal with this k: ndcg@1"),
        (["--batch_prompts", "4096"], "batch_prompts: 4096; legal: at most 624, of 624 training rows"),
        (["--data.max_prompt_tokens", "2"], "data.max_prompt_tokens: 2; legal: at least 3"),
        (["--rollout.max_model_len", "17"], "rollout.max_model_len: 17; legal: at least 18"),
        (["--learner.row_tokens", "32", "--data.max_prompt_tokens", "31"], "learner.row_tokens: 32; legal: at least"),
        (["--learner.token_budget", "16"], "token_budget: 16 is below row_tokens 64; legal: 64 or more"),
        (["--learner.lr", "1e400"], "learner.lr: Infinity; legal: number above 0"),
        (["--evaluation.k", "[a]"], 'evaluation.k.0: "a"; legal: list of integer'),
        (["--data.codes", "none"], "data.codes: none; legal: default"),
        (["--data.dataset", "rl.yaml"], "legal: a folder written by `windlass data import`"),
        (["--data.dataset", "x" * 5000], "File name too long; legal: a path that can be read"),
        (["--init", "rl.yaml"], "rl.yaml; legal: mini, tiny, small, or an hf folder"),
        (["--init_embeddings", "codes"], "default.codebooks.safetensors: no such file"),
        (["--reward.ranker", "nothing"], "ranker: nothing; legal: an artefact folder"),
        (["--reward.ranker", "no_module:Class"], "No module named"),
        (["--reward.ranker", "run"], "no ranker.json in it"),
        (["--reward.ranker", "launch.cli:Command"], "a class with score(histories, candidates)"),
        (["--reward.ranker", "tests.reward.rankers:Nothing", "--reward.host", "0.0.0.0"], "reward.host: 0.0.0.0"),
        (["--learner.ranks", "6", "--rollout.engines", "3"], "cluster.num_cpus: 8 logical CPUs; legal: at least 9"),
        (["--rollout.tensor_parallel", "3"], "tensor_parallel: 3; legal: a divisor of the model's 4 attention heads"),
        (["--cluster.colocated", "true", "--learner.ranks", "2"], "rollout.engines: 1; legal: 2 like learner.ranks"),
        (["--train_only", "run"], "holds no step-*.parquet; legal: a folder that --rollout-only wrote"),
        (["--rollout_only", "rl.yaml"], "legal: a folder, made when it is missing"),
        (["--run-dir", "rl.yaml"], "rl.yaml: File exists; legal: a folder that can be written"),
    ],
)
def test_wrong_requests(call: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    refused(call("train", "rl.yaml", "--run-dir", tmp_path / "run", *arguments), words)


def test_a_port_that_is_taken(call: Run, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["--reward.ranker", "tests.reward.rankers:PlainRanker", "--reward.port", port]
        answer = call("train", "rl.yaml", "--run-dir", tmp_path / "run", *arguments)
    refused(answer, f"reward.port: 127.0.0.1:{port} (Address already in use); legal: a free port, or 0")


def test_the_recipe_they_are_changes_of_is_accepted(call: Run, tmp_path: Path) -> None:
    for name in ("rl.yaml", "sft.yaml"):
        assert call("train", name, "--run-dir", tmp_path / name) == (1, f"windlass: {REACHED}")


def test_windows_that_do_not_fit_a_row_are_refused_before_the_first_step(call: Run, tmp_path: Path) -> None:
    answer = call(
        "train",
        "sft.yaml",
        "--run-dir",
        tmp_path / "r",
        "--learner.row_tokens",
        16,
        "--data.history",
        8,
        "--data.max_prompt_tokens",
        13,
    )
    refused(answer, "learner.row_tokens: 16; legal: at least 32 (windows of data.history 8 + 1 items of 2 tokens)")
    assert "or data.history of at most 7" in answer[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 3000, "nested too deeply"),
        ("? [a]\n: 1\njob: rl", "a key that is no plain word"),
        ("job: sft\nlearner: &a {lr: *a}\n", "a section that holds itself"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_hostile_recipes(call: Run, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    refused(call("train", tmp_path / "r.yaml"), words)


def test_a_recipe_name_longer_than_any_file_name(call: Run) -> None:
    refused(call("train", "x" * 5000), "a path that can be read")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "tset"], "eval: split: 'tset'"),
        (["--k", "0"], "eval: k.0: 0"),
        (["--k", "49"], "k: [49]; legal: at most 48"),
        (["--rollout.temperature", "nan"], "--rollout.temperature nan: Input should be a finite number"),
        (["--rollout.engine", "fast"], "Expected one of ('vllm', 'reference')"),
        (["--json", "rl.yaml/answer.json"], "--json: rl.yaml/answer.json; legal: a writable file"),
        (["--published", "none.csv"], "--published: none.csv: No such file"),
    ],
)
def test_wrong_evaluations(call: Run, arguments: list[str], words: str) -> None:
    refused(call("eval", "run", "--data", "source/dataset", *arguments), words)
    assert call("eval", "run", "--data", "source/dataset", "--k", 1, 5) == (1, f"windlass: {REACHED}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no column dataset"),
        (b"dataset,method,metric,value\nevents,m,hr@1,nan\n", "m hr@1: nan; legal: a finite number"),
        (b"dataset,method,metric,value\nevents,m,hr@1\n", "m hr@1: None; legal: a number"),
        (b"method,metric,dataset,value\nm\n", "nothing about the dataset events"),
        (b"\xff\xfe", "a CSV file in UTF-8"),
        (b"dataset,method,metric,value\n" + b"x" * 200_000, "field larger than field limit"),
    ],
)
def test_published_files(call: Run, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    refused(call("eval", "run", "--data", "source/dataset", "--published", tmp_path / "p.csv"), words)


def test_required_options_are_named(call: Run) -> None:
    refused(call("data", "inspect"), "--dataset PATH")


# -- damaged and foreign files

FILES = ("dataset.json", "items.parquet", "interactions/part-00000.parquet", "codes/default.parquet")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "random", "folder"])
def test_damaged_datasets(call: Run, world: Path, tmp_path: Path, name: str, how: str) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(world / "source" / "dataset", copy)
    file = copy / name
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "missing":
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "random": bytes(range(256))}[how])
    answer = call("train", "sft.yaml", "--run-dir", tmp_path / "run", "--data.dataset", copy)
    refused(answer, str(copy) if name != FILES[-1] or how not in ("missing", "folder") else "data.codes: default")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": {}}, "counts.items: None"),
        ({"counts": {"items": "x", "users": 1}}, "counts.items: 'x'"),
        ({"counts": {"items": -1, "users": 1}}, "counts.items: -1"),
        ({"split": {"kind": "chronological"}}, "boundaries [None, None]"),
        ({"split": 3}, "split None"),
        ({"format": 2}, "format 2"),
        ({"digests": 3}, "content digest"),
    ],
)
def test_dataset_cards_that_lie(call: Run, world: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(world / "source" / "dataset", copy)
    card = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(card | change))
    refused(call("train", "sft.yaml", "--run-dir", tmp_path / "run", "--data.dataset", copy), words)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: (c / MANIFEST).unlink(), f"no {MANIFEST}"),
        (lambda c: (c / MANIFEST).write_text(""), "is damaged: not JSON"),
        (lambda c: _flip(c / "hf" / "model.safetensors"), "model.safetensors: wrong digest"),
        (lambda c: (c / "hf" / "model.safetensors").write_bytes(b"xx"), "model.safetensors: 2 bytes; legal:"),
        (lambda c: (c / "hf" / "model.safetensors").unlink(), "model.safetensors: is missing"),
    ],
)
def test_damaged_checkpoints(call: Run, world: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    """Refused by evaluation, as a start of another run, and when the run itself is continued; nothing is removed."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    checkpoint = run / "checkpoints" / "step-000001"
    damage(checkpoint)
    left = sorted(checkpoint.rglob("*"))
    for path in (run, checkpoint, checkpoint / "hf"):
        refused(call("eval", path, "--data", "source/dataset", "--k", 1), words)
        refused(call("train", "rl.yaml", "--run-dir", tmp_path / "other", "--init", path), words)
    refused(call("train", "rl.yaml", "--run-dir", run), words)
    assert sorted(checkpoint.rglob("*")) == left


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda h: (h / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda h: (h / "config.json").write_text("[]"), "config.json: holds list"),
        (lambda h: (h / "model.safetensors").unlink(), "no weights in it"),
        (lambda h: (h / "model.safetensors").write_bytes(b"xx"), "model.safetensors: is damaged"),
        (lambda h: shutil.rmtree(h / "catalogue"), "catalogue: no such folder"),
        (lambda h: (h / "catalogue" / "items.parquet").write_bytes(b"PAR1"), "items.parquet: not readable as Parquet"),
    ],
)
def test_damaged_model_folders(
    call: Run, world: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    """A copied hf folder has no manifest to be held against; what is in it is looked at."""
    folder = tmp_path / "model"
    shutil.copytree(world / "run" / "checkpoints" / "step-000001" / "hf", folder)
    assert call("eval", folder, "--data", "source/dataset", "--k", 1) == (1, f"windlass: {REACHED}")
    damage(folder)
    refused(call("eval", folder, "--data", "source/dataset", "--k", 1), words)
    refused(call("train", "rl.yaml", "--run-dir", tmp_path / "run", "--init", folder), words)


@pytest.mark.parametrize(
    ("levels", "init_words", "continue_words"),
    [(8, "catalogue: digest", "belongs to the catalogue"), (5, "vocab_size: 18; legal: 19", "vocabulary of 18 tokens")],
    ids=["foreign catalogue", "another vocabulary"],
)
def test_foreign_checkpoints(
    call: Run, world: Path, tmp_path: Path, levels: int, init_words: str, continue_words: str
) -> None:
    events = [(user, f"foreign-{(7 * user + t) % ITEMS:02d}", 1000 * user + t) for user in range(60) for t in range(14)]
    other = import_events(tmp_path / "foreign", events)
    paths = [[item // levels, item % levels] for item in range(other.n_items)]
    Codes.from_lists(paths).save(codes_path(other.path, "default"))
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    data = ["--data.dataset", other.path]
    refused(call("train", "rl.yaml", "--run-dir", tmp_path / "new", "--init", run, *data), init_words)
    refused(call("train", "rl.yaml", "--run-dir", run, *data), continue_words)
    refused(call("eval", run, "--data", other.path, "--k", 1), "catalogue: 48 items, others than")


def test_a_ranker_of_other_data_is_refused(call: Run, world: Path, tmp_path: Path) -> None:
    job = {
        "job": "ranker",
        "data": {"dataset": "source/dataset", "history": 6},
        "ranker": {"kind": "popularity"},
        "evaluation": {"rows": 16, "k": [1, 5, 10]},
    }
    write_recipe(tmp_path / "ranker.yaml", job)
    assert call("train", tmp_path / "ranker.yaml", "--run-dir", tmp_path / "ranker") == (0, "")
    arguments = ["--reward.ranker", tmp_path / "ranker" / "ranker"]
    assert call("train", "rl.yaml", "--run-dir", tmp_path / "a", *arguments) == (1, f"windlass: {REACHED}")
    other = import_events(
        tmp_path / "other", [(u, f"item-{(u + t) % ITEMS:02d}", 9 * t + u) for u in range(60) for t in range(14)]
    )
    shutil.copytree(world / "source" / "dataset" / "codes", other.path / "codes")
    answer = call("train", "rl.yaml", "--run-dir", tmp_path / "b", "--data.dataset", other.path, *arguments)
    refused(answer, "reward.ranker: ")
    assert "was trained on the dataset" in answer[1]
    description = tmp_path / "ranker" / "ranker" / "ranker.json"
    description.write_text(description.read_text().replace('"digest": "', '"digest": "0'))
    refused(call("train", "rl.yaml", "--run-dir", tmp_path / "c", *arguments), "weights.safetensors: digest")


# -- run folders


def test_damaged_run_folders(call: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", "rl.yaml", "--run-dir", run)[0] == 1
    (run / "environment.json").write_text("{")
    refused(call("train", "rl.yaml", "--run-dir", run), "environment.json: is not JSON")
    (run / "environment.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    (run / "config.yaml").write_bytes(b"\xff")
    refused(call("train", "rl.yaml", "--run-dir", run), "config.yaml: byte 0 is not UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", b'{"stages": [1]}', "summary.json: stages"),
        ("summary.json", b'{"comparisons": {"a": 3}}', "summary.json: comparisons"),
        ("environment.json", b"[3]", "environment.json: 3"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl:1: is not JSON"),
    ],
)
def test_reports_of_damaged_runs(call: Run, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / name).write_bytes(content)
    refused(call("report", tmp_path), words)


def test_reports_that_cannot_be_written_leave_nothing(call: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    before = sorted(tmp_path.iterdir())
    for target in (tmp_path, tmp_path / "metrics.jsonl" / "x"):
        refused(call("report", tmp_path, "--output", target), "--output: ")
    assert sorted(tmp_path.iterdir()) == before


def test_comparisons_of_damaged_rows(call: Run, tmp_path: Path) -> None:
    metadata = {"format": "1", "name": "a", "split": "test", "dataset": "d"}
    rows = {"sample_id": [0, 1], "user_id": [0, 1], "hr@1": [0.0, 1.0]}
    sound = tmp_path / "sound.parquet"
    pq.write_table(pa.table(rows).replace_schema_metadata(metadata), sound)
    assert call("compare", sound, sound, "--resamples", 10) == (0, "")
    refused(call("compare", sound, sound, "--resamples", 0), "--resamples: 0; legal: 1 or more")
    refused(call("compare", sound, sound, "--seed", -1), "--seed: -1; legal: 0 or more")
    refused(call("compare", sound, tmp_path / "none.parquet"), "none.parquet: no such file")
    bad = tmp_path / "bad.parquet"
    for changed, kept, words in (
        (rows | {"hr@1": ["x", "y"]}, metadata, "hr@1 is absent or no number"),
        (rows, {"format": "1"}, "name is absent"),
        (rows | {"sample_id": [0, 0]}, metadata, "a sample_id twice"),
    ):
        pq.write_table(pa.table(changed).replace_schema_metadata(kept), bad)
        refused(call("compare", sound, bad), words)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2)],
)
def test_what_the_system_refuses_is_one_line(
    call: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    monkeypatch.setattr(launch.train_command, "train", refuse)
    answer = call("train", "rl.yaml", "--run-dir", tmp_path / "run")
    assert answer[0] == code
    assert f"{tmp_path / 'file'}: {os.strerror(number)}" in answer[1]


@pytest.mark.parametrize("arguments", [("demo", "--run-dir", "rl.yaml"), ("smoke", "--run-dir", "rl.yaml/x")])
def test_a_file_where_a_folder_is_wanted(call: Run, arguments: tuple[str, ...]) -> None:
    refused(call(*arguments), "a path that can be read and written")


def test_a_system_error_that_may_be_ours_keeps_its_traceback(
    call: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr(launch.train_command, "train", refuse)
    with pytest.raises(FileNotFoundError):
        call("train", "rl.yaml", "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "http://x y", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    arguments = ["train", str(world / "sft.yaml"), "--run-dir", str(tmp_path / "run"), "--cluster.address", address]
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert "cluster.address: " in error
    assert error.count("\n") == 1
