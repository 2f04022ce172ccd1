"""Contract: what `windlass submit --dry-run --json -` prints matches its schema, asks for what was asked, holds no
value of a secret whatever the target, and a submission that cannot work is refused in one line before anything starts.

Not checked here: that jobs run (test_ray_job.py, test_slurm_job.py); a Kubernetes cluster, which is nowhere here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launch import cli
from launch.config import load_job
from launch.provenance import ROOT
from launch.submission import drain
from launch.submission.following import follow
from launch.submission.gpu_hours import estimate
from launch.submission.shipping import shipment, staged
from tests.launch.submission.rayjob_fields import RAY_JOB

SECRET = "s3cr3t-value-of-a-test"
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "submit.schema.json").read_text())
TRAIN = ["train", "ml100k-rl", "--run-dir", "/shared/runs/rl", "--limits.max_steps", "10"]
TARGETS: dict[str, list[str]] = {
    "ray": [],
    "slurm": ["--partition", "main", "--sbatch", "qos=high"],
    "kuberay": ["--image", "registry/windlass:1", "--volume", "runs:/shared"],
}


@pytest.fixture(autouse=True)
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with one file, and a secret in the environment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_ranker.py").write_text("NAME = 1\n")
    monkeypatch.setenv("WINDLASS_REWARD_TOKEN", SECRET)
    monkeypatch.setenv("COLOUR", "blue")
    # DeepSpeed leaves it behind in a process that has used it, and a job is given what it finds.
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


def plan(capsys: pytest.CaptureFixture[str], target: str, *options: str, words: list[str] = TRAIN) -> dict[str, Any]:
    """The plan of a submission."""
    asked = ["submit", "--to", target, "--dry-run", *TARGETS[target], *options, "--json", "-", "--", *words]
    assert cli.run(asked) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(printed)
    return printed


@pytest.mark.parametrize("target", TARGETS)
def test_the_plan(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "3", "--gpus-per-node", "2", "--env", "COLOUR", "--env", "SHAPE=round"]
    found = plan(capsys, target, *options, "--secret", "WINDLASS_REWARD_TOKEN")
    assert found["target"] == target
    assert found["command"] == ["windlass", *TRAIN]
    assert found["env_keys"] == ["COLOUR", "SHAPE", "WINDLASS_REWARD_TOKEN"]
    assert found["resources"]["nodes"] == 3
    assert found["resources"]["needs"]["gpus"] == 1, "the learner takes a GPU where there are some"
    assert found["gpu_hours"] is None
    assert "no recorded `bench step` on a GPU" in found["gpu_hours_reason"]
    assert SECRET not in json.dumps(found)


def test_a_script_that_bash_reads(capsys: pytest.CaptureFixture[str]) -> None:
    script = plan(capsys, "slurm", "--env", "COLOUR", words=[*TRAIN, "--data.dataset", "a b'c"])["files"]["script"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "#SBATCH --signal=B:TERM@300\n" in script
    assert "#SBATCH --qos=high\n" in script
    assert "blue" not in script, "values come from the environment of sbatch"
    # The command's words arrive as they were.
    show = 'printf "%s\\n" "${COMMAND[@]}"'
    line = next(line for line in script.splitlines() if line.startswith("COMMAND="))
    told = subprocess.run(["bash", "-c", f"{line}\n{show}"], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [*TRAIN, "--data.dataset", "a b'c"]


@pytest.mark.parametrize("nodes", ["1", "4"])
def test_a_manifest_that_the_operator_knows(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "kuberay", "--nodes", nodes, "--gpus-per-node", "8", "--secret", "WINDLASS_REWARD_TOKEN")
    manifest = found["files"]["manifest"]
    jsonschema.Draft202012Validator(RAY_JOB).validate(manifest)
    spec = manifest["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    groups = spec["rayClusterSpec"].get("workerGroupSpecs", [])
    assert sum(group["replicas"] for group in groups) == int(nodes) - 1
    (container,) = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    reference = {"secretKeyRef": {"name": "windlass", "key": "WINDLASS_REWARD_TOKEN"}}
    assert {"name": "WINDLASS_REWARD_TOKEN", "valueFrom": reference} in container["env"]


def test_the_schema_of_the_operator_refuses() -> None:
    broken = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "a"}, "spec": {"entryPoint": "ls"}}
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.Draft202012Validator(RAY_JOB).validate(broken)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--to", "ray"], "no command"),
        (["--to", "ray", "--", "trian"], "did you mean train"),
        (["--to", "ray", "--", "submit"], "command: 'submit'"),
        (["--to", "ray", "--", "train", "ml100k-rl"], "--run-dir: missing; legal: an absolute path"),
        (["--to", "ray", "--", *TRAIN, "--batch_prompts", "33"], "batch_prompts: 33; legal: 32 or 64"),
        (["--to", "slurm", "--", "eval", "--no-such"], "eval: "),
        (["--to", "slurm", "--", *TRAIN, "--rollout.gpus", "1"], "1 nodes with 0 GPUs are 0; legal: at least 1 GPUs"),
        (["--to", "slurm", "--sbatch", "qos=a b", "--", "doctor"], "--sbatch"),
        (["--to", "slurm", "--partition", "a;b", "--", "doctor"], "--partition"),
        (["--to", "kuberay", "--", "doctor"], "--image: missing"),
        (["--to", "kuberay", "--image", "i", "--name", "Up_", "--", "doctor"], "--name: 'Up_'"),
        (["--to", "kuberay", "--image", "i", "--volume", "runs", "--", "doctor"], "legal: CLAIM:/path"),
        (["--to", "ray", "--env", "ABSENT_HERE", "--", "doctor"], "ABSENT_HERE is not set here"),
        (["--to", "ray", "--env", "WINDLASS_REWARD_TOKEN", "--", "doctor"], "legal: --secret WINDLASS_REWARD_TOKEN"),
        (["--to", "ray", "--secret", f"A={SECRET}", "--", "doctor"], "the NAME of a variable"),
        (["--to", "ray", "--env", f"A={SECRET}", "--", "doctor"], "--env A of the submission: holds the value of"),
        (["--to", "ray", "--", "doctor", "--json", SECRET], "word 3 of the submission: holds the value of"),
        (["--to", "ray", "--working-dir", "/no/where", "--", "doctor"], "--working-dir: /no/where"),
        (["--to", "ray", "--address", "here", "--", "doctor"], "--address: 'here'"),
    ],
)
def test_what_cannot_work_is_refused(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", *arguments]) == 2
    told = capsys.readouterr().err
    assert match in told
    assert len(told.splitlines()) == 1
    assert SECRET not in told


def test_what_is_shipped(tmp_path: Path) -> None:
    for name in (".env", "keys/id_rsa", "pkg/module.py", "runs/a/metrics.jsonl", ".cache/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    what = shipment(tmp_path)
    assert what.files == ["own_ranker.py", "pkg/module.py"]
    assert what.left_out == [".env", "keys/id_rsa"]
    with staged(what) as folder:
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == what.files
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("/keys/\n.cache/\npkg/\n")
    what = shipment(tmp_path)
    assert what.files == [".gitignore", "own_ranker.py", "runs/a/metrics.jsonl"]
    assert not what.has_packages
    assert shipment(ROOT).has_packages


def test_gpu_hours(tmp_path: Path) -> None:
    job = load_job("ml100k-rl", ["--limits.max_steps", "100", "--init", "small", "--batch_prompts", "64"])
    result = {
        "settings": {
            "device": "cuda",
            "dtype": job.learner.dtype.value,  # type: ignore[union-attr]
            "group": job.rollout.width,  # type: ignore[union-attr]
            "prompts": 8,
            "prompt_len": 250,
            "model": "small",
        },
        "model": {"layers": 6, "width": 384},
        "seconds": {"median": 0.9},
        "machine": {"kind": {"cuda": "a-card"}},
    }
    records = tmp_path / "bench_step.json"
    records.write_text(json.dumps({"rows": [{"result": None}, {"result": result}]}))
    assert estimate(job, gpus=2, records=records).gpu_hours == pytest.approx(100 * 64 / 8 * 0.9 / 3600)
    assert estimate(job, gpus=0, records=records).gpu_hours == 0
    assert estimate(None, gpus=1, records=records).gpu_hours is None
    result["settings"]["device"] = "cpu"  # type: ignore[index]
    records.write_text(json.dumps({"rows": [{"result": result}]}))
    assert estimate(job, gpus=2, records=records).gpu_hours is None


class FakeJob:
    """A job that ends after some looks, and a scheduler that is away at first."""

    def __init__(self) -> None:
        self.looks = 0

    def output(self) -> str:
        return f"line {self.looks}\n"

    def exit_code(self) -> int | None:
        self.looks += 1
        if self.looks == 1:
            raise ConnectionError("away")
        return 7 if self.looks == 3 else None

    def stop(self) -> None:
        raise AssertionError("nobody asked for it")

    def describe(self) -> str:
        return "a job"


def test_following(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.submission.following.POLL_S", 0.0)
    assert follow(FakeJob(), grace_s=1) == 7
    assert capsys.readouterr().out == "line 2\nline 3\n"


class StoppedJob(FakeJob):
    """A job that somebody wants to end, whose scheduler misses the first request to stop it."""

    stops = 0

    def exit_code(self) -> int | None:
        if not self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        return 0

    def stop(self) -> None:
        self.stops += 1
        if self.stops == 1:
            raise ConnectionError("away")


def test_a_stop_that_the_scheduler_missed_is_sent_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.submission.following.POLL_S", 0.0)
    job = StoppedJob()
    assert follow(job, grace_s=1) == 0
    assert job.stops == 2
    assert capsys.readouterr().err.count("asked the job to end") == 1


def test_the_hook_of_a_pod_ends_commands_alone(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "cli.py").write_text("import time; time.sleep(60)")
    import sys
    import time

    sleeping = subprocess.Popen([sys.executable, "-m", "launch.cli"], cwd=tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "launch.cli"])
    try:
        time.sleep(0.5)
        found = drain.commands()
        assert sleeping.pid in [process.pid for process in found]
        assert other.pid not in [process.pid for process in found]
        drain.end([process for process in found if process.pid == sleeping.pid])
        assert sleeping.poll() is not None
        assert other.poll() is None
    finally:
        sleeping.kill()
        other.kill()
        other.wait()
