"""Contract: exposures come with the probability they really had (checked against the exact policy by exhaustive beams,
and against frequencies); they depend on the seed and not on the batch; responses equal a plain loop over the future;
prompts rebuilt from the log are the ones that were served; the written log passes the reader's checks.

Not checked here: the log's own layout (tests/data/test_feedback.py). Real vLLM is, in the long test.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.feedback import write_feedback
from data.feedback_reading import FeedbackChecks, read_feedback
from data.prompts import PromptBuilder
from data.records import Decode, DecodeSpec, Groups
from launch.provenance import ROOT
from launch.serving.exposure import Serving
from launch.serving.served import serving_engines
from launch.simulate_command import SimulateCommand, policy_version
from launch.simulation import ServingSettings, Simulated, responses, simulate
from rollout.engine import Engine, build_engine
from rollout.settings import EngineKind, RolloutSettings
from tests.data.tiny import samples as make_samples
from tests.requirements import require
from tests.small_world import windlass, write_dataset
from tests.tiny_model import tiny_catalogue, write_tiny_model
from trainer.prompt_card import PromptCard

ITEMS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on shared cores: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return tiny_catalogue(items=ITEMS, levels=(3, 3, 3))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Engine:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), catalogue, hidden=32, layers=1)
    return build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder)


@pytest.fixture(scope="module")
def contexts() -> Samples:
    rng = np.random.default_rng(1)
    return make_samples([rng.integers(0, ITEMS, 5).tolist() for _ in range(16)], rng.integers(0, ITEMS, 16).tolist())


def run(engine: Engine, catalogue: Catalogue, contexts: Samples, batch: int = 7, **serving: object) -> Simulated:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    rows = np.arange(len(contexts))
    chosen = ServingSettings.model_validate(serving)
    return simulate(engine, contexts, rows, builder, chosen, name="tiny", policy_version="v", batch=batch)


def beams(engine: Engine, catalogue: Catalogue, contexts: Samples, temperature: float, width: int) -> Groups:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    spec = DecodeSpec(decode=Decode.BEAM, width=width, temperature=temperature)
    return engine.generate(builder.build(contexts).prompts, spec)


def exact_policy(engine: Engine, catalogue: Catalogue, contexts: Samples, temperature: float) -> np.ndarray:
    """[N, I] probability of every item, by beams that are wide enough for the whole catalogue."""
    groups = beams(engine, catalogue, contexts, temperature, 27)
    policy_NI = np.zeros((len(contexts), ITEMS))
    for row in range(len(contexts)):
        valid = groups.valid_PG[row]
        policy_NI[row, groups.item_PG[row][valid]] = np.exp(groups.sequence_logp_PG[row][valid])
    np.testing.assert_allclose(policy_NI.sum(1), 1, atol=1e-5)
    return policy_NI


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("serve", list(Serving))
def test_logged_propensities_are_those_of_the_exact_policy(
    engine: Engine, catalogue: Catalogue, contexts: Samples, serve: Serving, temperature: float
) -> None:
    more = {} if serve is Serving.SAMPLE else {"beams": 2}
    more |= {"epsilon": 0.4} if serve is Serving.MIXTURE else {}
    log = run(engine, catalogue, contexts, serve=serve, temperature=temperature, **more).log
    policy_NI = exact_policy(engine, catalogue, contexts, temperature)
    best_NG = beams(engine, catalogue, contexts, temperature, 2).item_PG
    anchors = log.anchors()
    assert len(log) == len(contexts)
    decode = log.table["decode"].to_pylist()
    for row, item in enumerate(anchors.item_N):
        assert item not in contexts.history(row, 99)
        best = best_NG[row]
        expected = policy_NI[row, item]
        if serve is Serving.MIXTURE:
            expected = 0.6 * (item in best) / 2 + 0.4 * expected
        assert np.exp(anchors.logp0_N[row]) == pytest.approx(expected, rel=1e-4)
        if decode[row] == "beam":
            assert item in best
    if serve is Serving.MIXTURE:
        assert set(decode) == {"beam", "sample"}
    assert set(log.table["propensity_kind"].to_pylist()) == {"none" if serve is Serving.BEAM else serve.value}
    # The two beams are both shown.
    if serve is Serving.BEAM:
        first = [item == best_NG[row, 0] for row, item in enumerate(anchors.item_N)]
        assert 0 < sum(first) < len(first)


@pytest.mark.parametrize("serve", [Serving.SAMPLE, Serving.MIXTURE])
def test_frequencies_are_the_propensities(engine: Engine, catalogue: Catalogue, serve: Serving) -> None:
    """One context, asked as many different rows: what was shown how often against what was logged for it."""
    rows = 250
    contexts = make_samples([[0, 1]] * rows, [2] * rows)
    more = {"epsilon": 0.5, "beams": 3} if serve is Serving.MIXTURE else {}
    anchors = run(engine, catalogue, contexts, batch=125, serve=serve, temperature=2.0, **more).log.anchors()
    propensity = {int(item): float(np.exp(p)) for item, p in zip(anchors.item_N, anchors.logp0_N, strict=True)}
    for item, p in propensity.items():
        np.testing.assert_allclose(np.exp(anchors.logp0_N[anchors.item_N == item]), p, rtol=1e-5)
        share = float((anchors.item_N == item).mean())
        assert abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / rows)
    assert sum(propensity.values()) == pytest.approx(1, abs=0.05)
    # So inverse propensities estimate the number of items: E[1/p] over the support.
    assert np.exp(-anchors.logp0_N.astype(np.float64)).mean() == pytest.approx(len(propensity), rel=0.5)


def test_the_seed_decides_and_the_batch_does_not(engine: Engine, catalogue: Catalogue, contexts: Samples) -> None:
    settings_ = {"serve": "mixture", "epsilon": 0.5, "beams": 2}
    first = run(engine, catalogue, contexts, batch=7, seed=1, **settings_)
    assert first.log.table.equals(run(engine, catalogue, contexts, batch=16, seed=1, **settings_).log.table)
    other = run(engine, catalogue, contexts, batch=7, seed=2, **settings_)
    assert other.log.anchors().item_N.tolist() != first.log.anchors().item_N.tolist()


def test_contexts_without_a_legal_item_are_counted(engine: Engine, catalogue: Catalogue) -> None:
    everything = list(range(ITEMS))
    simulated = run(engine, catalogue, make_samples([everything, [1], everything, [2]], [0, 0, 0, 0]), batch=3)
    assert simulated.counts["nothing_legal"] == 2
    assert simulated.log.table["user_id"].to_pylist() == [1, 3]
    with pytest.raises(RequestError, match="in any of 1 contexts"):
        run(engine, catalogue, make_samples([everything], [0]))


def test_the_log_is_read_back_and_gives_the_prompts_that_were_served(
    engine: Engine, catalogue: Catalogue, contexts: Samples, tmp_path: Path
) -> None:
    log = run(engine, catalogue, contexts).log
    write_feedback(tmp_path, log.table)
    checks = FeedbackChecks(n_items=ITEMS, catalogues=frozenset({catalogue.digest}), max_bad_share=0.0)
    read = read_feedback(tmp_path, checks)
    assert read.table.equals(log.table)
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    served, rebuilt = builder.build(contexts).prompts, builder.build(read.samples()).prompts
    for one, other in zip(served, rebuilt, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.exclusions, other.exclusions)


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.integers(1, 6), st.data())
def test_responses_equal_a_plain_loop_over_the_future(
    rows: list[tuple[int, int, int]], horizon: int, data: st.DataObject
) -> None:
    user, target, exposed = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    samples = Samples(
        user_id_N=user,
        target_N=target,
        timestamp_N=np.arange(len(rows)),
        sample_id_N=np.arange(len(rows)),
        values=np.zeros(0, np.int32),
        start_N=np.zeros(len(rows), np.int64),
        end_N=np.zeros(len(rows), np.int64),
    )
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))))
    found = responses(samples, chosen, exposed[chosen], horizon)
    for row, response in zip(chosen.tolist(), found.tolist(), strict=True):
        future = [t for u, t, _ in rows[row:] if u == user[row]][:horizon]
        assert response == float(exposed[row] in future)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"epsilon": 0.2}, "serve mixture"), ({"beams": 3}, "serve beam or mixture")],
)
def test_arguments_without_effect_are_refused(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ServingSettings.model_validate(wrong)


def test_the_engines_decode_as_the_serving_says(tmp_path: Path) -> None:
    def engines(**more: object) -> RolloutSettings:
        given = {"checkpoint": "run", "data": "d", "out": "o", **more}
        command = SimulateCommand.model_validate(given)
        return serving_engines(command.rollout, command, width=command.beams)

    assert (engines().decode, engines().width) == (Decode.SAMPLE, 1)
    mixed = engines(serve="mixture", beams=5, temperature=0.5)
    assert (mixed.decode, mixed.width, mixed.temperature) == (Decode.BEAM, 5, 0.5)
    with pytest.raises(RequestError, match="--temperature"):
        engines(rollout={"temperature": 0.5})
    with pytest.raises(RequestError, match=r"no \*.safetensors"):
        policy_version(tmp_path)


def test_a_policy_is_named_by_its_weights(tmp_path: Path, catalogue: Catalogue) -> None:
    names = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number) / "step-000003" / "hf"
        folder.parent.mkdir(parents=True)
        names.append(policy_version(write_tiny_model(folder, catalogue, seed=seed, hidden=32, layers=1)))
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("step-000003-")


@pytest.mark.long
@pytest.mark.parametrize("engine_name", ["reference", "vllm"])
def test_the_command_writes_a_log_and_answers_by_its_schema(tmp_path: Path, engine_name: str) -> None:
    require("ray")
    if engine_name == "vllm":
        require("vllm")
    dataset = write_dataset(tmp_path / "world")
    catalogue = Catalogue.build(dataset, "default")
    hf_dir = write_tiny_model(tmp_path / "hf", catalogue, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(hf_dir)
    arguments = ["data", "simulate", "hf", "--data", str(dataset.path), "--out", "log", "--serve", "mixture"]
    arguments += ["--beams", "2", "--horizon", "3", "--json", "-", "--cluster.object-store-mib", "128"]
    arguments += ["--rollout.engine", engine_name, "--rollout.dtype", "float32", "--rollout.kv-cache-gib", "0.1"]
    done = windlass(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    schema = json.loads((ROOT / "docs" / "schemas" / "data-simulate.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert answer["violations"] == 0
    checks = FeedbackChecks(n_items=catalogue.n_items, catalogues=frozenset({catalogue.digest}), max_bad_share=0.0)
    assert len(read_feedback(tmp_path / "log", checks)) == answer["rows"] == sum(answer["days"].values())
    again = windlass(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "is there already" in again.stderr
