"""What a job must be for the data it was given: checks that need the catalogue or the rows, before anything starts."""

from __future__ import annotations

import math

from data.errors import RequestError
from trainer.jobs import RlJob, SftJob, next_row


def completion_tokens(job: SftJob | RlJob, depth: int) -> int:
    """Tokens of the longest completion: an item's path, or a list with the free text before it."""
    if not job.lists.on:
        return depth
    text = job.lists.text_tokens + 1 if job.lists.text_tokens else 0
    return text + job.lists.spec.width * depth


def check_catalogue(job: SftJob | RlJob, *, n_items: int, depth: int) -> None:
    """Checks that need the catalogue: `n_items` items whose paths have at most `depth` tokens.

    Raises:
        RequestError: a width beyond the catalogue, or a prompt with its completions beyond a token limit.
    """
    prompt = job.data.max_prompt_tokens
    if max(job.evaluation.k) > n_items:
        raise RequestError("evaluation.k", list(job.evaluation.k), f"at most {n_items}, the items of the catalogue")
    completion = completion_tokens(job, depth)
    longest = prompt + completion
    words = f"(data.max_prompt_tokens {prompt} + {'list' if job.lists.on else 'item path'} {completion})"
    if prompt < 1 + depth:
        raise RequestError("data.max_prompt_tokens", prompt, f"at least {1 + depth} (<bos> and one item of {depth})")
    limit = job.rollout.max_model_len
    if limit is not None and limit < longest:
        raise RequestError("rollout.max_model_len", limit, f"at least {longest} {words}, or null")
    if job.learner.row_tokens < longest:
        raise RequestError("learner.row_tokens", job.learner.row_tokens, f"at least {next_row(longest)} {words}")
    if isinstance(job, RlJob) and not job.lists.on and job.rollout.width > n_items:
        raise RequestError("rollout.width", job.rollout.width, f"2 to {n_items}, the items of the catalogue")


def check_row_tokens(job: SftJob, longest: int, what: str) -> None:
    """Refuse rows of the learner that are too short for a training row.

    Raises:
        RequestError: names the row that would fit.
    """
    if longest > job.learner.row_tokens:
        legal = f"at least {next_row(longest)} ({what}), or a lower data.max_prompt_tokens"
        raise RequestError("learner.row_tokens", job.learner.row_tokens, legal)


def check_windows(job: SftJob, *, longest_sequence: int, depth: int) -> None:
    """Refuse rows that a window of supervised training may not fit into: `data.history` + 1 items.

    Raises:
        RequestError: names the row and the history that would fit.
    """
    tokens = min(job.data.history + 1, longest_sequence) * depth
    if tokens > job.learner.row_tokens:
        fits = job.learner.row_tokens // depth - 1
        raise RequestError(
            "learner.row_tokens",
            job.learner.row_tokens,
            f"at least {next_row(tokens)} (windows of data.history {job.data.history} + 1 items of {depth} tokens), "
            f"or data.history of at most {fits}",
        )


def check_batch(job: RlJob, rows: int) -> None:
    """Refuse a rollout batch that is larger than the training rows.

    Raises:
        RequestError: names the largest legal batch.
    """
    if job.batch_prompts > rows:
        step = math.lcm(job.rollout.shard_size, job.objective.minibatches)
        legal = f"at most {rows // step * step}, of {rows} training rows, in multiples of {step}"
        raise RequestError("batch_prompts", job.batch_prompts, legal)
