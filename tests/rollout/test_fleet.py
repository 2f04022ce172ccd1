"""The fleet answers as one engine would, whatever shard went where, and no failure leaves it waiting.

Two real vLLM engines and two reference engines in Ray actors. Checked: equal bits with an engine of this process, order
of the answer, samples across engines, violations counted, the engine's own error, a dead and a silent engine whose
shards go to another one with the same bits, engines brought back, joining and leaving, asleep until a push, room,
refused settings. Not here: the order in which calls are handed out (test_dispatch.py), pushes (test_channel.py), the
states of an engine (test_fleet_health.py), a run that loses engines (launch/test_kill.py).
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.records import Decode, DecodeSpec, Groups
from rollout.channel import ChannelSettings, WeightChannel
from rollout.engine import Engine
from rollout.engine_calls import EngineFailure
from rollout.fleet import RolloutFleet
from rollout.fleet_health import EngineState, LossReason
from rollout.peers import LocalPeer, RayPeer
from rollout.placement import Placement
from rollout.probe import item_probe
from rollout.sending import ModuleSource
from rollout.settings import EngineKind, RolloutSettings
from rollout.violations import Violation, ViolationCounter
from tests.requirements import require
from tests.tiny_model import random_prompts

BEAM = DecodeSpec(decode=Decode.BEAM, width=8)


def same_bits(one: Groups, other: Groups) -> bool:
    fields = ("prompt_id_P", "token_PGT", "length_PG", "item_PG", "valid_PG", "logp_PGT")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A Ray instance of this module's own."""
    require("ray")
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=200 * 2**20,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def vllm_fleet(
    ray_here: Any, hf_dir: Path, catalogue: Catalogue, vllm_settings: RolloutSettings
) -> Iterator[RolloutFleet]:
    require("vllm")
    fleet = RolloutFleet.start(vllm_settings.model_copy(update={"engines": 2, "shard_size": 4}), hf_dir, catalogue)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def small_fleet(ray_here: Any, hf_dir: Path, catalogue: Catalogue) -> Iterator[RolloutFleet]:
    """Reference engines, which are up quickly."""
    settings = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32", engines=2, shard_size=2, deadline_s=60)
    fleet = RolloutFleet.start(settings, hf_dir, catalogue)
    yield fleet
    fleet.close()


def test_the_answer_does_not_depend_on_the_engines(
    vllm_fleet: RolloutFleet, vllm_engine: Engine, catalogue: Catalogue
) -> None:
    prompts = random_prompts(catalogue, [5, 40, 31, 32, 33, 64, 70, 8, 12, 90, 21, 22, 23, 24], excluded=3)
    # Exclusions in one shard only: the constraint must be the same for all shards.
    prompts = [
        dataclasses.replace(p, exclusions=p.exclusions if p.prompt_id < 3 else p.exclusions[:0]) for p in prompts
    ]
    before = dict(vllm_fleet.shards)
    for decode in (Decode.BEAM, Decode.SAMPLE):
        spec = dataclasses.replace(BEAM, decode=decode, seed=4)
        groups = vllm_fleet.generate(prompts, spec)
        assert same_bits(groups, vllm_engine.generate(prompts, spec))
        assert groups.constraint == "item_trie-exclusions"
        assert set(groups.engine_id_P.tolist()) == {"vllm-0", "vllm-1"}
    assert vllm_fleet.shards.total() - sum(before.values()) == 8
    assert vllm_fleet.violations == {reason: 0 for reason in Violation}
    assert vllm_fleet.describe()["count"] == 2
    texts = [prompt.token_ids for prompt in prompts]
    for one, other in zip(vllm_fleet.score(texts, texts), vllm_engine.score(texts, texts), strict=True):
        assert np.array_equal(one, other)


def test_samples_of_two_engines_are_one_distribution(vllm_fleet: RolloutFleet, catalogue: Catalogue) -> None:
    (prompt,) = random_prompts(catalogue, [40], seed=3)
    prompts = [dataclasses.replace(prompt, prompt_id=row) for row in range(64)]
    groups = vllm_fleet.generate(prompts, DecodeSpec(decode=Decode.SAMPLE, width=32, seed=1))
    by_engine = [
        np.bincount(groups.item_PG[groups.engine_id_P == name].ravel(), minlength=catalogue.n_items)
        for name in ("vllm-0", "vllm-1")
    ]
    table = np.stack(by_engine)
    assert table.sum(1).min() > 0
    assert stats.chi2_contingency(table[:, table.sum(0) >= 16]).pvalue > 1e-3


def test_failures_come_up_as_themselves(small_fleet: RolloutFleet, catalogue: Catalogue, ray_here: Any) -> None:
    prompts = random_prompts(catalogue, [10] * 6)
    whole = small_fleet.generate(prompts, BEAM)
    too_long = dataclasses.replace(prompts[3], token_ids=np.full(600, 5, np.int32))
    with pytest.raises(RequestError, match="prompt 3: 600 tokens"):
        small_fleet.generate([*prompts[:3], too_long], BEAM)
    with pytest.raises(RequestError, match="prompts: none"):
        small_fleet.generate([], BEAM)

    # An error that is nobody's request, in the engine's words.
    unreadable = dataclasses.replace(prompts[0], scored_items=("no item",))  # type: ignore[arg-type]
    with pytest.raises(EngineFailure, match=r"reference-\d: shard 0: \w+Error: .+"):
        small_fleet.generate([unreadable], BEAM)
    # Two engines raised it, so it was the shard: both are asked again.
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)
    assert small_fleet.health.counts()[EngineState.HEALTHY] == 2


def test_the_shards_of_a_dead_engine_go_to_another(
    small_fleet: RolloutFleet, catalogue: Catalogue, ray_here: Any
) -> None:
    prompts = random_prompts(catalogue, [10] * 8)
    whole = small_fleet.generate(prompts, BEAM)
    told: list[str] = []
    small_fleet.on_loss = lambda failure: told.append(str(failure))
    small_fleet.losses.clear()
    ray_here.kill(small_fleet.engines["reference-1"])
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)
    assert set(small_fleet.generate(prompts, BEAM).engine_id_P.tolist()) == {"reference-0"}
    assert small_fleet.losses == {LossReason.DIED: 1}
    assert len(told) == 1
    assert told[0].startswith("reference-1: died")
    small_fleet.on_loss = None

    # The other one as well: nobody is left, unless somebody brings them back.
    ray_here.kill(small_fleet.engines["reference-0"])
    with pytest.raises(EngineFailure, match="reference-0: died"):
        small_fleet.generate(prompts, BEAM)
    with pytest.raises(RunError, match="no engine holds verified weights"):
        small_fleet.generate(prompts, BEAM)
    for engine_id in ("reference-0", "reference-1"):
        small_fleet.restart(engine_id)
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)


@pytest.fixture
def channel(small_fleet: RolloutFleet, hf_dir: Path, catalogue: Catalogue) -> Iterator[WeightChannel]:
    """To the small fleet, from its own initial weights."""
    from transformers import AutoModelForCausalLM

    source = ModuleSource(AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval())
    yield WeightChannel(
        settings=ChannelSettings(),
        source=LocalPeer("learner", source),
        engines={name: RayPeer(name, [actor]) for name, actor in small_fleet.engines.items()},
        probe=item_probe([catalogue.tokens(item) for item in range(8)], bos=catalogue.vocabulary.bos),
        dtype="float32",
    )
    source.close()


def test_engines_are_brought_back_within_a_request(
    small_fleet: RolloutFleet, channel: WeightChannel, catalogue: Catalogue, ray_here: Any, tmp_path: Path
) -> None:
    """Without the learner: out of what the last push left behind."""
    prompts = random_prompts(catalogue, [10] * 8)
    whole = small_fleet.generate(prompts, BEAM)
    channel.keep = tmp_path
    channel.push(0)
    small_fleet.verified(small_fleet.incarnations(), 0)
    channel.source = LocalPeer("learner", None)

    def bring() -> None:
        small_fleet.take_in()
        for name in small_fleet.health.named(EngineState.STALE):
            channel.bring(name, RayPeer(name, [small_fleet.engines[name]]))
            small_fleet.joined(name, 0)

    def rejoin(failure: EngineFailure) -> None:
        for engine_id in small_fleet.health.named(EngineState.DEAD):
            small_fleet.relaunch(engine_id)
        assert small_fleet.recover() == []
        bring()

    small_fleet.rejoin, small_fleet.bring = rejoin, bring
    for engine_id in ("reference-0", "reference-1"):
        ray_here.kill(small_fleet.engines[engine_id])
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)
    # Whoever came up later is verified before a request.
    before = time.monotonic()
    while small_fleet.joining:
        assert same_bits(small_fleet.generate(prompts, BEAM), whole)
        assert time.monotonic() - before < 100
    assert small_fleet.health.named(EngineState.HEALTHY) == ["reference-0", "reference-1"]
    small_fleet.rejoin = small_fleet.bring = None

    # Once there are pushes, a process that has only just come up is not asked.
    small_fleet.restart("reference-1")
    assert small_fleet.health.named(EngineState.STALE) == ["reference-1"]
    assert set(small_fleet.generate(prompts, BEAM).engine_id_P.tolist()) == {"reference-0"}
    small_fleet.verified(small_fleet.incarnations(), 0)


def test_the_shards_of_a_silent_engine_go_to_another(
    small_fleet: RolloutFleet, catalogue: Catalogue, ray_here: Any
) -> None:
    # Six shards: the silent engine has one ahead, which goes to the other one as well.
    prompts = random_prompts(catalogue, [10] * 12)
    whole = small_fleet.generate(prompts, BEAM)
    patience = small_fleet.settings
    pid = ray_here.get(small_fleet.engines["reference-0"].__ray_call__.remote(lambda engine: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        small_fleet.settings = patience.model_copy(update={"deadline_s": 4.0})
        assert same_bits(small_fleet.generate(prompts, BEAM), whole)
        assert small_fleet.health.named(EngineState.SUSPECT) == ["reference-0"]
    finally:
        os.kill(pid, signal.SIGCONT)
        small_fleet.settings = patience
    assert small_fleet.recover() == []
    assert small_fleet.health.named(EngineState.STALE) == ["reference-0"]
    small_fleet.verified(small_fleet.incarnations(), 0)
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)
    assert set(small_fleet.generate(prompts, BEAM).engine_id_P.tolist()) == {"reference-0", "reference-1"}


def test_engines_join_and_leave(small_fleet: RolloutFleet, catalogue: Catalogue, ray_here: Any) -> None:
    prompts = random_prompts(catalogue, [10] * 8)
    whole = small_fleet.generate(prompts, BEAM)
    name = small_fleet.add()
    assert name == "reference-2"
    assert set(small_fleet.generate(prompts, BEAM).engine_id_P.tolist()) == {"reference-0", "reference-1"}
    before = time.monotonic()
    while small_fleet.joining:
        assert small_fleet.recover() == []
        assert time.monotonic() - before < 100
    assert small_fleet.health.named(EngineState.STALE) == [name]
    assert name not in small_fleet.generate(prompts, BEAM).engine_id_P.tolist(), "up is not verified"
    small_fleet.verified(small_fleet.incarnations(), 0)
    small_fleet.remove("reference-0")
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)
    assert set(small_fleet.generate(prompts, BEAM).engine_id_P.tolist()) == {"reference-1", name}

    # One that dies before it is up is known to be dead, and can be taken out.
    late = small_fleet.add()
    ray_here.kill(small_fleet.engines[late])
    before = time.monotonic()
    while late in small_fleet.joining:
        small_fleet.recover()
        assert time.monotonic() - before < 100
    assert small_fleet.recover() == [late]
    small_fleet.remove(late)
    assert small_fleet.health.named(EngineState.HEALTHY) == ["reference-1", name]


def test_a_fleet_that_sleeps_is_asked_after_the_next_push(
    small_fleet: RolloutFleet, channel: WeightChannel, catalogue: Catalogue, ray_here: Any
) -> None:
    prompts = random_prompts(catalogue, [10] * 8)
    whole = small_fleet.generate(prompts, BEAM)
    lost = small_fleet.losses.copy()
    assert small_fleet.sleep() > 0
    assert small_fleet.sleep() == 0, "it sleeps"
    assert small_fleet.health.named(EngineState.HEALTHY) == []
    assert small_fleet.losses == lost, "falling asleep is no loss"
    with pytest.raises(RunError, match="asleep until the next push: the learners have their memory"):
        small_fleet.generate(prompts, BEAM)
    assert channel.push(0).seconds["wake"] > 0
    small_fleet.verified(small_fleet.incarnations(), 0)
    assert same_bits(small_fleet.generate(prompts, BEAM), whole)


class LateFleet(RolloutFleet):
    """The fleet over actors that only come up, after a while; for the times of recovery, not for what engines do."""

    delay_s = 0.0

    def _launch(self, engine_id: str) -> Any:
        import ray

        # Defined here, so that its process imports nothing of ours.
        class Late:
            def __init__(self, delay_s: float) -> None:
                time.sleep(delay_s)

            def describe(self) -> None:
                return None

            def fall_asleep(self) -> None:
                time.sleep(60)

        self.health.launched(engine_id, time.monotonic())
        return ray.remote(Late).options(num_cpus=0, max_restarts=0).remote(self.delay_s)

    def healthy(self) -> list[str]:
        return self.health.named(EngineState.HEALTHY)


def test_nobody_waits_for_who_comes_up_while_others_are(ray_here: Any, catalogue: Catalogue) -> None:
    patient = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32", engines=2, start_deadline_s=60)
    fleet = LateFleet(patient, Path(), {}, ViolationCounter(catalogue), Placement())
    for _ in range(2):
        name = fleet._next_name()
        fleet.engines[name] = fleet._launch(name)
    fleet._await_start(list(fleet.engines))
    fleet.verified(fleet.incarnations(), 1)
    assert fleet.healthy() == ["reference-0", "reference-1"]

    fleet.delay_s = 4.0
    fleet.relaunch("reference-1")
    before = time.monotonic()
    assert fleet.recover() == []
    assert time.monotonic() - before < 3.0
    assert fleet.healthy() == ["reference-0"]
    assert list(fleet.joining) == ["reference-1"]

    # Nobody is left: the first one that is up ends the wait.
    fleet.delay_s = 0.0
    fleet.relaunch("reference-0")
    assert fleet.recover() == []
    assert fleet.health.named(EngineState.STALE)

    # One that does not come up is dead at its deadline; with nobody else, that is waited for.
    fleet.health.start_deadline_s, fleet.delay_s = 1.0, 60.0
    for name in ("reference-0", "reference-1"):
        fleet.relaunch(name)
    before = time.monotonic()
    assert sorted(fleet.recover()) == ["reference-0", "reference-1"]
    assert time.monotonic() - before < 30.0
    assert {engine.reason for engine in fleet.health.engines.values()} == {LossReason.NOT_UP}
    assert fleet.losses[LossReason.NOT_UP] == 2
    fleet.close()


def ends_within(actor: Any, seconds: float) -> bool:
    """Whether a killed actor is gone by then: Ray does not wait for it, and until then it may answer."""
    import ray

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            ray.get(actor.describe.remote(), timeout=seconds)
        except ray.exceptions.RayActorError:
            return True
        time.sleep(0.05)
    return False


def test_who_does_not_fall_asleep_gives_its_card_back_all_the_same(ray_here: Any, catalogue: Catalogue) -> None:
    """One that fell silent in a request, and one that falls silent now."""
    settings = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32", engines=2, deadline_s=1.0)
    fleet = LateFleet(settings, Path(), {}, ViolationCounter(catalogue), Placement())
    for _ in range(2):
        name = fleet._next_name()
        fleet.engines[name] = fleet._launch(name)
    fleet._await_start(list(fleet.engines))
    fleet._blame(EngineFailure("reference-0", "no answer", LossReason.SILENT))
    actors = list(fleet.engines.values())
    assert fleet.sleep() < 30
    assert fleet.health.named(EngineState.DEAD) == ["reference-0", "reference-1"]
    assert fleet.losses == {LossReason.SILENT: 2}
    for actor in actors:
        assert ends_within(actor, 30), "it may still compute"
    assert fleet.recover() == ["reference-0", "reference-1"], "launched again, or gone, before the next push"
    fleet.close()


def test_room_is_reserved_within_a_deadline_and_given_back(ray_here: Any) -> None:
    free = ray_here.available_resources()["CPU"]
    placement = Placement(deadline_s=20.0)
    group = placement.reserve("mine", [placement.bundle(cpus=free, gpus=0)])
    assert placement.reserve("mine", []) is group, "a place is kept for who comes again"
    with pytest.raises(RunError, match=r"more: no room for 1 x \(CPU 1\) within 0\.5 s; free in the whole cluster: "):
        Placement(deadline_s=0.5).reserve("more", [{"CPU": 1.0}])
    with pytest.raises(RunError, match="no room"):
        Placement(node="far", deadline_s=0.5).reserve("other", [{"far": 0.001}])
    placement.release()
    Placement(deadline_s=20.0).reserve("more", [{"CPU": free}])


def test_every_pair_has_one_engine_and_a_place_that_is_left_is_taken_again() -> None:
    pairs = Placement(shared=SimpleNamespace(bundle_count=2))
    assert [pairs.bundle_of(name) for name in ("e-0", "e-1", "e-0")] == [0, 1, 0]
    with pytest.raises(RunError, match="e-2: no room beside a learner rank, colocated"):
        pairs.bundle_of("e-2")
    pairs.release("e-0")
    assert pairs.bundle_of("e-2") == 0
    assert Placement().bundle_of("e-7") == 0, "a group of its own has one bundle"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"engines": 99}, r"rollout\.engines: 99; legal: at most 8"),
        ({"gpus": 1.0}, r"rollout\.gpus: 1\.0"),
        ({"engine": EngineKind.VLLM, "block_size": 48}, r"rollout\.block_size: 48; legal: a multiple of 32"),
        ({"max_model_len": 9999}, r"rollout\.max_model_len: 9999; legal: at most 512"),
    ],
)
def test_settings_that_cannot_be_met(
    ray_here: Any, hf_dir: Path, catalogue: Catalogue, change: dict[str, Any], match: str
) -> None:
    settings = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32").model_copy(update=change)
    with pytest.raises(RequestError, match=match):
        RolloutFleet.start(settings, hf_dir, catalogue)
