"""`windlass data simulate`: serve a frozen checkpoint over held-out contexts and write the feedback log."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import xxhash
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.feedback import check_days_are_free, write_feedback
from data.records import Decode
from data.schema import SPLIT_NAMES
from launch.cluster import cluster
from launch.serving.exposure import propensity_kind
from launch.serving.served import serving_engines
from launch.simulation import ServingSettings, Simulated, simulate
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.checkpoint_evaluation import check_same_items
from trainer.checkpoints import file_digest, open_model
from trainer.evaluation import sample_rows
from trainer.initial_model import CATALOGUE, check_model
from trainer.prompt_card import PromptCard
from trainer.run_settings import ClusterSettings


class SimulateCommand(ServingSettings):
    """Arguments of `windlass data simulate`."""

    checkpoint: tyro.conf.Positional[Path]
    """The policy: a run folder (its best checkpoint), a checkpoint, or an hf folder."""
    data: Path
    """Folder that `windlass data import` wrote."""
    out: Path
    """Folder of the feedback log; days that it holds already are refused."""
    split: str = Field("valid", pattern=f"^({'|'.join(SPLIT_NAMES)})$")
    """Whose contexts are served: train, valid or test."""
    rows: int = Field(0, ge=0)
    """Rows of a seeded sample; 0 takes the whole split."""
    batch: int = Field(128, ge=1)
    """Prompts per request to the fleet."""
    policy_version: str = ""
    """Name of the policy in the log; by default the checkpoint's step and the digest of its weights."""
    rollout: RolloutSettings = RolloutSettings()
    """The engines (`--rollout.engine reference` needs no vLLM); how they decode is told by the arguments above."""
    cluster: ClusterSettings = ClusterSettings()
    """The Ray cluster."""


def simulate_command(
    arguments: Annotated[SimulateCommand, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Serve a frozen checkpoint over held-out contexts and log exposures, propensities and simulated responses."""
    dataset = Dataset.open(arguments.data)
    engines = serving_engines(arguments.rollout, arguments, width=arguments.beams)
    hf_dir = open_model(arguments.checkpoint)
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    check_model(hf_dir, catalogue.vocabulary.size)
    check_same_items(hf_dir, catalogue, dataset)
    if arguments.beams > catalogue.n_items:
        raise RequestError("beams", arguments.beams, f"at most {catalogue.n_items}, the items of the catalogue")
    samples = dataset.samples(arguments.split)
    rows = sample_rows(len(samples), arguments.rows or len(samples), arguments.seed)
    check_days_are_free(arguments.out, samples.timestamp_N[rows])
    version = arguments.policy_version or policy_version(hf_dir)
    with cluster(arguments.cluster), closing(RolloutFleet.start(engines, hf_dir, catalogue)) as fleet:
        simulated = simulate(
            fleet,
            samples,
            rows,
            PromptCard.read(hf_dir).builder(catalogue, hf_dir),
            ServingSettings(**arguments.model_dump(include=set(ServingSettings.model_fields))),
            name=f"{dataset.name}-{arguments.split}",
            policy_version=version,
            batch=arguments.batch,
        )
        engine, violations = dict(fleet.describe()), sum(fleet.violations.values())
    days = write_feedback(arguments.out, simulated.log.table)
    answer = {
        **summary(simulated, arguments),
        "path": str(arguments.out),
        "days": days,
        "policy_version": version,
        "checkpoint": str(hf_dir),
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "catalogue_digest": catalogue.digest,
        "engine": engine,
        "violations": violations,
    }
    tell(answer)
    return answer


def policy_version(hf_dir: Path) -> str:
    """Name of a policy by what it is: the step, where the folder tells one, and the digest of the weights."""
    weights = sorted(hf_dir.glob("*.safetensors"))
    if not weights:
        raise RequestError(str(hf_dir), "no *.safetensors", "a model with weights, or --policy-version")
    digests = "".join(f"{path.name}:{file_digest(path)}" for path in weights)
    step = f"{hf_dir.parent.name}-" if hf_dir.parent.name.startswith("step-") else ""
    return step + xxhash.xxh3_128_hexdigest(digests.encode())[:16]


def summary(simulated: Simulated, arguments: SimulateCommand) -> dict[str, Any]:
    """Counts and propensities of a log, as JSON."""
    anchors = simulated.log.anchors()
    logp0_N = anchors.logp0_N.astype(np.float64)
    decode = simulated.log.table["decode"].to_pylist()
    return {
        "rows": len(simulated.log),
        "responses": int(anchors.response_N.sum()),
        "response_rate": float(anchors.response_N.mean()),
        "items_exposed": len(np.unique(anchors.item_N)),
        "exposed_by": {kind: decode.count(kind) for kind in (Decode.SAMPLE.value, Decode.BEAM.value)},
        "propensity_kind": propensity_kind(arguments).value,
        "propensity": {
            "smallest": float(np.exp(logp0_N.min())),
            "median": float(np.exp(np.median(logp0_N))),
            "largest": float(np.exp(logp0_N.max())),
        },
        "counts": simulated.counts,
        **arguments.model_dump(mode="json", include=set(ServingSettings.model_fields) | {"split"}),
    }


def tell(answer: dict[str, Any]) -> None:
    """Print what a reader must know."""
    days = list(answer["days"])
    print(
        f"{answer['path']}: {answer['rows']:,} exposures on {len(days)} days ({days[0]} to {days[-1]}), "
        f"{answer['responses']:,} responses ({answer['response_rate']:.2%}), {answer['items_exposed']:,} items"
    )
    exposed_by = ", ".join(f"{count:,} by {kind}" for kind, count in answer["exposed_by"].items() if count)
    spread = answer["propensity"]
    print(
        f"policy {answer['policy_version']}: {exposed_by}; propensity ({answer['propensity_kind']}) "
        f"{spread['smallest']:.2g} to {spread['largest']:.2g}, median {spread['median']:.2g}"
    )
    for reason, count in answer["counts"].items():
        print(f"  {reason.replace('_', ' ')}: {count:,}")
