"""Contract: what the HTTP face answers and refuses, each refusal with its reason, status and count; the row in the log
is the answer that was given; requests that come together share a call; nothing is answered that is not on the disk; a
version is followed, a broken one is not, and the rows name the version that served; draining answers what is under way;
a cycle of `launch.continual` takes the log of the service.

The engine is the reference one in this process behind a stand-in for the fleet (`LocalFleet`), and the application is
called without a server. Ray Serve, vLLM and killed processes: test_service.py.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.feedback_reading import FeedbackChecks, read_feedback
from data.records import Decode, DecodeSpec, Groups, Prompt
from launch.continual.cycle import Cycle, begin_registry
from launch.continual.files import Files
from launch.continual.guard import Condition, Evidence, GuardSettings, Range
from launch.continual.log_folder import LogFolder
from launch.continual.reasons import Decision
from launch.continual.registry import Registry
from launch.continual.settings import ServiceSettings
from launch.continual.updating import Update
from launch.provenance import ROOT
from launch.serving.exposure_log import ExposureLog
from launch.serving.replica import ReplicaOptions, ServingReplica
from launch.serving.served import ServedVersion
from launch.serving.settings import ServeSettings
from rollout.engine import Engine, build_engine
from rollout.engine_calls import EngineFailure
from rollout.fleet_health import LossReason
from rollout.settings import EngineKind, RolloutSettings
from tests.launch.serving.world import ITEMS, make_registry
from tests.requirements import require
from trainer.initial_model import CATALOGUE
from trainer.prompt_card import PromptCard

DAY = 86_400


class LocalFleet:
    """In place of the fleet: one engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.violations: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self.sizes: list[int] = []
        self.closed = False

    def generate(self, prompts: list[Prompt], spec: DecodeSpec) -> Groups:
        assert not self.closed
        if self.failures:
            raise self.failures.pop()
        self.sizes.append(len(prompts))
        return self.engine.generate(prompts, spec)

    def restart(self, engine_id: str) -> None:
        assert engine_id == "engine-0"

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, dict[int, Engine]]:
    require("ray")
    registry = make_registry(tmp_path_factory.mktemp("world"))
    settings = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32")
    return registry, {number: build_engine(settings, registry.version(number).path) for number in (1, 2)}


class Service:
    """A replica and a way to talk to it."""

    def __init__(self, registry: Registry, log: Path, token: str | None = None, **settings: Any) -> None:
        given = {"poll_s": 600, "draw_seed": 3, **settings}
        self.log = log
        self.registry = registry
        self.replica = ServingReplica(
            ReplicaOptions(
                registry=registry.root,
                log=log,
                settings=ServeSettings(**given),
                rollout=RolloutSettings(),
                token=token,
            )
        )

    def talk(self, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        """Run a conversation and end the replica."""

        async def run() -> Any:
            transport = httpx.ASGITransport(self.replica.__serve_build_asgi_app__(), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                said = await conversation(client)
            await self.replica.drain()
            return said

        return asyncio.run(run())

    def rows(self) -> list[dict[str, Any]]:
        """The log as `windlass continual` will see it."""
        later = ExposureLog(self.log, window_s=60, clock=lambda: self.replica._log.now() + 3 * DAY)
        later.close_days()
        catalogue = Catalogue.load(self.registry.version(1).path / CATALOGUE)
        names = frozenset(self.registry.version(number).name for number in (1, 2))
        checks = FeedbackChecks(n_items=catalogue.n_items, policies=names, propensities=False, max_bad_share=0.0)
        rows: list[dict[str, Any]] = read_feedback(self.log, checks).table.to_pylist()
        return rows


@pytest.fixture
def start(
    world: tuple[Registry, dict[int, Engine]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Service]]:
    registry, engines = world

    def served(opened: Registry, number: int, rollout: RolloutSettings) -> ServedVersion:
        version = opened.verify(number)
        catalogue = Catalogue.load(version.path / CATALOGUE)
        builder = PromptCard.read(version.path).builder(catalogue, version.path)
        return ServedVersion(number, version.name, catalogue, builder, LocalFleet(engines[number]))  # type: ignore[arg-type]

    monkeypatch.setattr("launch.serving.replica.ServedVersion.start", staticmethod(served))
    monkeypatch.setattr("launch.serving.replica.LOCK_S", 0.0)
    # It asks for the context of a replica of Ray Serve, which is not there.
    monkeypatch.setattr(
        "ray.serve.batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda queue: None
    )
    yield lambda **settings: Service(registry, tmp_path / "log", **settings)
    registry.promote(1, at=1.0, why="the test is over")


def fleet(service: Service) -> LocalFleet:
    found = service.replica._served._fleet
    assert isinstance(found, LocalFleet)
    return found


def schema(name: str, answer: Any) -> None:
    content = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(content).validate(answer)


def metric(text: str, line: str) -> float:
    """The value of a line of the metrics."""
    return next((float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line)), 0.0)


@pytest.mark.parametrize("serve", ["sample", "beam", "mixture"])
def test_the_row_is_the_answer(start: Callable[..., Service], serve: str) -> None:
    service = start(serve=serve, **({} if serve == "sample" else {"beams": 2}))

    async def conversation(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        asked = [
            {"user": 5, "history": [1, 2, "3"], "k": 1},
            {"user": 6, "history": [1, "gone", 99], "k": 4},
            {"user": 7, "history": [], "k": 4, "exclude": ["7", 8]},
        ]
        answers = await asyncio.gather(*(client.post("/recommend", json=one) for one in asked))
        assert [one.status_code for one in answers] == [200, 200, 200]
        return [one.json() for one in answers]

    answers = service.talk(conversation)
    assert [answer["unknown_items"] for answer in answers] == [0, 2, 0]
    rows = {row["request_id"]: row for row in service.rows()}
    assert len(rows) == 3
    for answer, user, history in zip(answers, (5, 6, 7), ([1, 2, 3], [1], []), strict=True):
        schema("recommend-answer", answer)
        row = rows[answer["request_id"]]
        assert (row["user_id"], row["history"], row["exposed"]) == (user, history, answer["items"])
        assert answer["keys"] == [str(item) for item in answer["items"]]
        assert not set(answer["items"]) & set(history)
        assert (row["decode"], row["policy_version"]) == (answer["decode"], answer["policy_version"])
        assert row["response"] == [0.0] * len(answer["items"])
        logp0 = answer["log_propensities"]
        assert logp0 is None if serve == "beam" else row["logp0"] == logp0
        kind = {"sample": "sample", "beam": "none", "mixture": "mixture"}[serve]
        # What was excluded beyond the history is not in the log, so the propensity there would be a riddle.
        assert row["propensity_kind"] == ("none" if user == 7 else kind)
    assert not set(answers[2]["items"]) & {7, 8}
    assert len({one["request_id"] for one in answers}) == 3


def test_the_answer_is_the_draw_of_the_policy(start: Callable[..., Service], world: Any) -> None:
    """One item by sampling: the engine asked directly, with the seed and the number of the request, says the same."""
    service = start()

    async def conversation(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return [(await client.post("/recommend", json={"user": 1, "history": [4]})).json() for _ in range(5)]

    registry, engines = world
    first = registry.version(1).path
    builder = PromptCard.read(first).builder(Catalogue.load(first / CATALOGUE), first)
    for answer in service.talk(conversation):
        number = int(answer["request_id"].split("-")[2], 16)
        prompt, _ = builder.prompt(np.array([4], np.int32), number)
        groups = engines[1].generate([prompt], DecodeSpec(decode=Decode.SAMPLE, width=1, seed=3))
        assert answer["items"] == groups.item_PG[0].tolist()
        assert answer["log_propensities"] == pytest.approx(groups.sequence_logp_PG[0].tolist())


WRONG = [
    ({}, "user: ", "Field required"),
    ({"user": 1, "history": [1.5]}, "history.0: 1.5", "integer"),
    ({"user": "u", "history": []}, 'user: "u"', "integer"),
    ({"user": 1, "history": [-1]}, "history.0: -1", "greater than or equal to 0"),
    ({"user": 1, "history": [], "k": 0}, "k: 0", "greater than or equal to 1"),
    ({"user": 1, "history": [], "k": 51}, "k: 51", "at most 50"),
    ({"user": 1, "history": [1] * 101}, "history: 101", "at most 100"),
    ({"user": 1, "history": [], "need": "x"}, 'need: "x"', "Extra inputs"),
    ([], "body: []", "dictionary"),
]


def test_bad_requests_are_one_clear_line(start: Callable[..., Service]) -> None:
    service = start(max_history=100)

    async def conversation(client: httpx.AsyncClient) -> None:
        for content, where, what in WRONG:
            answer = await client.post("/recommend", json=content)
            schema("serve-error", answer.json())
            error = answer.json()["error"]
            assert (answer.status_code, error["reason"]) == (422, "bad_request")
            assert where in error["message"], error
            assert what in error["message"], error
            assert "\n" not in error["message"]
        assert (await client.post("/recommend", content=b"{}")).json()["error"]["reason"] == "bad_request"
        garbage = await client.post("/recommend", content=b"{", headers={"content-type": "application/json"})
        assert garbage.status_code == 422
        for response in ({"request_id": "x", "response": 2}, {"request_id": ""}, {"request_id": "x", "more": 1}):
            assert (await client.post("/feedback", json={"responses": [response]})).status_code == 422
        assert (await client.post("/feedback", json={"responses": []})).status_code == 422
        assert (await client.get("/recommend")).json()["error"]["reason"] == "no_route"
        nowhere = await client.get("/nowhere")
        assert (nowhere.status_code, nowhere.json()["error"]["reason"]) == (404, "no_route")
        large = await client.post("/recommend", content=b"x" * (2**20 + 1))
        assert (large.status_code, large.json()["error"]["reason"]) == (413, "too_large")
        everything = await client.post("/recommend", json={"user": 1, "history": list(range(ITEMS))})
        assert (everything.status_code, everything.json()["error"]["reason"]) == (409, "nothing_legal")
        text = (await client.get("/metrics")).text
        assert metric(text, 'windlass_serve_errors_total{reason="bad_request"}') == len(WRONG) + 6
        assert metric(text, 'windlass_serve_errors_total{reason="nothing_legal"}') == 1
        assert metric(text, 'windlass_serve_errors_total{reason="too_large"}') == 1
        assert metric(text, 'windlass_serve_requests_total{route="/recommend",status="422"}') == len(WRONG) + 2

    service.talk(conversation)
    assert service.replica._log.open_requests == 0


def test_a_token_guards_everything_but_health(start: Callable[..., Service]) -> None:
    async def conversation(client: httpx.AsyncClient) -> None:
        ask = {"user": 1, "history": []}
        assert (await client.get("/health")).json()["status"] == "ok"
        for path in ("/metrics", "/openapi.json"):
            refused = await client.get(path)
            assert (refused.status_code, refused.json()["error"]["reason"]) == (401, "unauthorized")
        assert (await client.post("/recommend", json=ask)).status_code == 401
        wrong = {"authorization": "Bearer other"}
        assert (await client.post("/recommend", json=ask, headers=wrong)).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert (await client.post("/recommend", json=ask, headers=right)).status_code == 200
        text = (await client.get("/metrics", headers=right)).text
        assert metric(text, 'windlass_serve_errors_total{reason="unauthorized"}') == 4

    start(token="secret").talk(conversation)


def test_requests_that_come_together_share_a_call(start: Callable[..., Service]) -> None:
    service = start(max_batch=8)

    async def conversation(client: httpx.AsyncClient) -> None:
        asked = [client.post("/recommend", json={"user": user, "history": [user]}) for user in range(20)]
        answers = await asyncio.gather(*asked)
        assert {one.status_code for one in answers} == {200}
        text = (await client.get("/metrics")).text
        assert metric(text, "windlass_serve_exposures_written_total") == 20
        assert metric(text, "windlass_serve_open_requests") == 20
        assert metric(text, 'windlass_serve_seconds_count{route="/recommend"}') == 20

    service.talk(conversation)
    assert sum(fleet(service).sizes) == 20
    assert max(fleet(service).sizes) == 8
    assert len(fleet(service).sizes) <= 5


def test_too_many_waiting_requests_are_refused(start: Callable[..., Service]) -> None:
    service = start(max_waiting=3)

    async def conversation(client: httpx.AsyncClient) -> None:
        asked = [client.post("/recommend", json={"user": user, "history": []}) for user in range(5)]
        answers = await asyncio.gather(*asked)
        refused = [one for one in answers if one.status_code == 503]
        assert 1 <= len(refused) <= 2
        assert {one.json()["error"]["reason"] for one in refused} == {"overloaded"}
        assert refused[0].headers["retry-after"] == "1"

    service.talk(conversation)


def test_nothing_is_answered_that_is_not_on_the_disk(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start()

    async def conversation(client: httpx.AsyncClient) -> str:
        ask = {"user": 1, "history": [1]}
        with monkeypatch.context() as patch:

            def full(descriptor: int) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr("launch.serving.exposure_log.os.fdatasync", full)
            refused = await client.post("/recommend", json=ask)
            assert (refused.status_code, refused.json()["error"]["reason"]) == (503, "disk")
        answer = (await client.post("/recommend", json=ask)).json()
        with monkeypatch.context() as patch:
            patch.setattr("launch.serving.exposure_log.os.fdatasync", full)
            said = {"responses": [{"request_id": answer["request_id"]}]}
            assert (await client.post("/feedback", json=said)).json()["error"]["reason"] == "disk"
        joined = (await client.post("/feedback", json=said)).json()
        schema("feedback-answer", joined)
        assert joined["outcomes"] == ["joined"]
        assert (await client.post("/feedback", json=said)).json()["outcomes"] == ["unchanged"]
        text = (await client.get("/metrics")).text
        assert metric(text, 'windlass_serve_feedback_total{outcome="joined"}') == 1
        assert metric(text, 'windlass_serve_errors_total{reason="disk"}') == 2
        return str(answer["request_id"])

    request_id = service.talk(conversation)
    (row,) = service.rows()
    assert (row["request_id"], row["response"]) == (request_id, [1.0])


def test_a_failed_engine_is_asked_again_once(start: Callable[..., Service]) -> None:
    service = start()

    async def conversation(client: httpx.AsyncClient) -> None:
        ask = {"user": 1, "history": [1]}
        fleet(service).failures = [EngineFailure("engine-0", "died", LossReason.DIED)]
        assert (await client.post("/recommend", json=ask)).status_code == 200
        fleet(service).failures = [
            EngineFailure("engine-0", "died", LossReason.DIED),
            EngineFailure("engine-0", "died", LossReason.DIED),
        ]
        refused = await client.post("/recommend", json=ask)
        assert (refused.status_code, refused.json()["error"]["reason"]) == (503, "engine")
        fleet(service).failures = [RunError("the weights are broken")]
        assert (await client.post("/recommend", json=ask)).status_code == 503
        assert (await client.post("/recommend", json=ask)).status_code == 200

    service.talk(conversation)
    assert len(service.rows()) == 2


def test_the_served_version_is_followed(start: Callable[..., Service], capsys: pytest.CaptureFixture[str]) -> None:
    service = start()
    registry = service.registry

    async def conversation(client: httpx.AsyncClient) -> None:
        async def ask(user: int) -> str:
            answer = await client.post("/recommend", json={"user": user, "history": [3]})
            assert answer.status_code == 200
            return str(answer.json()["policy_version"])

        assert await ask(1) == registry.version(1).name
        old = fleet(service)
        registry.promote(2, at=2.0, why="test")
        under_way = [asyncio.ensure_future(ask(user)) for user in range(10)]
        await asyncio.to_thread(service.replica._follow)
        versions = await asyncio.gather(*under_way)
        assert set(versions) <= {registry.version(1).name, registry.version(2).name}
        assert await ask(2) == registry.version(2).name
        assert old.closed
        assert (await client.get("/health")).json()["policy_version"] == registry.version(2).name
        text = (await client.get("/metrics")).text
        assert metric(text, f'windlass_serve_version{{version="{registry.version(2).name}"}}') == 1
        assert registry.version(1).name not in "".join(
            line for line in text.splitlines() if line.startswith("windlass_serve_version{")
        )
        # A version whose files are not those that were written does not get to answer.
        weights = registry.version(1).path / "model.safetensors"
        content = weights.read_bytes()
        registry.promote(1, at=3.0, why="test")
        try:
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            for _ in range(2):
                await asyncio.to_thread(service.replica._follow)
        finally:
            weights.write_bytes(content)
        assert await ask(3) == registry.version(2).name
        text = (await client.get("/metrics")).text
        assert metric(text, 'windlass_serve_switches_total{outcome="failed"}') == 1

    service.talk(conversation)
    assert "not as it was written" in capsys.readouterr().out
    assert {row["policy_version"] for row in service.rows()} >= {registry.version(2).name}


def test_draining_answers_what_is_under_way(start: Callable[..., Service]) -> None:
    service = start()

    async def conversation(client: httpx.AsyncClient) -> None:
        under_way = [
            asyncio.ensure_future(client.post("/recommend", json={"user": user, "history": []})) for user in range(6)
        ]
        await asyncio.sleep(0.02)
        told = await service.replica.drain()
        answers = await asyncio.gather(*under_way)
        answered = [one for one in answers if one.status_code == 200]
        assert told["open_requests"] == len(answered)
        assert all(one.json()["error"]["reason"] == "draining" for one in answers if one.status_code != 200)
        late = await client.post("/recommend", json={"user": 1, "history": []})
        assert late.json()["error"]["reason"] == "draining"
        assert (await client.get("/health")).status_code == 503

    service.talk(conversation)


def test_two_processes_do_not_write_one_log(start: Callable[..., Service]) -> None:
    first = start()
    with pytest.raises(RequestError, match="is being changed by process"):
        start()

    async def nothing(client: httpx.AsyncClient) -> None:
        return None

    first.talk(nothing)
    start().talk(nothing)


class Copying:
    """In place of training: the parent's files and the ids that were trained on."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def lacks(self, rows: int, responses: int) -> str:
        return ""

    def checks(self, model: Path, versions: Sequence[Path]) -> FeedbackChecks:
        return FeedbackChecks(n_items=self._catalogue.n_items, catalogues=frozenset({self._catalogue.digest}))

    def update(self, task: Update) -> Path:
        log = read_feedback(task.feedback, self.checks(task.parent, ()))
        shutil.copytree(task.parent, task.work / "model")
        (task.work / "model" / "trained.txt").write_text("\n".join(log.table["request_id"].to_pylist()))
        return task.work / "model"

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Sequence[tuple[str, float]]
    ) -> dict[tuple[str, float], Evidence]:
        mean = float(read_feedback(held_out, self.checks(parent, ())).anchors().response_N.mean())
        exact, none = Range(value=mean, low=mean, high=mean), Range(value=0, low=0, high=0)
        return {
            asked: Evidence(candidate=exact, parent=exact, difference=none, confidence=asked[1], n=1)
            for asked in wanted
        }

    def describe(self) -> dict[str, Any]:
        return {}


def test_the_log_is_what_continual_takes(start: Callable[..., Service], tmp_path: Path) -> None:
    """Served three days ago, closed now, and read by a real cycle with a stand-in for training."""
    service = start()
    # A request a second, because the last ones by time are held out.
    seconds = itertools.count(int(time.time()) // DAY * DAY - 3 * DAY)
    service.replica._log._clock = lambda: float(next(seconds))

    async def conversation(client: httpx.AsyncClient) -> list[str]:
        asked = [{"user": user, "history": [user], "k": 1 + user % 2} for user in range(40)]
        answers = [one.json() for one in await asyncio.gather(*(client.post("/recommend", json=a) for a in asked))]
        liked = [{"request_id": one["request_id"], "item": one["items"][0]} for one in answers]
        joined = (await client.post("/feedback", json={"responses": liked})).json()
        assert joined["counts"]["joined"] == 40
        return [one["request_id"] for one in answers]

    request_ids = service.talk(conversation)
    (day,) = ExposureLog(service.log, window_s=DAY, clock=time.time).close_days()
    registry = Registry(tmp_path / "registry", create=True)
    begin_registry(registry, service.registry.version(1).path, at=0.0)
    catalogue = Catalogue.load(registry.version(1).path / CATALOGUE)
    guard = GuardSettings(conditions=(Condition(metric="response", limit=0.3, tolerance=0.1),))
    settings = ServiceSettings(guard=guard)
    cycle = Cycle(LogFolder(str(service.log)), registry, Copying(catalogue), settings, clock=time.time, files=Files())
    (result,) = cycle.run()
    assert (result.day, result.decision) == (day, Decision.PROMOTED), result
    assert result.counts["train"] + result.counts["held_out"] == result.counts["rows"] == 40
    current = registry.current()
    assert current is not None
    trained = (current.path / "trained.txt").read_text().split()
    assert len(trained) == result.counts["train"]
    assert set(trained) < set(request_ids)
