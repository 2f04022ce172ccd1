"""Contract: the whole circle with the real parts (Ray Serve, vLLM, DeepSpeed): what `windlass serve` showed and was
told makes a day of the log, `windlass continual` updates the model from exactly those rows by ABPO and promotes it, and
the service that runs meanwhile takes the new version over.

The parts have tests of their own: test_service.py, tests/launch/continual. How good the update is, is not checked.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from data.catalogue import Catalogue
from launch.continual.cycle import begin_registry
from launch.continual.registry import Registry
from launch.serving.exposure_log import ExposureLog
from tests.launch.serving.test_service import UP_S, Running
from tests.requirements import require
from tests.small_world import recipe, windlass, write_dataset, write_recipe
from tests.tiny_model import write_tiny_model
from trainer.prompt_card import PromptCard

DAY_S = 86_400
REQUESTS = 120


def serve_a_day(service: Running, histories: list[list[int]]) -> dict[str, float]:
    """Ask, and respond to one of three; returns the response by request."""
    told: dict[str, float] = {}
    for user, history in enumerate(histories):
        answer = service.client.post("/recommend", json={"user": user, "history": history})
        assert answer.status_code == 200, answer.text
        told[answer.json()["request_id"]] = float(user % 3 == 0)
    liked = [{"request_id": request_id} for request_id, response in told.items() if response]
    joined = service.client.post("/feedback", json={"responses": liked}).json()
    assert joined["counts"]["joined"] == len(liked)
    return told


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_was_shown_updates_what_is_shown(tmp_path: Path) -> None:
    for part in ("ray", "vllm", "deepspeed"):
        require(part)
    dataset = write_dataset(tmp_path / "dataset")
    model = write_tiny_model(tmp_path / "model", Catalogue.build(dataset, "default"))
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
    registry = Registry(tmp_path / "registry", create=True)
    begin_registry(registry, model, at=0.0)
    samples = dataset.samples("train")
    histories = [samples.history(row, 10**6).tolist() for row in range(REQUESTS)]
    # The day of the requests is over, and so is the window of their responses.
    service = Running(tmp_path, "--test-clock-s", str(-3 * DAY_S))
    try:
        assert service.wait()["policy_version"] == registry.version(1).name
        told = serve_a_day(service, histories)
        service.process.terminate()
        assert service.process.wait(120) == 0, service.output.read_text()
    finally:
        service.kill_everything()
    (day,) = ExposureLog(tmp_path / "log", window_s=DAY_S, clock=time.time).close_days()

    content = recipe(
        dataset.path,
        "rl",
        init=str(model),
        rollout={"decode": "sample"},
        reward={"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0},
        objective={"anchor": {"mode": "append"}},
        evaluation={"every": 3},
    )
    guard = {"conditions": [{"metric": "exposed_hr@10", "tolerance": 1.0}]}
    write_recipe(tmp_path / "abpo.yaml", content | {"continual": {"guard": guard}})
    textfile = tmp_path / "windlass.prom"
    service = Running(tmp_path)
    try:
        assert service.wait()["policy_version"] == registry.version(1).name
        done = windlass(
            *("continual", "abpo.yaml", "--log", "log", "--registry", "registry", "--once", "--json", "-"),
            *("--continual.metrics.textfile", str(textfile)),
            cwd=tmp_path,
            timeout=900,
            WINDLASS_PACKAGE_DIGEST="unchecked",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (result,) = json.loads(done.stdout)
        assert (result["day"], result["decision"], result["version"]) == (day, "promoted", 2)
        counts = result["counts"]
        assert counts["train"] + counts["held_out"] == counts["rows"] == len(told) == REQUESTS
        (served,) = registry.version(2).lineage["policies"]
        assert (served["name"], served["version"], served["rows"]) == (registry.version(1).name, 1, REQUESTS)
        assert 'windlass_continual_decisions_total{decision="promoted"} 1.0' in textfile.read_text()
        end = time.monotonic() + UP_S
        while service.wait()["policy_version"] != registry.version(2).name:
            assert time.monotonic() < end, service.output.read_text()
            time.sleep(0.3)
        assert service.ask(0)["policy_version"] == registry.version(2).name
    finally:
        service.kill_everything()
