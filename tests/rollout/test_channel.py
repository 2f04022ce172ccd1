"""Contract: a push changes what the engine computes to what the learner computes, tied head included, and shows the
version only after both checks; every way of withholding or breaking a part raises, inside the deadline, and leaves the
engine without a version; a failed engine is replaced; an engine that slept wakes by a push.

Real engines: vLLM in this process, and the reference engine. Not covered: what a push leaves behind
(test_kept_push), engines in Ray actors (test_fleet), GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.errors import RunError
from data.records import Decode, DecodeSpec, FloatArray, IntArray
from rollout.buckets import Unpacker
from rollout.engine import Engine, build_engine
from rollout.movers import MoverKind
from rollout.peers import LocalPeer
from rollout.probe import check_gap
from rollout.push_failures import PushError, PushFailure
from rollout.receiving import IN_TRANSIT, ModuleInbox, PushFault, PushMessage, Receipt, ReceivingEngine
from rollout.settings import EngineKind, HeadRows, RolloutSettings
from tests.rollout.push_rig import FLOAT32, Rig, disturb, reference
from tests.tiny_model import random_prompts, tiny_catalogue, write_tiny_model


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("untied"), catalogue, tie=False)


def test_pushes_make_the_engine_compute_what_the_learner_computes(
    engine: Engine, rig: Callable[..., Rig], restored: Callable[[Engine], Engine]
) -> None:
    one = rig({"engine": restored(engine)})
    for version in (5, 6, 7):
        disturb(one.model, version)
        assert one.gap(engine).max > 0.05
        report = one.channel.push(version)
        assert engine.weight_version == version == one.channel.version
        check_gap(one.gap(engine), FLOAT32, "after the push")
        assert report.gap["engine"].max < 1e-4
        assert report.buckets > 4
        assert report.nbytes < 1.01 * sum(p.numel() * 4 for p in one.model.parameters()), "a tied tensor went twice"


def test_what_a_sharp_model_rounds_is_no_fault(
    vllm_engine: Engine, rig: Callable[..., Rig], restored: Callable[[Engine], Engine]
) -> None:
    """With logits as large as these a token differs by more than 1e-4 for no other reason than its rounding."""
    one = rig({"engine": restored(vllm_engine)})
    disturb(one.model, 1, by=10.0)
    report = one.channel.push(1)
    assert report.gap["engine"].max > FLOAT32.max
    noise = one.source.probe_noise(one.probe)
    assert (report.limit.mean, report.limit.max) == (2 * noise.mean, 2 * noise.max)
    wrong = rig({"engine": vllm_engine}, test_fault=PushFault.WITHHOLD_BUCKET, test_fault_version=2, test_blind=True)
    disturb(wrong.model, 1, by=10.0)
    disturb(wrong.model, 2)
    wrong.channel.push(2)
    assert not wrong.gap(vllm_engine).within(report.limit), "a withheld bucket is far above any rounding"


@pytest.mark.parametrize("mover", [MoverKind.SHARED_MEMORY, MoverKind.FILE, MoverKind.GLOO])
def test_every_mover_serves_two_engines(
    mover: MoverKind, hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path
) -> None:
    engines = {"a": reference(hf_dir), "b": reference(hf_dir)}
    one = rig(engines, mover=mover, folder=str(tmp_path))
    for version in (1, 2):
        disturb(one.model, version)
        one.channel.push(version)
        for engine in engines.values():
            assert engine.weight_version == version
            check_gap(one.gap(engine), FLOAT32, "after the push")


def test_the_rows_of_a_level_follow_a_push(
    vllm_engine: Any,
    rig: Callable[..., Rig],
    restored: Callable[[Engine], Engine],
    catalogue: Catalogue,
    hf_dir: Path,
    vllm_settings: RolloutSettings,
) -> None:
    """`rollout.head: level` multiplies rows of the head's own weight, past vLLM's layer."""
    one = rig({"engine": restored(vllm_engine)})
    prompts, spec = random_prompts(catalogue, [9, 14], seed=3), DecodeSpec(decode=Decode.BEAM, width=4)
    try:
        vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings.model_copy(update={"head": HeadRows.LEVEL}))
        before = vllm_engine.generate(prompts, spec)
        disturb(one.model, 9)
        one.channel.push(9)
        after = vllm_engine.generate(prompts, spec)
    finally:
        vllm_engine._rpc("windlass_open", str(hf_dir), vllm_settings)
    whole = vllm_engine.generate(prompts, spec)
    assert np.array_equal(after.token_PGT, whole.token_PGT)
    np.testing.assert_allclose(after.logp_PGT, whole.logp_PGT, atol=1e-5)
    assert not np.allclose(after.logp_PGT, before.logp_PGT, atol=1e-2)


def test_an_engine_that_slept_computes_as_before(
    engine: Any, rig: Callable[..., Rig], restored: Callable[[Engine], Engine], catalogue: Catalogue
) -> None:
    one = rig({"engine": restored(engine)})
    prompts, spec = random_prompts(catalogue, [9, 14, 9], seed=3), DecodeSpec(decode=Decode.BEAM, width=4)
    one.channel.push(1)
    before = engine.generate(prompts, spec)
    assert engine.fall_asleep() >= 0
    assert engine.weight_version == IN_TRANSIT
    for ask in (lambda: engine.generate(prompts, spec), lambda: one.gap(engine)):
        with pytest.raises(RunError, match="the engine is asleep: its memory belongs to the learners"):
            ask()
    report = one.channel.push(1)
    assert report.gap["engine"].max < 1e-4
    assert 0 < report.seconds["wake"] < report.seconds["transfer"]
    after = engine.generate(prompts, spec)
    for field in ("token_PGT", "item_PG", "logp_PGT", "weight_version_P"):
        assert np.array_equal(getattr(after, field), getattr(before, field))
    assert "wake" not in one.channel.push(2).seconds, "nobody slept"


@pytest.mark.parametrize("mover", [MoverKind.SHARED_MEMORY, MoverKind.FILE, MoverKind.GLOO])
def test_an_engine_that_cannot_wake_lets_nobody_wait(
    mover: MoverKind, hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tired: Any = reference(hf_dir)
    one = rig({"tired": tired, "other": reference(hf_dir)}, mover=mover, folder=str(tmp_path))
    tired.fall_asleep()

    def full(_: object) -> None:
        raise MemoryError("no room on the card")

    monkeypatch.setattr(tired, "_take_memory", full)
    with pytest.raises(PushError) as caught:
        one.channel.push(1)
    blames = caught.value.blames
    assert (blames["tired"].reason, blames["tired"].text) == (PushFailure.ERROR, "MemoryError: no room on the card")
    told = {name: blames[name].text for name in ("learner", "other")}
    assert {blames[name].reason for name in told} == {PushFailure.HALF_WAY}
    assert "no room on the card" in told["learner"], "told by the engine, not found out at the deadline"
    # Whichever it hears first: the engine, or the sender, which heard it and closed.
    assert "no room on the card" in told["other"] or told["other"] == "PeerError: the sender closed the connection"
    assert tired.weight_version == IN_TRANSIT


def test_vllm_sleeps_past_the_beam_loops_memory_and_wakes_around_the_push(
    vllm_engine: Any, rig: Callable[..., Rig], restored: Callable[[Engine], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but what vLLM's worker does in `sleep` and `wake_up`, which on CPU is nothing."""
    one = rig({"engine": restored(vllm_engine)})
    worker = vllm_engine._llm.collective_rpc(lambda worker: worker)[0]
    core = vllm_engine._llm.llm_engine.engine_core.engine_core
    notes: list[str] = []
    for owner, name in ((worker, "sleep"), (worker, "wake_up"), (worker, "receive_push")):
        original = getattr(owner, name)

        def noted(*arguments: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            told = {"sleep": f" {named.get('level')}", "wake_up": f" {named.get('tags')}"}.get(_name, "")
            room = "" if worker.windlass_backend._caches or worker.windlass_backend._store._key else " empty"
            notes.append(_name + told + (room if _name == "sleep" else ""))
            return _original(*arguments, **named)

        monkeypatch.setattr(owner, name, noted)
    vllm_engine.fall_asleep()
    assert core.is_sleeping()
    one.channel.push(1)
    assert notes == ["sleep 2 empty", "wake_up ['weights']", "receive_push", "wake_up ['kv_cache']"]
    assert not core.is_sleeping(), "vLLM takes requests again"


def test_an_untied_head_travels_too(untied_dir: Path, rig: Callable[..., Rig]) -> None:
    engine = reference(untied_dir)
    one = rig({"engine": engine}, untied_dir)
    disturb(one.model, 1)
    one.channel.push(1)
    check_gap(one.gap(engine), FLOAT32, "after the push")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (PushFault.WITHHOLD_PUSH, PushFailure.CHECKSUM),
        (PushFault.WITHHOLD_BUCKET, PushFailure.CHECKSUM),
        (PushFault.CORRUPT_BUCKET, PushFailure.CHECKSUM),
        (PushFault.WITHHOLD_HEAD, PushFailure.PROBE),
        (PushFault.FAIL_HALF_WAY, PushFailure.ERROR),
        (PushFault.STALL, PushFailure.TIMEOUT),
    ],
)
def test_each_fault_is_noticed_and_nothing_becomes_visible(
    fault: PushFault, reason: PushFailure, hf_dir: Path, untied_dir: Path, rig: Callable[..., Rig]
) -> None:
    # The reference engine has its tied head updated by the embedding: withholding the head alone needs an untied one.
    folder = untied_dir if fault is PushFault.WITHHOLD_HEAD else hf_dir
    engine = reference(folder)
    one = rig({"engine": engine}, folder, test_fault=fault, test_fault_version=2, deadline_s=3.0)
    disturb(one.model, 1)
    one.channel.push(1)
    disturb(one.model, 2)
    begun = time.monotonic()
    with pytest.raises(PushError) as caught:
        one.channel.push(2)
    assert time.monotonic() - begun < 6
    assert caught.value.blames["engine"].reason is reason
    assert caught.value.alarm == (reason in (PushFailure.CHECKSUM, PushFailure.PROBE))
    assert "engine" in one.channel.failed
    assert one.channel.version == 1
    assert engine.weight_version != 2
    if fault is not PushFault.WITHHOLD_PUSH:
        assert engine.weight_version == IN_TRANSIT
    with pytest.raises(PushError, match="engine"):
        one.channel.push(3)


@pytest.mark.parametrize(
    "fault", [PushFault.WITHHOLD_HEAD, PushFault.WITHHOLD_PUSH, PushFault.WITHHOLD_BUCKET, PushFault.CORRUPT_BUCKET]
)
def test_vllm_faults_are_noticed(
    fault: PushFault, vllm_engine: Engine, rig: Callable[..., Rig], restored: Callable[[Engine], Engine]
) -> None:
    """The tied head of vLLM is the trap: everything but the probe is content with it."""
    one = rig({"engine": restored(vllm_engine)}, test_fault=fault, test_fault_version=2)
    disturb(one.model, 1)
    one.channel.push(1)
    disturb(one.model, 2)
    with pytest.raises(PushError) as caught:
        one.channel.push(2)
    assert vllm_engine.weight_version in (1, IN_TRANSIT)
    expected = PushFailure.PROBE if fault is PushFault.WITHHOLD_HEAD else PushFailure.CHECKSUM
    assert caught.value.blames["engine"].reason is expected
    assert one.channel.version == 1


@pytest.mark.parametrize("lost", ["layers.0.self_attn.k_proj.weight", "layers.1.mlp.up_proj.weight"])
def test_vllm_takes_a_push_after_one_that_failed_inside_a_layer(
    lost: str,
    vllm_engine: Engine,
    rig: Callable[..., Rig],
    restored: Callable[[Engine], Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM joins q, k, v and gate, up into one parameter each: the failure leaves such a one half filled."""
    original = Unpacker.feed

    def feed(self: Unpacker, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        done = original(self, buffer)
        if any(name.endswith(lost) for name, _ in done):
            raise MemoryError("no room")
        return done

    one = rig({"engine": restored(vllm_engine)}, bucket_mib=0.004)
    disturb(one.model, 1)
    monkeypatch.setattr(Unpacker, "feed", feed)
    with pytest.raises(PushError, match="no room"):
        one.channel.push(1)
    monkeypatch.undo()
    again = rig({"engine": vllm_engine})
    disturb(again.model, 2)
    assert again.channel.push(2).gap["engine"].max < 1e-4


@pytest.mark.parametrize("fault", [PushFault.WITHHOLD_PUSH, PushFault.WITHHOLD_BUCKET, PushFault.WITHHOLD_HEAD])
def test_without_checks_the_gap_notices(
    fault: PushFault, untied_dir: Path, rig: Callable[..., Rig], catalogue: Catalogue
) -> None:
    engine = reference(untied_dir)
    one = rig({"engine": engine}, untied_dir, test_fault=fault, test_blind=True)
    disturb(one.model, 1)
    one.channel.push(1)
    assert engine.weight_version == 1
    with pytest.raises(RunError, match="differ"):
        check_gap(one.gap(engine), FLOAT32, "policy gap")


def test_an_engine_in_transit_does_not_generate(hf_dir: Path, catalogue: Catalogue, rig: Callable[..., Rig]) -> None:
    engine = reference(hf_dir)
    one = rig({"engine": engine}, test_fault=PushFault.FAIL_HALF_WAY)
    with pytest.raises(PushError):
        one.channel.push(1)
    with pytest.raises(RunError, match="in transit"):
        engine.generate(random_prompts(catalogue, [8]), DecodeSpec(decode="beam", width=2))
    with pytest.raises(RunError, match="loaded is none"):
        engine.publish_weights(1)


class FailsOnce(ReceivingEngine):
    """An engine whose first instance dies half way; scores like its module."""

    def __init__(self, engine: Engine, fails: bool) -> None:
        self.weight_version = 0
        self._engine: Any = engine
        self._fails = fails
        self._inbox = ModuleInbox(self._engine.model)

    def _take_push(self, message: PushMessage, rank: int) -> Receipt:
        if self._fails:
            raise MemoryError("no room for layer 1")
        return self._inbox.receive(message, rank=rank)

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        scores: list[FloatArray] = self._engine.score(prompts, completions)
        return scores


def test_a_failed_engine_is_replaced_and_the_push_repeated(hf_dir: Path, rig: Callable[..., Rig]) -> None:
    started: list[str] = []

    def replace(name: str) -> LocalPeer:
        started.append(name)
        return LocalPeer(name, FailsOnce(reference(hf_dir), fails=False))

    engines = {"good": FailsOnce(reference(hf_dir), False), "bad": FailsOnce(reference(hf_dir), True)}
    one = rig(engines, deadline_s=8.0)
    one.channel.replace = replace
    disturb(one.model, 1)
    report = one.channel.push(1)
    assert "bad" in started
    assert set(report.replaced) == set(started)
    assert not one.channel.failed
    for peer in one.channel.engines.values():
        assert isinstance(peer, LocalPeer)
        assert peer.target.weight_version == 1
        check_gap(one.gap(peer.target), FLOAT32, "after the push")


def test_the_learners_error_comes_up(hf_dir: Path, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig({"engine": reference(hf_dir)}, deadline_s=10.0)

    def broken(*_: Any) -> Receipt:
        raise RuntimeError("gathering layer 5 failed")

    monkeypatch.setattr(one.source, "send_push", broken)
    begun = time.monotonic()
    with pytest.raises(PushError, match="gathering layer 5 failed"):
        one.channel.push(1)
    assert time.monotonic() - begun < 9


def test_a_silent_learner_is_an_error_at_the_deadline(
    hf_dir: Path, rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = rig({"engine": reference(hf_dir)}, deadline_s=1.0)
    monkeypatch.setattr(one.channel.source, "submit", lambda *_: Future())
    begun = time.monotonic()
    with pytest.raises(PushError, match="learner \\(timeout\\)"):
        one.channel.push(1)
    assert time.monotonic() - begun < 3


def test_bfloat16_stays_within_twice_the_noise(tmp_path: Path, rig: Callable[..., Rig]) -> None:
    folder = write_tiny_model(tmp_path, tiny_catalogue(), dtype="bfloat16")
    engine = build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="bfloat16"), folder)
    one = rig({"engine": engine}, folder, dtype="bfloat16")
    for version in (1, 2):
        disturb(one.model, version)
        report = one.channel.push(version)
        assert report.limit.mean > 1e-4
        assert report.gap["engine"].mean <= report.limit.mean
