"""Contract: an engine that comes later takes what the push left behind, with the checks of a push and without the
learner; what a push left is forgotten with the next one, or when it is gone; a push that fails, or finds the disk full,
leaves nothing.

Real engines: vLLM in this process, and the reference engine. Not covered: engines in Ray actors (test_fleet), GPUs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.records import Decode, DecodeSpec
from rollout.engine import Engine
from rollout.kept_push import KeptWriter
from rollout.movers import MoverError
from rollout.peers import LocalPeer
from rollout.probe import check_gap
from rollout.push_failures import PushError, PushFailure
from rollout.receiving import IN_TRANSIT, PushFault
from tests.rollout.push_rig import FLOAT32, Rig, disturb, reference
from tests.tiny_model import random_prompts


@pytest.fixture
def kept(hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path) -> Rig:
    """A rig whose push of version 5 was kept, and whose learner went on since then and answers nobody."""
    one = rig({"first": reference(hf_dir)})
    one.channel.keep = tmp_path
    for version in (4, 5):
        disturb(one.model, version)
        one.channel.push(version)
    disturb(one.model, 6)
    one.channel.source = LocalPeer("learner", None)
    return one


def test_an_engine_that_comes_later_takes_what_the_push_left(
    engine: Engine,
    kept: Rig,
    restored: Callable[[Engine], Engine],
    catalogue: Catalogue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [path.name for path in tmp_path.iterdir()] == ["version-000005.buckets"]
    asked: list[str] = []
    first = kept.channel.engines["first"]
    monkeypatch.setattr(first, "submit", lambda method, *_: asked.append(method))
    kept.channel.bring("late", LocalPeer("late", restored(engine)))
    assert asked == [], "who is at work is left alone"
    assert engine.weight_version == 5
    prompts, spec = random_prompts(catalogue, [9, 14], seed=3), DecodeSpec(decode=Decode.BEAM, width=4)
    theirs, ours = kept.engines["first"].generate(prompts, spec), engine.generate(prompts, spec)
    assert np.array_equal(ours.token_PGT, theirs.token_PGT)
    np.testing.assert_allclose(ours.logp_PGT, theirs.logp_PGT, atol=1e-5)
    # The next push finds it, on a new connection.
    monkeypatch.undo()
    kept.channel.source = LocalPeer("learner", kept.source)
    kept.channel.push(6)
    assert [path.name for path in tmp_path.iterdir()] == ["version-000006.buckets"]
    for one in (engine, kept.engines["first"]):
        assert one.weight_version == 6
        check_gap(kept.gap(one), FLOAT32, "after the push")


def test_what_was_kept_is_checked_like_a_push(kept: Rig, hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path) -> None:
    path = tmp_path / "version-000005.buckets"
    whole = path.read_bytes()

    def refused(content: bytes) -> PushError:
        path.write_bytes(content)
        late = reference(hf_dir)
        with pytest.raises(PushError) as caught:
            kept.channel.bring("late", LocalPeer("late", late))
        assert late.weight_version == IN_TRANSIT
        return caught.value

    damaged = refused(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert damaged.blames["late"].reason is PushFailure.CHECKSUM
    assert damaged.alarm
    short = refused(whole[:-1])
    assert "ends after" in str(short)
    assert not short.alarm
    # Another push of this version: every bucket is sound, and none is what the learner sent.
    other = rig({"engine": reference(hf_dir)})
    (tmp_path / "other").mkdir()
    other.channel.keep = tmp_path / "other"
    other.channel.push(5)
    assert "with other checksums" in str(refused((tmp_path / "other" / path.name).read_bytes()))
    # Weights that are not those that the learner answered the probe with.
    path.write_bytes(whole)
    assert kept.channel.kept is not None
    answer = kept.channel.kept.answer
    wrong = dataclasses.replace(answer, logp=tuple(logp + 0.1 for logp in answer.logp))
    kept.channel.kept = dataclasses.replace(kept.channel.kept, answer=wrong)
    assert refused(whole).blames["late"].reason is PushFailure.PROBE


def test_a_kept_file_that_is_gone_is_forgotten(kept: Rig, tmp_path: Path) -> None:
    path = tmp_path / "version-000005.buckets"
    assert kept.channel.lost_kept() == ""
    path.unlink()
    assert kept.channel.lost_kept() == str(path)
    assert kept.channel.kept is None
    assert kept.channel.lost_kept() == ""
    # The next push keeps anew.
    kept.channel.source = LocalPeer("learner", kept.source)
    kept.channel.push(6)
    assert kept.channel.kept is not None


def test_a_push_that_fails_leaves_nothing_behind(hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path) -> None:
    one = rig({"engine": reference(hf_dir)}, test_fault=PushFault.FAIL_HALF_WAY)
    one.channel.keep = tmp_path
    with pytest.raises(PushError):
        one.channel.push(1)
    assert list(tmp_path.iterdir()) == []
    assert one.channel.kept is None
    again = rig({"engine": reference(hf_dir)})
    again.channel.keep = tmp_path / "absent"
    with pytest.raises(PushError, match=r"learner \(error\): MoverError: .* so the push cannot be kept"):
        again.channel.push(1)


@pytest.mark.parametrize("bucket_mib", [0.001, 0.03], ids=["buffered", "written"])
def test_a_full_disk_is_named_and_the_engines_are_told_at_once(
    bucket_mib: float, hf_dir: Path, rig: Callable[..., Rig], tmp_path: Path
) -> None:
    engine = reference(hf_dir)
    one = rig({"engine": engine}, bucket_mib=bucket_mib)
    one.channel.keep = tmp_path
    # What is left of small writes in the file's buffer is refused once more when it is closed.
    (tmp_path / "version-000001.part").symlink_to("/dev/full")
    begun = time.monotonic()
    with pytest.raises(PushError, match=r"learner \(error\): MoverError: .*\.part: No space left on device, so"):
        one.channel.push(1)
    assert time.monotonic() - begun < 8
    assert list(tmp_path.iterdir()) == []
    assert engine.weight_version == IN_TRANSIT


def test_a_disk_that_is_full_at_the_last_bytes_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "version.part").symlink_to("/dev/full")
    writer = KeptWriter(tmp_path / "version.buckets")
    writer.write(torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(MoverError, match="No space left on device"):
        writer.finish()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
