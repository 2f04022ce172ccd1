"""`windlass strata`: where the reward of a run helps, by how hard a prompt is and whether the ranker discriminates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.records import Decode, DecodeSpec, Groups, Prompt
from data.schema import SPLIT_NAMES
from data.settings import Settings
from launch.cluster import cluster
from launch.report import STRATA
from reward.names import RankingMetric, at
from reward.ranker import Ranker, load_ranker
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.checkpoint_evaluation import check_same_items
from trainer.checkpoints import open_model
from trainer.durable import write_text
from trainer.evaluation import sample_rows
from trainer.gate import Gate, GateKind
from trainer.initial_model import CATALOGUE, check_model
from trainer.prompt_card import PromptCard
from trainer.reward_strata import RankerView, beam_ndcg, hits, ranker_view, strata
from trainer.run_settings import ClusterSettings

INITIAL = "initial"


class StrataCommand(Settings):
    """Arguments of `windlass strata`."""

    run: tyro.conf.Positional[Path]
    """A run folder: its initial model is the policy before, its best checkpoint the one after."""
    data: Path
    """Folder that `windlass data import` wrote."""
    ranker: Path
    """The reward model: an artefact folder or a .onnx file."""
    oracle: Path | None = None
    """A ranker to hold beside it, trained without the bias."""
    split: str = Field("test", pattern=f"^({'|'.join(SPLIT_NAMES)})$")
    """train, valid or test."""
    rows: int = Field(1000, ge=0)
    """Rows of a seeded sample; 0 takes the whole split."""
    width: int = Field(50, ge=2, le=1024)
    """Beams that the ground truth is ranked among, by the policy and by the rankers."""
    bins: int = Field(4, ge=1, le=100)
    """Quantiles of the policy's rank."""
    k: int = Field(10, ge=1)
    """Cut-off of the NDCG before and after."""
    tau: float = Field(0.25, gt=0, le=1)
    """Head of the ranker's ranking, as a share of the beams (objective.gate.tau)."""
    rho: float = Field(0.5, gt=0, lt=1)
    """Tail of it, for items of other prompts (objective.gate.rho)."""
    negatives: int = Field(4, ge=1, le=256)
    """Items of other prompts (objective.gate.negatives)."""
    seed: int = Field(0, ge=0)
    """Seed of the sample, the items of other prompts and the intervals."""
    batch: int = Field(128, ge=2)
    """Prompts per request; items of other prompts come from the same request."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""


def strata_command(
    arguments: Annotated[StrataCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Print the ranker's rank correction and the NDCG gained, by difficulty and discriminability."""
    dataset = Dataset.open(arguments.data)
    before_dir = arguments.run / INITIAL
    if not before_dir.is_dir():
        raise RequestError(str(before_dir), "no such folder", "the folder of a run of `windlass train`")
    after_dir = open_model(arguments.run)
    catalogue = Catalogue.load(after_dir / CATALOGUE)
    check_same_items(after_dir, catalogue, dataset)
    if arguments.width > catalogue.n_items:
        raise RequestError("width", arguments.width, f"2 to {catalogue.n_items}, the items of the catalogue")
    ranker = load_ranker(arguments.ranker)
    oracle = None if arguments.oracle is None else load_ranker(arguments.oracle)
    samples = dataset.samples(arguments.split)
    rows = sample_rows(len(samples), arguments.rows or len(samples), arguments.seed)
    builder = PromptCard.read(after_dir).builder(catalogue, after_dir)
    requests = [
        builder.build(samples, rows[first : first + arguments.batch]).prompts
        for first in range(0, len(rows), arguments.batch)
    ]
    with cluster(arguments.cluster):
        before = beams(before_dir, catalogue, requests, arguments)
        after = beams(after_dir, catalogue, requests, arguments)
    answer = told(arguments, catalogue, requests, before, after, ranker, oracle) | {
        "run": str(arguments.run),
        "checkpoint": str(after_dir),
        "dataset": dataset.name,
    }
    write_text(arguments.run / STRATA, json.dumps(answer, indent=1) + "\n")
    print(table(answer))
    return answer


def beams(
    hf_dir: Path, catalogue: Catalogue, requests: Sequence[list[Prompt]], arguments: StrataCommand
) -> list[Groups]:
    """Beams of a model for every request."""
    check_model(hf_dir, catalogue.vocabulary.size)
    spec = DecodeSpec(decode=Decode.BEAM, width=arguments.width, seed=arguments.seed)
    with closing(RolloutFleet.start(arguments.rollout, hf_dir, catalogue)) as fleet:
        return [fleet.generate(prompts, spec) for prompts in requests]


def told(
    arguments: StrataCommand,
    catalogue: Catalogue,
    requests: Sequence[list[Prompt]],
    before: Sequence[Groups],
    after: Sequence[Groups],
    ranker: Ranker,
    oracle: Ranker | None,
) -> dict[str, Any]:
    """The answer, from the beams of both policies.

    Raises:
        RequestError: no prompt has a ground truth that may be recommended and scores of the rankers.
    """
    gate = Gate(kind=GateKind.ADAGRPO, tau=arguments.tau, rho=arguments.rho, negatives=arguments.negatives)
    seed, prompts = arguments.seed, [prompt for request in requests for prompt in request]

    def view(by: Ranker) -> RankerView:
        pairs = zip(requests, before, strict=True)
        return RankerView.joined([ranker_view(by, part, found, catalogue, gate, seed=seed) for part, found in pairs])

    mine, other = view(ranker), None if oracle is None else view(oracle)
    if other is not None:
        # Where the oracle has no scores its rank means nothing.
        mine = mine.only(other.known_N)
    if not mine.known_N.any():
        legal = "rows whose target may be recommended, and a ranker that scores them"
        raise RequestError("rows", f"none of {len(prompts)} can be ranked", legal)
    return {
        "split": arguments.split,
        "rows": int(mine.known_N.sum()),
        "left_out": int((~mine.known_N).sum()),
        "width": arguments.width,
        "gate": {"tau": gate.tau, "rho": gate.rho, "negatives": gate.negatives},
        "ranker": str(arguments.ranker),
        "oracle": None if arguments.oracle is None else str(arguments.oracle),
        "metric": at(RankingMetric.NDCG, arguments.k),
        "discriminable": float(mine.discriminable_N[mine.known_N].mean()),
        "strata": strata(
            mine,
            None if other is None else other.ranker_rank_N,
            ndcg(requests, before, catalogue, arguments.k),
            ndcg(requests, after, catalogue, arguments.k),
            np.array([prompt.user_id for prompt in prompts], np.int32),
            bins=arguments.bins,
            seed=seed,
        ),
    }


def ndcg(
    requests: Sequence[list[Prompt]], beams_of: Sequence[Groups], catalogue: Catalogue, k: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[N] NDCG@k of the beams, by path."""
    path_id_I = catalogue.active_path_id
    parts = []
    for prompts, groups in zip(requests, beams_of, strict=True):
        target_N = np.array([prompt.target for prompt in prompts])
        parts.append(beam_ndcg(hits(groups, path_id_I[target_N], path_id_I), k))
    return np.concatenate(parts)


def table(answer: dict[str, Any]) -> str:
    """The answer as a table of text: a row per stratum that holds prompts."""
    metric = answer["metric"]
    lines = [
        f"{answer['rows']} rows of {answer['split']} ({answer['left_out']} without a target that can be ranked), "
        f"{answer['width']} beams; the ranker discriminates on {answer['discriminable']:.1%}",
        f"{'policy rank':>12}{'discriminates':>15}{'rows':>7}{'correction':>12}{'oracle':>9}"
        f"{f'{metric} before':>17}{'after':>9}{'gain':>10}  95 % interval",
    ]
    for s in answer["strata"]:
        if not s["prompts"]:
            continue
        ranks = "-".join(dict.fromkeys(str(s[f"policy_rank_{edge}"]) for edge in ("low", "high")))
        oracle = f"{s['oracle_correction']:+.2f}" if s.get("oracle_correction") is not None else "-"
        low, high = s["gain_ci95"]
        lines.append(
            f"{ranks:>12}{'yes' if s['discriminable'] else 'no':>15}{s['prompts']:>7}{s['correction']:>+12.2f}"
            f"{oracle:>9}{s['before']:>17.4f}{s['after']:>9.4f}{s['gain']:>+10.4f}  [{low:+.4f}, {high:+.4f}]"
        )
    return "\n".join(lines)
