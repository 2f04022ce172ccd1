"""What vLLM offers by itself: prefill alone, `LLM.beam_search`, and beams out of one-token requests.

Built in a process of its own; the functions take plain lists, so that nothing but the engine's work is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.catalogue import Catalogue
from data.trie import ItemTrie
from launch.bench.child import Functions
from rollout import vllm_internals as internals
from trainer.initial_model import CATALOGUE

BLOCK_SIZE = 32
MAX_SEQUENCES = 256
TOKENS_PER_STEP = 4096
CACHE_GIB = 2.0
"""Room for 64 prompts of 511 tokens with 50 beams each, so that nothing is computed twice for want of it."""


def engine_settings(*, dtype: str, longest: int, width: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: the fastest that were found for these ways, and recorded in the answer."""
    return {
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": MAX_SEQUENCES,
        "max_num_batched_tokens": max(TOKENS_PER_STEP, longest),
        "max_logprobs": 2 * width,
        # Log-probabilities over the allowed tokens, which are those of the constrained policy.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": int(CACHE_GIB * 2**30),
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "generation_config": "vllm",
        "disable_log_stats": True,
    }


def build(hf_dir: Path, threads: int, arguments: dict[str, Any]) -> Functions:
    """The engine and its ways; each begins with an empty prefix cache."""
    torch.set_num_threads(threads)
    from vllm import LLM

    llm = LLM(model=str(hf_dir), **arguments)
    requests = Requests(llm, Catalogue.load(hf_dir / CATALOGUE).trie())
    return {
        "prefill": requests.prefill,
        "beam_search": requests.beam_search,
        "one_token": requests.one_token,
        "close": lambda: internals.shutdown(llm),
    }


class Requests:
    """Ways to ask one engine."""

    def __init__(self, llm: Any, trie: ItemTrie) -> None:
        self._llm = llm
        self._trie = trie

    def _start(self, prompts: list[list[int]]) -> list[dict[str, list[int]]]:
        self._llm.reset_prefix_cache()
        return [{"prompt_token_ids": prompt} for prompt in prompts]

    def prefill(self, prompts: list[list[int]]) -> None:
        """`generate(max_tokens=1)`: the prompts and one greedy token."""
        from vllm import SamplingParams

        self._llm.generate(
            self._start(prompts), SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False
        )

    def beam_search(self, prompts: list[list[int]], width: int) -> int:
        """`LLM.beam_search` as it is, without a constraint; returns the number of sequences."""
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(beam_width=width, max_tokens=self._trie.depth, ignore_eos=True)
        outputs = self._llm.beam_search(self._start(prompts), params)
        return sum(len(output.sequences) for output in outputs)

    def one_token(self, prompts: list[list[int]], width: int) -> list[list[tuple[list[int], float]]]:
        """Constrained beams, every step one request per beam that finds its prefix in the cache.

        Returns the beams of each prompt with their scores, best first.
        """
        from vllm import SamplingParams

        self._start(prompts)
        beams: list[list[tuple[list[int], float]]] = [[([], 0.0)] for _ in prompts]
        node_N = torch.zeros(len(prompts), dtype=torch.int64)
        for depth in range(self._trie.depth):
            token_NC, legal_NC = self._trie.children(node_N, depth)
            legal = [row[mask].tolist() for row, mask in zip(token_NC, legal_NC, strict=True)]
            inputs: list[dict[str, list[int]]] = []
            params: list[SamplingParams] = []
            for prompt, live in zip(prompts, beams, strict=True):
                for tokens, _ in live:
                    inputs.append({"prompt_token_ids": prompt + tokens})
                    allowed = legal[len(params)]
                    params.append(
                        SamplingParams(
                            max_tokens=1,
                            temperature=0,
                            logprobs=min(width, len(allowed)),
                            allowed_token_ids=allowed,
                            detokenize=False,
                        )
                    )
            outputs = iter(self._llm.generate(inputs, params, use_tqdm=False))
            beams = [best(live, [next(outputs) for _ in live], width) for live in beams]
            if depth + 1 < self._trie.depth:
                node_N = self._nodes([tokens for live in beams for tokens, _ in live])
        return beams

    def _nodes(self, prefixes: list[list[int]]) -> torch.Tensor:
        token_NT = torch.from_numpy(np.asarray(prefixes, dtype=np.int64))
        node_N = torch.zeros(len(prefixes), dtype=torch.int64)
        for token_N in token_NT.unbind(1):
            node_N = self._trie.step(node_N, token_N)
        return node_N


def best(live: list[tuple[list[int], float]], outputs: list[Any], width: int) -> list[tuple[list[int], float]]:
    """The `width` best continuations of a prompt's beams."""
    grown = [
        ([*tokens, token], score + entry.logprob)
        for (tokens, score), output in zip(live, outputs, strict=True)
        for token, entry in output.outputs[0].logprobs[0].items()
        if entry.logprob > float("-inf")
    ]
    return sorted(grown, key=lambda beam: -beam[1])[:width]
