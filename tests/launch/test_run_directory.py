"""Contract: a run folder is held by one process, keeps its resolved configuration, and is not continued as another
experiment; SIGTERM sets a flag; a fault point kills at the named passing; memory is sampled over the process tree.

Not checked here: what the loop does with the flag.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import RequestError
from data.faults import fault_point, parse_fault
from launch.config import job_from, read_recipe, to_mapping
from launch.memory import MemorySampler
from launch.run_directory import MAY_CHANGE, RunDirectory, leaves, read_json
from launch.setting_names import keys
from trainer.interruption import Interruption
from trainer.jobs import LaacJob, RlJob

RECIPE: dict[str, Any] = {"job": "rl", "data": {"dataset": "d"}, "limits": {"max_steps": 5}}


def test_configuration_and_environment_are_kept(tmp_path: Path) -> None:
    job = job_from(RECIPE)
    for _ in range(2):
        with RunDirectory.open(tmp_path / "r", job, command=["train", "x"]) as run:
            run.write_summary({"interrupted": False})
    assert job_from(read_recipe(run.path / "config.yaml")) == job
    entries = run.environment()
    assert len(entries) == 2
    assert entries[0]["command"] == ["windlass", "train", "x"]
    assert {"commit", "package_digest", "hardware", "libraries"} <= set(entries[0])
    assert read_json(run.path / "summary.json") == {"format": 1, "interrupted": False}


def test_one_process_holds_a_folder(tmp_path: Path) -> None:
    job = job_from(RECIPE)
    with RunDirectory.open(tmp_path, job), pytest.raises(RequestError, match=f"in use by process {os.getpid()}"):
        RunDirectory.open(tmp_path, job)
    RunDirectory.open(tmp_path, job).close()


def test_another_experiment_is_refused_but_limits_may_change(tmp_path: Path) -> None:
    # Until a run has left something of its own, a mistyped key can be mended in the same folder.
    RunDirectory.open(tmp_path, job_from(RECIPE, ["--learner.lr", "0.7"])).close()
    RunDirectory.open(tmp_path, job_from(RECIPE)).close()
    (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
    RunDirectory.open(tmp_path, job_from(RECIPE, ["--limits.max_steps", "9", "--learner.ranks", "2"])).close()
    with pytest.raises(
        RequestError, match=r"learner.lr: 0.5, but the run in .* was started with 1e-05; legal: the same"
    ):
        RunDirectory.open(tmp_path, job_from(RECIPE, ["--learner.lr", "0.5"]))
    # A refused start leaves the folder free and its configuration as it was.
    RunDirectory.open(tmp_path, job_from(RECIPE)).close()


def test_a_setting_that_came_since_counts_as_its_default(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
    RunDirectory.open(tmp_path, job_from(RECIPE)).close()
    config = tmp_path / "config.yaml"
    written = yaml.safe_load(config.read_text())
    assert written["learner"].pop("grad_clip") is not None
    config.write_text(yaml.safe_dump(written))
    with pytest.raises(RequestError, match=r"learner\.grad_clip: 0\.5, but the run in .* was started with 1\.0"):
        RunDirectory.open(tmp_path, job_from(RECIPE, ["--learner.grad_clip", "0.5"]))
    RunDirectory.open(tmp_path, job_from(RECIPE)).close()
    # One that is gone is named.
    config.write_text(yaml.safe_dump(written | {"learner": written["learner"] | {"grad_clip": 1.0, "forgotten": 3}}))
    with pytest.raises(RequestError, match=r"learner\.forgotten: None, but the run in .* was started with 3"):
        RunDirectory.open(tmp_path, job_from(RECIPE))


def test_scores_of_one_run_stay_comparable(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000000").mkdir(parents=True)
    RunDirectory.open(tmp_path, job_from(RECIPE)).close()
    RunDirectory.open(tmp_path, job_from(RECIPE, ["--evaluation.every", "7", "--evaluation.test_rows", "9"])).close()
    for key, value in (("metric", "hr@10"), ("rows", "77"), ("k", "[1, 10, 40]")):
        with pytest.raises(RequestError, match=f"evaluation.{key}: .*; legal: the same value"):
            RunDirectory.open(tmp_path, job_from(RECIPE, [f"--evaluation.{key}", value]))


def test_the_changeable_keys_exist() -> None:
    names = [key.name for job in (RlJob, LaacJob) for key in keys(job)]
    for name in MAY_CHANGE:
        assert any(n == name or n.startswith(name + ".") for n in names), name


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="a folder that can be written"):
        RunDirectory.open(tmp_path / "file", job_from(RECIPE))


def test_no_folder_that_everyone_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with RunDirectory.open(tmp_path / "mine", job_from(RECIPE)) as run:
            (run.path / "more").mkdir()
        assert [path.stat().st_mode & 0o002 for path in (run.path, run.path / "more", run.path / "config.yaml")] == [
            0
        ] * 3
        (tmp_path / "shared").mkdir(mode=0o777)
        (tmp_path / "shared").chmod(0o777)
        with pytest.raises(RequestError, match=r"--run-dir: .*shared may be written by everyone; legal: chmod o-w"):
            RunDirectory.open(tmp_path / "shared", job_from(RECIPE))
    finally:
        os.umask(before)


def test_leaves_are_dotted() -> None:
    assert dict(leaves({"a": {"b": 1, "c": {"d": [2]}}, "e": None})) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert json.dumps(to_mapping(job_from(RECIPE)))


def test_sigterm_sets_a_flag_and_the_handler_goes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_does_not_wait() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("value", ["", "rollout", "rollout:0", "rollout:x", "nowhere:1", ":1"])
def test_malformed_faults_are_refused(value: str) -> None:
    with pytest.raises(RequestError, match="POINT:N"):
        parse_fault(value)


def test_a_fault_kills_at_the_named_passing() -> None:
    code = (
        "from data.faults import fault_point\n"
        "for i in range(5):\n    fault_point('push'); fault_point('step'); print(i, flush=True)"
    )
    environment = {**os.environ, "WINDLASS_FAULT": "step:3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1"]
    with pytest.raises(ValueError, match="nowhere"):
        fault_point("nowhere")


def test_memory_of_a_child_is_counted() -> None:
    code = (
        "import sys; x = bytearray(200 * 2**20); x[::4096] = b'1' * len(x[::4096]);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with MemorySampler(period_s=0.05) as sampler:
        time.sleep(0.2)
        before = sampler.peak_pss_gib
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.3)
            assert child.stdin is not None
            child.stdin.close()
    assert before > 0
    assert 0.19 < sampler.peak_pss_gib - before < 0.3
