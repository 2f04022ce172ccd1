"""Transformers' `generate` with beams, under the same trie by a vectorised logits processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.catalogue import Catalogue
from data.constraint import LegalSets, legal_log_softmax
from data.trie import ItemTrie
from launch.bench.child import Functions
from launch.bench.settings import Device
from trainer.initial_model import CATALOGUE

PROMPTS_PER_CALL = 8
"""Prompts of one call of `generate`; with 16 beams on two cores the fastest of 1, 4, 8, 16 and 64."""


class TrieProcessor:
    """A transformers `LogitsProcessor`: log-probabilities renormalised over the children of each beam's node."""

    def __init__(self, trie: ItemTrie, prompt_length: int) -> None:
        self._trie = trie
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[N, V]`, minus infinity where not legal."""
        token_NT = input_ids[:, self._prompt_length :]
        depth = token_NT.shape[1]
        node_N = torch.zeros(len(token_NT), dtype=torch.int64, device=token_NT.device)
        for token_N in token_NT.unbind(1):
            node_N = self._trie.step(node_N, token_N)
        # Where fewer continuations than beams exist, generate fills up with beams that are none.
        lost_N = node_N < 0
        token_NC, legal_NC = self._trie.children(node_N.masked_fill(lost_N, int(self._trie.level_start[depth])), depth)
        legal_NC &= ~lost_N[:, None]
        logp_NC = legal_log_softmax(scores, LegalSets(token_NC=token_NC, legal_NC=legal_NC), 1.0)
        # Padding repeats tokens, so a plain scatter could overwrite a legal one.
        return torch.full_like(scores, -torch.inf).scatter_reduce(1, token_NC, logp_NC.to(scores.dtype), "amax")


def build(hf_dir: Path, threads: int, dtype: str, device: Device) -> Functions:
    """The model and `beams`."""
    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = model.eval().to(device.value)
    trie = Catalogue.load(hf_dir / CATALOGUE).trie().to(torch.device(device.value))

    def beams(prompts: list[list[int]], width: int) -> list[list[tuple[list[int], float]]]:
        """Beams of each prompt (all of one length) with their scores, best first."""
        found = []
        for start in range(0, len(prompts), PROMPTS_PER_CALL):
            found += generate(model, trie, prompts[start : start + PROMPTS_PER_CALL], width)
        return found

    return {"beams": beams, "close": lambda: None}


@torch.inference_mode()
def generate(model: Any, trie: ItemTrie, prompts: list[list[int]], width: int) -> list[list[tuple[list[int], float]]]:
    """One call of `generate`."""
    from transformers import LogitsProcessorList

    input_ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_processor=LogitsProcessorList([TrieProcessor(trie, input_ids.shape[1])]),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=trie.depth,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    token_PWT = out.sequences[:, input_ids.shape[1] :].view(len(prompts), width, -1).tolist()
    score_PW = out.sequences_scores.view(len(prompts), width).tolist()
    return [
        [(tokens, score) for tokens, score in zip(token_WT, score_W, strict=True) if score > float("-inf")]
        for token_WT, score_W in zip(token_PWT, score_PW, strict=True)
    ]
