"""`windlass eval`: metrics of a checkpoint on a split, with intervals, beside published numbers when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from pydantic import Field

from data.dataset import Dataset
from data.errors import RequestError
from data.schema import SPLIT_NAMES, read_card
from data.settings import Settings
from launch import laac_eval, list_eval
from launch.cluster import cluster
from launch.compare import compare, rows_file
from launch.compare import table as comparison
from launch.list_eval import RankingSettings, check_ranking, check_save, load_rankers, read_base, save_rows
from launch.published import published_rows, table
from reward.artefact import RankerArtefact
from reward.names import ExposureMetric, PairwiseMetric, RankingMetric
from rollout.settings import RolloutSettings
from trainer.checkpoint_evaluation import EvaluationRows, answer, evaluate_checkpoint
from trainer.evaluation import sample_rows
from trainer.list_checkpoint import ListRows, evaluate_lists, open_list_model
from trainer.row_metrics import RowMetrics, read_row_metrics
from trainer.run_settings import ClusterSettings, NegativeSource, ScoreSettings
from trainer.scored_evaluation import LEGAL_MASS

SHOWN = ("hr", "ndcg")


class EvalCommand(Settings):
    """Arguments of `windlass eval`."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder (its best checkpoint), a checkpoint, or an hf folder."""
    data: Path
    """Folder that `windlass data import` wrote."""
    split: str = Field("test", pattern=f"^({'|'.join(SPLIT_NAMES)})$")
    """train, valid or test."""
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 3, 5, 10, 20, 50), min_length=1)
    """Cut-offs; the largest is the number of beams."""
    rows: int = Field(0, ge=0)
    """Rows of a seeded sample; 0 takes the whole split."""
    seed: int = Field(0, ge=0)
    """Seed of the sample and of the intervals."""
    history: int | None = Field(None, ge=1)
    """Items a prompt shows; by default as the model was trained."""
    exclude_seen: bool | None = None
    """Never recommend an item of the user's history; by default as the model was trained."""
    unconstrained_rows: int = Field(500, ge=0)
    """Rows that are decoded without the constraint as well, for the invalid rate."""
    scores: ScoreSettings = ScoreSettings(rows=200)
    """AUC, its windows and the legal mass."""
    feedback: Path | None = None
    """Feedback log that exposure bias is measured against."""
    lists: bool = False
    """Evaluate a model of ranked lists, for each need; of the other arguments `scores`, `feedback`, `published`,
    `unconstrained-rows`, `history` and `exclude-seen` mean nothing then."""
    trust_code: bool = False
    """With `--lists`: import the gains (`package.module:function`) and the retriever that the model's `prompt.json`
    names."""
    ranking: RankingSettings = RankingSettings()
    """How lists are answered, and what is held beside them."""
    base: str | None = None
    """Evaluation of the same rows to compare with: a run folder, or run folder:NAME, as for `windlass compare`."""
    save: str | None = None
    """With `--lists`: RUN:NAME, keep the metrics of every prompt as RUN/rows/NAME.parquet, for `--base`."""
    published: Path | None = None
    """CSV of published results (columns dataset, method, metric, value) to print beside ours."""
    batch: int = Field(128, ge=1)
    """Prompts per request to the fleet."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""


def eval_command(
    arguments: Annotated[EvalCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Evaluate a checkpoint by constrained beams through the fleet, or a LAAC policy along its sessions."""
    dataset = Dataset.open(arguments.data)
    policy = laac_eval.laac_artefact(arguments.checkpoint)
    if policy is not None:
        return evaluate_laac_command(arguments, policy, dataset)
    if arguments.lists:
        return evaluate_lists_command(arguments, dataset)
    if arguments.save is not None:
        raise RequestError("--save", arguments.save, "none without --lists: jobs keep the rows of single items")
    if arguments.trust_code:
        raise RequestError("--trust-code", True, "false without --lists: a model of single items names no code")
    published = None if arguments.published is None else published_rows(arguments.published, dataset.name)
    which = EvaluationRows(
        split=arguments.split,
        rows=arguments.rows,
        ks=tuple(sorted(set(arguments.k))),
        seed=arguments.seed,
        batch=arguments.batch,
        unconstrained_rows=arguments.unconstrained_rows,
        scores=arguments.scores,
        feedback=arguments.feedback,
    )
    base = None if arguments.base is None else base_rows(arguments.base, dataset, which)
    with cluster(arguments.cluster):
        evaluated = evaluate_checkpoint(
            arguments.checkpoint,
            dataset,
            which,
            arguments.rollout,
            history=arguments.history,
            exclude_seen=arguments.exclude_seen,
        )
    shares_paths = evaluated.evaluation.paths.values != evaluated.evaluation.items.values
    result = answer(evaluated, dataset, which, with_paths=shares_paths)
    caveat = read_card(dataset.path).get("caveat")
    if caveat:
        result["caveat"] = caveat
    if published is not None:
        result["published"] = published
    if base is not None:
        ours = evaluated.evaluation.row_metrics("ours", split=which.split, dataset=dataset.fingerprint)
        compared = compare(base, ours, seed=which.seed)
        result |= {"base": arguments.base, "differences": compared["differences"]}
        print(comparison(compared, str(arguments.base), "ours"))
    show(result, which.ks)
    return result


def evaluate_laac_command(arguments: EvalCommand, policy: RankerArtefact, dataset: Dataset) -> dict[str, Any]:
    """The body of `windlass eval` for the policy of a `laac` job.

    Raises:
        RequestError: an argument that such a policy does not have, or another dataset.
    """
    given = {
        "feedback": arguments.feedback,
        "published": arguments.published,
        "base": arguments.base,
        "save": arguments.save,
        "history": arguments.history,
        "exclude-seen": arguments.exclude_seen,
        "lists": arguments.lists or None,
    }
    for name, value in given.items():
        if value is not None:
            raise RequestError(
                f"--{name}", value, "none for the policy of a laac job: its sessions are as it was trained"
            )
    ks = tuple(sorted(set(arguments.k)))
    answer = laac_eval.evaluate_laac(policy, dataset, arguments.split, ks, rows=arguments.rows, seed=arguments.seed)
    laac_eval.show(answer, ks)
    return answer


def evaluate_lists_command(arguments: EvalCommand, dataset: Dataset) -> dict[str, Any]:
    """The body of `windlass eval --lists`.

    Raises:
        RequestError: an argument that lists do not have, a model of single items, or a base of other prompts.
    """
    check_ranking(arguments.ranking)
    for name, value in (("feedback", arguments.feedback), ("published", arguments.published)):
        if value is not None:
            raise RequestError(f"--{name}", value, "none with --lists: it is of single items")
    for name, changed in (("history", arguments.history), ("exclude-seen", arguments.exclude_seen)):
        if changed is not None:
            raise RequestError(f"--{name}", changed, "none with --lists: prompts are as the model was trained")
    if arguments.save is not None:
        check_save(arguments.save)
    which = ListRows(
        split=arguments.split,
        rows=arguments.rows,
        ks=arguments.k,
        seed=arguments.seed,
        batch=arguments.batch,
        decode=arguments.ranking.decode,
        width=arguments.ranking.width,
        trust_code=arguments.trust_code,
    )
    model = open_list_model(arguments.checkpoint, dataset, which)
    base = None if arguments.base is None else read_base(arguments.base, model, which, dataset)
    rankers = load_rankers(arguments.ranking.rankers)
    with cluster(arguments.cluster):
        evaluated = evaluate_lists(model, dataset, which, arguments.rollout, rankers)
    result = list_eval.answer(evaluated, which, dataset, base)
    if base is not None:
        result["base"] = arguments.base
    if arguments.save is not None:
        save_rows(arguments.save, evaluated, which, dataset)
    list_eval.show(result, evaluated.ks)
    return result


def base_rows(run: str, dataset: Dataset, which: EvaluationRows) -> RowMetrics:
    """The evaluation to compare with, checked before an engine is started.

    Raises:
        RequestError: there is none, or it is one of other rows.
    """
    path = rows_file(run)
    base = read_row_metrics(path)
    samples = len(dataset.samples(which.split))
    asked = sample_rows(samples, which.rows or samples, which.seed)
    same = base.dataset == dataset.fingerprint and base.split == which.split
    if not same or not np.array_equal(base.sample_id_N, asked):
        found = f"{path}: {len(base.sample_id_N)} rows of {base.split}"
        legal = f"the {len(asked)} rows of {which.split} that --rows and --seed choose"
        raise RequestError("--base", found, f"an evaluation of {legal}")
    return base


def show(result: dict[str, Any], ks: tuple[int, ...]) -> None:
    """Print the table: published rows first, ours last, then what a reader must know."""
    columns = [f"{metric}@{k}" for k in ks for metric in SHOWN]
    caveat = result.get("caveat")
    ours = "windlass, items" if "paths" in result else "windlass"
    rows: dict[str, dict[str, float]] = dict(result.get("published", {}))
    if "paths" in result:
        rows["windlass, paths" + (f" ({caveat})" if caveat else "")] = result["paths"]
    rows[ours + (f" ({caveat})" if caveat else "")] = result["metrics"]
    print(table(columns, rows))
    further = further_table(result["metrics"], ks)
    if further:
        print(further)
    unconstrained = result["invalid"]["unconstrained"]
    told = "not measured" if unconstrained is None else f"{unconstrained:.4f}"
    mended = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in result["prompts"].items() if count)
    if mended:
        print(f"prompts: {mended}")
    print(
        f"{result['n']} rows of {result['split']}, seen items {'excluded' if result['exclude_seen'] else 'kept'}; "
        f"invalid: constrained {result['invalid']['constrained']:.4f}, unconstrained {told}"
    )
    if "scored" in result:
        scored = result["scored"]
        told = "permitted items, drawn evenly" if scored["source"] == NegativeSource.RANDOM else "best beams"
        print(
            f"auc, opauc, wpauc: {scored['rows']} rows against {scored['negatives']} negatives ({told}); "
            f"{scored['unreachable']} rows have no reachable target or too few negatives"
        )
    if result.get("feedback", {}).get("left_out"):
        left_out = ", ".join(f"{count} {name}" for name, count in result["feedback"]["left_out"].items())
        print(f"feedback: rows left out: {left_out.replace('_', ' ')}")


def further_table(metrics: dict[str, float], ks: tuple[int, ...]) -> str:
    """Coverage, AUC's windows and exposure bias by K, then the values without a K; nothing where none was measured."""
    families = (*PairwiseMetric, *ExposureMetric)
    named = [RankingMetric.COVERAGE.value, *(family.value for family in families)]
    rows = {
        name: {f"@{k}": metrics[f"{name}@{k}"] for k in ks if f"{name}@{k}" in metrics}
        for name in named
        if any(f"{name}@{k}" in metrics for k in ks)
    }
    single = [f"{name} {metrics[name]:.4f}" for name in (*named, LEGAL_MASS) if name in metrics]
    return table([f"@{k}" for k in ks], rows) + ("\n" + ", ".join(single) if single else "")
