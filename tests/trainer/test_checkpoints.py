"""Contract: a checkpoint is visible only whole, survives SIGKILL at each point of its writing, is kept by the retention
rule, needs room on the disk, and is verified when it is read.

Not checked here: what learners put into it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from data.errors import RequestError, RunError
from trainer.checkpoints import (
    MANIFEST,
    CheckpointStore,
    Facts,
    check_own,
    checkpoint_steps,
    model_folder,
    open_checkpoint,
    open_model,
    read_manifest,
)
from trainer.run_settings import CheckpointSettings

FACTS = Facts(catalogue_digest="abc", vocabulary_size=100)


def write(store: CheckpointStore, step: int, score: float | None = None, text: str = "weights") -> None:
    """A checkpoint with two files."""
    with store.writing(step, FACTS, metric="ndcg@10", score=score) as folder:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")
        (folder / "hf" / "model.safetensors").write_text(text)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store that keeps two, the best one, and multiples of 4."""
    return CheckpointStore(tmp_path / "checkpoints", CheckpointSettings(interval=1, last=2, best=1, every=4))


def test_a_checkpoint_reads_back(store: CheckpointStore) -> None:
    write(store, 3, 0.5)
    manifest = open_checkpoint(store.path(3), FACTS)
    assert (manifest.step, manifest.score, manifest.metric) == (3, 0.5, "ndcg@10")
    assert sorted(manifest.files) == ["hf/config.json", "hf/model.safetensors"]


def test_retention_keeps_last_best_and_every(store: CheckpointStore) -> None:
    for step, score in enumerate([0.1, 0.9, 0.2, None, 0.3, 0.9, 0.1, 0.2]):
        write(store, step, score)
    # 0 and 4 by `every`, 1 as the best (the earlier of two equals), 6 and 7 as the last.
    assert checkpoint_steps(store.root) == [0, 1, 4, 6, 7]
    assert store.best() == store.path(1)
    assert store.latest() == store.path(7)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_retention_against_a_plain_oracle(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float | None], last: int, best: int, every: int
) -> None:
    root = tmp_path_factory.mktemp("retention")
    store = CheckpointStore(root, CheckpointSettings(interval=1, last=last, best=best, every=every))
    kept: set[int] = set()
    for step, score in enumerate(scores):
        write(store, step, score)
        kept.add(step)
        ranked = sorted((s for s in kept if scores[s] is not None), key=lambda s: (-(scores[s] or 0.0), s))
        kept &= set(sorted(kept)[-last:]) | set(ranked[:best]) | {s for s in kept if every and s % every == 0}
        assert checkpoint_steps(root) == sorted(kept)
    shutil.rmtree(root)


def test_a_failure_while_writing_leaves_nothing(store: CheckpointStore) -> None:
    write(store, 1)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), store.writing(2, FACTS) as folder:
        fail(folder)
    assert [path.name for path in store.root.iterdir()] == ["step-000001"]


def test_the_same_step_can_be_written_again(store: CheckpointStore) -> None:
    write(store, 1, text="old")
    write(store, 1, text="new")
    open_checkpoint(store.path(1), FACTS)
    assert (store.path(1) / "hf" / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("passing", [1, 2])
def test_sigkill_while_writing_leaves_the_earlier_one(tmp_path: Path, passing: int) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.checkpoints import *;"
        "from trainer.run_settings import CheckpointSettings;"
        "s = CheckpointStore(Path(sys.argv[1]), CheckpointSettings(interval=1));\n"
        "with s.writing(int(sys.argv[2]), Facts(catalogue_digest='abc', vocabulary_size=100)) as f:\n"
        "    (f / 'w').write_text('x' * 1000)\n"
    )
    root = tmp_path / "checkpoints"
    arguments = [sys.executable, "-c", code, str(root)]
    assert subprocess.run([*arguments, "1"], check=False).returncode == 0
    killed = subprocess.run(
        [*arguments, "2"], env={**os.environ, "WINDLASS_FAULT": f"checkpoint_write:{passing}"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint_steps(root) == [1]
    assert (root / ".step-000002.partial").is_dir()
    assert subprocess.run([*arguments, "2"], check=False).returncode == 0
    assert checkpoint_steps(root) == [1, 2]
    assert open_checkpoint(root / "step-000002", FACTS).step == 2
    assert not list(root.glob(".*"))


def test_a_full_disk_is_noticed_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, 1)
    usage = shutil.disk_usage(store.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    room = store.writing(2, FACTS, expected_bytes=10 * 2**20)
    with pytest.raises(RunError, match=r"step 2 needs 12 MiB and 3 MiB are free; .*step-000001 stays"), room:
        pytest.fail("the body must not run")
    write(store, 2)
    assert checkpoint_steps(store.root) == [1, 2]


def _remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _edit(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove_manifest, "no MANIFEST.json"),
        (lambda f: (f / MANIFEST).write_text("{"), "is damaged: not JSON"),
        (_edit(format=2), "format 2; legal: format 1"),
        (_edit(files=[]), "is damaged"),
        (_edit(facts={}), "is damaged"),
        (_edit(files={"../x": {"bytes": 1, "xxh3_128": ""}}), "paths inside the checkpoint"),
        (lambda f: (f / "hf" / "config.json").unlink(), "is missing"),
        (lambda f: (f / "hf" / "model.safetensors").write_text("weight"), "6 bytes; legal: 7 bytes"),
        (lambda f: (f / "hf" / "model.safetensors").write_text("Weights"), "wrong digest"),
        (_edit(facts={"catalogue_digest": "other", "vocabulary_size": 100}), "belongs to the catalogue other"),
        (_edit(facts={"catalogue_digest": "abc", "vocabulary_size": 99}), "vocabulary of 99 tokens; legal: 100"),
    ],
)
def test_damage_and_foreign_checkpoints_are_refused(store: CheckpointStore, damage: Any, words: str) -> None:
    write(store, 1)
    damage(store.path(1))
    with pytest.raises(RequestError, match=words):
        open_checkpoint(store.path(1), FACTS)


def test_model_folder_understands_runs_checkpoints_and_hf(store: CheckpointStore) -> None:
    write(store, 1, 0.9)
    write(store, 2, 0.1)
    best = store.path(1) / "hf"
    for path in (best, store.path(1), store.root, store.root.parent):
        assert model_folder(path) == best
    with pytest.raises(RequestError, match="an hf folder"):
        model_folder(store.root.parent / "nothing")


def test_leftovers_are_cleaned_and_foreign_names_left_alone(store: CheckpointStore) -> None:
    write(store, 1)
    (store.root / ".step-000002.partial").mkdir()
    (store.root / ".step-000000.deleted").mkdir()
    (store.root / "step-backup").mkdir()
    again = CheckpointStore(store.root, CheckpointSettings(interval=1))
    assert sorted(p.name for p in again.root.iterdir()) == ["step-000001", "step-backup"]
    assert read_manifest(store.path(1)).step == 1


def test_a_model_of_a_damaged_checkpoint_is_refused_and_a_copied_one_is_not(
    store: CheckpointStore, tmp_path: Path
) -> None:
    write(store, 1)
    checkpoint = store.path(1)
    for path in (checkpoint, checkpoint / "hf", store.root.parent):
        assert open_model(path) == checkpoint / "hf"
    weights = checkpoint / "hf" / "model.safetensors"
    weights.write_text("WEIGHTS")
    for path in (checkpoint, checkpoint / "hf", store.root.parent):
        with pytest.raises(RequestError, match="wrong digest"):
            open_model(path)
    weights.write_text("weights")
    (checkpoint / MANIFEST).unlink()
    for path in (checkpoint, checkpoint / "hf"):
        with pytest.raises(RequestError, match=f"no {MANIFEST}"):
            open_model(path)
    shutil.copytree(checkpoint / "hf", tmp_path / "copy" / "hf")
    assert open_model(tmp_path / "copy" / "hf") == tmp_path / "copy" / "hf"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(store: CheckpointStore, error: Exception) -> None:
    write(store, 1)
    with (
        pytest.raises(RunError, match=r"checkpoint of step 2 could not be written .*step-000001 stays"),
        store.writing(2, FACTS),
    ):
        raise error
    assert checkpoint_steps(store.root) == [1]
    assert [path.name for path in store.root.iterdir()] == ["step-000001"]


def test_only_a_runs_own_state_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointSettings())
    write(store, 1)
    folder = store.path(1)
    check_own(store.root, folder)

    file = sorted(path for path in folder.rglob("*") if path.is_file())[0]
    file.chmod(0o666)
    with pytest.raises(RequestError, match="may be written by everyone"):
        check_own(store.root, folder)
    file.chmod(0o644)

    shutil.copytree(folder, tmp_path / "elsewhere")
    store.path(2).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"leads to .*elsewhere; legal: a checkpoint inside"):
        check_own(store.root, store.path(2))

    (folder / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="more: is a link"):
        check_own(store.root, folder)
    (folder / "more").unlink()

    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RequestError, match=f"belongs to user {os.getuid()}; legal: a file of the user who continues"):
        check_own(store.root, folder)
