"""The commands of `windlass`, in the order of its help: where their bodies are, and what they do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command and where its body is."""

    target: str
    """`module:function`. The function returns None, an exit code, or an answer (a mapping)."""
    summary: str
    answers: bool = False
    """It answers a question: takes `--json FILE`, and prints the answer as JSON with `-`."""
    own_arguments: bool = False
    """The function takes the list of arguments and reads it itself."""


COMMANDS: dict[str, Command] = {
    "data import": Command(
        target="launch.data_commands:import_command", summary="bring a dataset into the Parquet layout", answers=True
    ),
    "data inspect": Command(
        target="launch.data_commands:inspect_command", summary="summarise and validate a dataset folder", answers=True
    ),
    "data ids": Command(
        target="launch.id_commands:ids_command", summary="build semantic IDs for the items of a dataset", answers=True
    ),
    "data extend": Command(
        target="launch.extend_command:extend_command",
        summary="add items to a dataset and retire others; old ids and codes stay",
        answers=True,
    ),
    "data forget": Command(
        target="launch.forget_command:forget_command",
        summary="take a user's rows out of a dataset, a log and a registry",
        answers=True,
    ),
    "data simulate": Command(
        target="launch.simulate_command:simulate_command",
        summary="serve a policy over held-out contexts to get a feedback log",
        answers=True,
    ),
    "data bandit": Command(
        target="launch.bandit_command:bandit_command",
        summary="the Open Bandit sample as a feedback log",
        answers=True,
    ),
    "train": Command(
        target="launch.train_arguments:train_command",
        summary="run a recipe (sft, rl, ranker, critic, laac); resumes by itself from the run directory",
        own_arguments=True,
    ),
    "eval": Command(
        target="launch.eval_command:eval_command", summary="evaluate a checkpoint on a split", answers=True
    ),
    "serve": Command(
        target="launch.serving.command:serve_command",
        summary="answer requests with the served version of a registry, and log what is shown",
    ),
    "recommend": Command(
        target="launch.serving.recommend_command:recommend_command",
        summary="recommend for many contexts at once, Parquet to Parquet",
        answers=True,
    ),
    "continual": Command(
        target="launch.continual.command:continual_command",
        summary="keep the served model up to date from a feedback log, guarded",
        own_arguments=True,
    ),
    "replay": Command(
        target="launch.continual.replay_command:replay_command",
        summary="daily updates over the periods of a dataset, by several ways to update",
        answers=True,
        own_arguments=True,
    ),
    "ope bandit": Command(
        target="launch.ope_command:ope_bandit_command",
        summary="each policy of the Open Bandit sample from the other one's log",
        answers=True,
    ),
    "ope model": Command(
        target="launch.ope_command:ope_model_command",
        summary="what a model would have earned, from the log of another policy",
        answers=True,
    ),
    "registry list": Command(
        target="launch.continual.registry_command:list_command", summary="the versions of a registry", answers=True
    ),
    "registry show": Command(
        target="launch.continual.registry_command:show_command",
        summary="a version: where it comes from, and why it was promoted or rejected",
        answers=True,
    ),
    "registry promote": Command(
        target="launch.continual.registry_command:promote_command", summary="serve a version", answers=True
    ),
    "registry rollback": Command(
        target="launch.continual.registry_command:rollback_command",
        summary="serve again what was served before",
        answers=True,
    ),
    "registry prune": Command(
        target="launch.continual.registry_command:prune_command", summary="remove old versions", answers=True
    ),
    "bench rollout": Command(
        target="launch.bench.rollout:rollout_command",
        summary="time constrained beams against vLLM, transformers and the limit",
        answers=True,
    ),
    "bench learner": Command(
        target="launch.bench.learner:learner_command",
        summary="time learning on trees against rows and the limit",
        answers=True,
    ),
    "bench step": Command(
        target="launch.bench.step:step_command",
        summary="time whole RL steps against TRL's GRPOTrainer",
        answers=True,
    ),
    "bench stages": Command(
        target="launch.bench.stages:stages_command",
        summary="time the objective's stages within a learner's step",
        answers=True,
    ),
    "bench sync": Command(
        target="launch.bench.sync:sync_command",
        summary="time a push of the weights against a plain copy",
        answers=True,
    ),
    "bench reward": Command(
        target="launch.bench.reward:reward_command",
        summary="time the rewards of a batch against a loop over its lists",
        answers=True,
    ),
    "bench data": Command(
        target="launch.bench.data:data_command", summary="time an import and the item trie", answers=True
    ),
    "bench partition": Command(
        target="launch.bench.partition:partition_command",
        summary="time reading, validating and joining a day of a feedback log",
        answers=True,
    ),
    "bench serve": Command(
        target="launch.bench.serve:serve_command",
        summary="time requests to the service on loopback, and kill it under load",
        answers=True,
    ),
    "bench orchestrator": Command(
        target="launch.bench.orchestrator:orchestrator_command",
        summary="how many simulated engines one driver keeps at work",
        answers=True,
    ),
    "bench scale": Command(
        target="launch.bench.scale:scale_bench_command",
        summary="time whole steps with more engines and learners",
        answers=True,
    ),
    "bench suite": Command(
        target="launch.bench.suite:suite_command",
        summary="the benchmarks, small, against the ratios last accepted (make bench)",
        answers=True,
    ),
    "submit": Command(
        target="launch.submission.command:submit_command",
        summary="any of these commands on a cluster: a Ray job, Slurm, or a KubeRay RayJob",
        own_arguments=True,
    ),
    "status": Command(
        target="launch.status_command:status_command", summary="where a run is: step, engines, queues", answers=True
    ),
    "scale": Command(
        target="launch.status_command:scale_command",
        summary="change the number of engines of a running job",
        answers=True,
    ),
    "report": Command(target="launch.report:report_command", summary="the HTML report of a run, registry or replay"),
    "compare": Command(
        target="launch.compare:compare_command", summary="compare two runs with a paired bootstrap", answers=True
    ),
    "correlate": Command(
        target="launch.correlate:correlate_command",
        summary="rank correlation of AUC and its windows with recall over a run's checkpoints",
        answers=True,
    ),
    "strata": Command(
        target="launch.strata_command:strata_command",
        summary="where a run's reward helps, by difficulty and discriminability",
        answers=True,
    ),
    "sweep": Command(
        target="launch.sweep_command:sweep_command",
        summary="a recipe for several values of a key and several seeds, with means",
        answers=True,
    ),
    "results": Command(
        target="launch.results:results_command", summary="regenerate a table of docs/results.md", answers=True
    ),
    "demo": Command(
        target="launch.demo:demo_command", summary="the main job on MovieLens-100K, start to end", answers=True
    ),
    "smoke": Command(target="launch.smoke:smoke_command", summary="the whole loop in a minute"),
    "doctor": Command(
        target="launch.doctor:doctor_command", summary="what this machine lacks, and how to mend it", answers=True
    ),
}
