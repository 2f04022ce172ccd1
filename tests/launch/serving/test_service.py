"""Contract: the real thing. `windlass serve` with vLLM behind Ray Serve: what it answers is what the log holds, with
its log-propensity; a new version takes over without a refused request; a process that is killed under load loses no
request that was answered; SIGTERM ends it with exit code 0. `windlass recommend` with Ray Data and vLLM.

Propensities against the exact policy: test_exposure.py. Bad requests, batching and the disk: test_replica.py. Wrong
command lines are checked here, without Ray. Not checked: killing Ray's own processes with the service.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from data.feedback_reading import FeedbackChecks, read_feedback
from launch import cli
from launch.provenance import ROOT
from launch.serving.exposure_log import ExposureLog
from reward.service import free_port
from tests.launch.serving.world import ITEMS, make_registry, write_model
from tests.requirements import require
from tests.small_world import windlass
from tests.tiny_model import tiny_catalogue

UP_S = 240.0


class Running:
    """`windlass serve` in processes of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        self.output = folder / "serve.log"
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "windlass"),
                    *("serve", "registry", "--log", "log", "--port", str(port), "--poll-s", "0.3"),
                    *("--rollout.dtype", "float32", "--rollout.kv-cache-gib", "0.1", "--rollout.threads", "1"),
                    *("--cluster.object-store-mib", "128", *arguments),
                ],
                cwd=folder,
                env={**os.environ, "WINDLASS_PACKAGE_DIGEST": "unchecked"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait(self) -> dict[str, Any]:
        """What /health says, once it says something."""
        end = time.monotonic() + UP_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.output.read_text()
            try:
                told = self.client.get("/health")
                if told.status_code == 200:
                    content: dict[str, Any] = told.json()
                    return content
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(self.output.read_text())

    def ask(self, user: int, **more: Any) -> dict[str, Any]:
        answer = self.client.post("/recommend", json={"user": user, "history": [user % ITEMS], **more})
        assert answer.status_code == 200, answer.text
        content: dict[str, Any] = answer.json()
        return content

    def kill_everything(self) -> None:
        """SIGKILL to every process of the service, Ray's too."""
        if not psutil.pid_exists(self.process.pid):
            return
        driver = psutil.Process(self.process.pid)
        family = [*driver.children(recursive=True), driver]
        for one in family:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=30)


class Load:
    """Clients that keep asking, and remember what they were answered."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self.answered: list[dict[str, Any]] = []
        self.refused = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, number)) for number in range(clients)]

    def _ask(self, url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/recommend", json={"user": number, "history": [number], "k": 1 + number % 2})
                except httpx.TransportError:
                    self.refused += 1
                    time.sleep(0.05)
                    continue
                if answer.status_code == 200:
                    self.answered.append(answer.json())
                else:
                    self.refused += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, answers: int) -> None:
        """Wait for so many further answers."""
        goal, end = len(self.answered) + answers, time.monotonic() + UP_S
        while len(self.answered) < goal:
            assert time.monotonic() < end, (len(self.answered), self.refused)
            time.sleep(0.02)


def logged(log: Path) -> dict[str, dict[str, Any]]:
    """Close the days as a later start would, and read them."""
    ExposureLog(log, window_s=86_400, clock=lambda: time.time() + 3 * 86_400).close_days()
    read = read_feedback(log, FeedbackChecks(n_items=ITEMS, max_bad_share=0.0))
    assert not any(read.counts.values())
    return {row["request_id"]: row for row in read.table.to_pylist()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require("ray")
    require("vllm")
    return tmp_path


@pytest.mark.long
def test_killed_and_followed(folder: Path) -> None:
    registry = make_registry(folder)
    first, second = (registry.version(number).name for number in (1, 2))
    service = Running(folder)
    try:
        process = service.wait()["process"]
        answer = service.ask(3, k=3)
        said = {"responses": [{"request_id": answer["request_id"], "item": answer["items"][1], "response": 0.5}]}
        assert service.client.post("/feedback", json=said).json()["outcomes"] == ["joined"]
        with Load(service.url) as load:
            load.until(20)
            registry.promote(2, at=1.0, why="test")
            end = time.monotonic() + UP_S
            while service.client.get("/health").json()["policy_version"] != second:
                assert time.monotonic() < end
                time.sleep(0.2)
            load.until(20)
            assert load.refused == 0
            assert {one["policy_version"] for one in load.answered} == {first, second}
            # The process that answers is killed in the middle of it; Ray Serve starts another.
            os.kill(process, signal.SIGKILL)
            load.until(20)
            assert load.refused
        assert service.wait()["process"] != process
        assert service.client.post("/feedback", json=said).json()["outcomes"] == ["unchanged"]
        service.process.terminate()
        assert service.process.wait(120) == 0, service.output.read_text()
        answered = {one["request_id"]: one for one in [answer, *load.answered]}
        rows = logged(folder / "log")
        assert answered.keys() <= rows.keys()
        for request_id, one in answered.items():
            row = rows[request_id]
            assert (row["exposed"], row["policy_version"]) == (one["items"], one["policy_version"])
            assert row["logp0"] == pytest.approx(one["log_propensities"])
        assert rows[answer["request_id"]]["response"] == [0.0, 0.5, 0.0]
    finally:
        service.kill_everything()


@pytest.mark.long
def test_recommend_in_batch(folder: Path) -> None:
    """Ray Data with two vLLM engines: every row once with its columns, and the answer by its schema."""
    catalogue = tiny_catalogue(items=ITEMS)
    write_model(folder / "model", catalogue, 0)
    (folder / "contexts").mkdir()
    asked: dict[str, list[int]] = {}
    for part in range(2):
        history = [[(7 * part + row) % ITEMS, row] for row in range(20)]
        names = [f"{part}-{row:02d}" for row in range(20)]
        asked |= dict(zip(names, history, strict=True))
        pq.write_table(pa.table({"request_id": names, "history": history}), folder / "contexts" / f"{part}.parquet")
    done = windlass(
        *("recommend", "model", "--contexts", "contexts", "--out", "out", "--k", "3", "--batch", "8", "--json", "-"),
        *("--rollout.dtype", "float32", "--rollout.kv-cache-gib", "0.1", "--rollout.engines", "2"),
        *("--rollout.threads", "1", "--cluster.object-store-mib", "128"),
        cwd=folder,
        WINDLASS_PACKAGE_DIGEST="unchecked",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    content = json.loads((ROOT / "docs" / "schemas" / "recommend.schema.json").read_text())
    jsonschema.Draft202012Validator(content).validate(answer)
    rows = pads.dataset(folder / "out", format="parquet").to_table().to_pylist()
    assert sorted((row["request_id"], row["history"]) for row in rows) == sorted(asked.items())
    for row in rows:
        assert len(set(row["items"])) == 3
        assert not set(row["items"]) & set(row["history"])
        assert (row["policy_version"], row["propensity_kind"]) == (answer["policy_version"], "sample")
    assert not list(folder.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none", "--log", "log"], "registry.json"),
        (["registry", "--log", "model"], "is no folder"),
        (["registry", "--log", "log", "--host", "0.0.0.0"], "WINDLASS_SERVE_TOKEN"),
        (["registry", "--log", "log", "--beams", "99", "--serve", "beam"], "--beams: 99"),
        (["registry", "--log", "log", "--epsilon", "0.5"], "serve mixture"),
        (["registry", "--log", "log", "--rollout.width", "3"], "--rollout.width: 3"),
        (["registry", "--log", "log", "--port", "99999"], "port"),
        (["registry"], "--log"),
    ],
)
def test_wrong_command_lines_are_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    require("ray")
    folder = tmp_path_factory.getbasetemp() / "wrong"
    if not folder.exists():
        folder.mkdir()
        make_registry(folder)
        (folder / "model").write_text("a file")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("WINDLASS_SERVE_TOKEN", raising=False)
    capsys.readouterr()
    assert cli.run(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (folder / "log").exists()
    assert json.loads((folder / "registry" / "registry.json").read_text())["format"] == 1
