"""A whole job through the command line: two vLLM engines, each colocated with one of two DeepSpeed ranks with ZeRO-2,
Ray Serve over HTTP, three steps, started in a folder that holds its own `data/` and `trainer.py`.

Checks what a user would look at: exit code, metrics, versions, the policy gap, checkpoints that transformers loads.
Does not check quality (the demo does) nor crashes (tests/launch/test_kill.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from launch.provenance import ROOT
from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import read_steps, recipe, windlass, write_dataset, write_recipe


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the job."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    folder = tmp_path_factory.mktemp("whole_job")
    dataset = write_dataset(folder / "source")
    user_folder = folder / "user"
    (user_folder / "data").mkdir(parents=True)
    (user_folder / "data" / "__init__.py").write_text("raise ImportError('the data of the user')")
    (user_folder / "trainer.py").write_text("raise ImportError('the trainer of the user')")
    write_recipe(
        user_folder / "ranker.yaml",
        {
            "job": "ranker",
            "data": {"dataset": str(dataset.path), "history": 6},
            "ranker": {"kind": "cooccurrence"},
            "limits": {"max_steps": 1},
            "evaluation": {"rows": 16, "k": [1, 5, 10]},
        },
    )
    content = recipe(
        dataset.path,
        "rl",
        learner={"ranks": 2, "zero_stage": 2},
        rollout={"engines": 2},
        cluster={"colocated": True},
        reward={"ranker": "runs/ranker/ranker", "ranker_score": 0.1, "transport": "http"},
        evaluation={"unconstrained_rows": 8, "every": 1, "scores": {"rows": 12, "negatives": 10}},
    )
    write_recipe(user_folder / "job.yaml", content)
    ranker = windlass("train", "ranker.yaml", "--run-dir", "runs/ranker", cwd=user_folder)
    assert ranker.returncode == 0, ranker.stderr
    done = windlass("train", "job.yaml", "--run-dir", "runs/job", cwd=user_folder)
    assert done.returncode == 0, done.stderr
    return user_folder / "runs" / "job"


def test_steps_rewards_and_versions(finished_run: Path) -> None:
    steps = read_steps(finished_run)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [step["weight_version"] for step in steps[1:]] == [0, 1, 2]
    for step in steps[1:]:
        assert step["constraint.violations"] == 0
        assert step["reward/failed_share"] == 0
        assert 0 < step["policy_gap/mean"] <= step["policy_gap/max"] < 1e-4
        assert 0 < step["legal_mass"] <= 1
        # Engines sleep while the learners work; a rollout of the next step shows that the push woke them.
        assert min(step["time/sleep"], step["time/push/wake"]) > 0
    assert not {"time/sleep", "time/push/wake"} & steps[0].keys()
    assert "ndcg@10" in steps[0]
    assert "ndcg@10" in steps[-1]


def test_summary_names_the_real_parts(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["engine"]["name"] == "vllm"
    assert summary["engine"]["count"] == 2
    assert summary["learner"] == {"backend": "deepspeed", "zero_stage": 2, "ranks": 2}
    assert summary["reward"]["backend"] == "ray-serve"
    assert summary["reward"]["requests"] == 3
    assert summary["selection"]["candidates"] == [0, 1, 2, 3]
    assert summary["ended_by"] == "max_steps"


def test_every_evaluation_was_scored_and_correlates(windlass_here: Here, finished_run: Path) -> None:
    done = windlass_here("correlate", "runs/job", "--json", "c.json", cwd=finished_run.parent.parent)
    assert done.returncode == 0, done.stderr
    answer = json.loads((finished_run.parent.parent / "c.json").read_text())
    assert answer["checkpoints"] == [f"step-{step:06d}" for step in range(4)]
    steps = read_steps(finished_run)
    assert answer["k"]["5"]["recall@5"] == pytest.approx([step["recall@5"] for step in steps])
    for name in ("auc", "wpauc@5"):
        assert answer["k"]["5"][name]["values"] == pytest.approx([step[name] for step in steps])


def test_strata_of_the_run_stand_in_its_report(windlass_here: Here, finished_run: Path) -> None:
    folder = finished_run.parent.parent
    data = str(folder.parent / "source" / "dataset")
    ranker = ("--ranker", "runs/ranker/ranker", "--oracle", "runs/ranker/ranker")
    engine = ("--rollout.engine", "reference", "--rollout.dtype", "float32")
    sizes = ("--width", "12", "--batch", "16", "--cluster.object-store-mib", "128")
    done = windlass_here("strata", "runs/job", "--data", data, *ranker, *engine, *sizes, "--json", "s.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    answer = json.loads((folder / "s.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "strata.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert sum(stratum["prompts"] for stratum in answer["strata"]) == answer["rows"]
    for stratum in answer["strata"]:
        assert stratum["oracle_correction"] == pytest.approx(stratum["correction"])
    assert windlass_here("report", "runs/job", cwd=folder).returncode == 0
    assert "Rank correction of the reward by difficulty" in (finished_run / "report.html").read_text()


def test_the_checkpoint_loads_in_transformers_and_holds_its_catalogue(finished_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.catalogue import Catalogue

    hf = finished_run / "checkpoints" / "step-000003" / "hf"
    model = AutoModelForCausalLM.from_pretrained(hf)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    catalogue = Catalogue.load(hf / "catalogue")
    assert model.config.vocab_size == catalogue.vocabulary.size == len(tokenizer)


@pytest.mark.long
def test_the_checkpoint_loads_in_a_bare_vllm(finished_run: Path, tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    from vllm import LLM, SamplingParams\n"
        "    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=2**27)\n"
        "    answer = llm.generate([{'prompt_token_ids': [1, 5]}], SamplingParams(max_tokens=2, temperature=0))\n"
        "    print('tokens', len(answer[0].outputs[0].token_ids))\n"
    )
    hf = finished_run / "checkpoints" / "step-000003" / "hf"
    done = subprocess.run(
        [sys.executable, str(script), str(hf)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert "tokens 2" in done.stdout, done.stderr
