"""The learner's half of a push: an outbox that lives in the process that holds the gathered weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.faults import fault_point
from data.records import FloatArray
from rollout.buckets import TensorSpec, describe_module, pack
from rollout.kept_push import KeptWriter
from rollout.movers import ON_CARDS, BucketSender, Deadline, Endpoint, MoverRequest, open_sender
from rollout.probe import Gap, Probe, ProbeAnswer, probe_gap
from rollout.receiving import PushMessage, Receipt


class Outbox:
    """Keeps the sending end of a mover over pushes, and packs and sends the buckets.

    With a sharded learner every rank iterates the gathering source, and rank 0 alone has an outbox.
    """

    def __init__(self) -> None:
        self._sender: BucketSender | None = None
        self._request: MoverRequest | None = None

    def open(self, request: MoverRequest) -> Endpoint:
        """Endpoint for the metadata message; the same one while the receivers stay the same and all goes well."""
        if self._sender is None or request != self._request:
            self.close()
            self._sender = open_sender(request)
            self._request = request
        return self._sender.endpoint

    def send(self, message: PushMessage, tensors: Iterable[tuple[str, Tensor]]) -> Receipt:
        """Pack and send, and keep where the message asks for it; returns when every receiver has taken everything.

        Args:
            message: the metadata the receivers got.
            tensors: (name, whole tensor) in the order of the layout; tied ones may come twice.

        Raises:
            BucketError: the tensors are not those of the layout.
            MoverError: a receiver failed or fell silent until the deadline, or the buckets cannot be kept.
        """
        begun = time.monotonic()
        deadline = Deadline(message.deadline_s)
        sender = self._sender
        if sender is None or sender.endpoint != message.endpoint:
            raise ValueError("the message names an endpoint that this outbox has not opened")
        on_gpu = sender.endpoint.kind in ON_CARDS
        checksums = []
        kept = None
        try:
            kept = KeptWriter(Path(message.keep)) if message.keep else None
            with torch.no_grad():
                for _, buffer, digest in pack(
                    message.layout, tensors, version=message.version, device="cuda" if on_gpu else "cpu"
                ):
                    fault_point("push")
                    sender.send(buffer, deadline)
                    if kept is not None:
                        kept.write(buffer)
                    checksums.append(digest)
            sender.finish(deadline)
            if kept is not None:
                kept.finish()
        except BaseException as error:
            if kept is not None:
                kept.abandon()
            sender.fail(f"{type(error).__name__}: {error}")
            self.close()
            raise
        return Receipt(
            version=message.version,
            checksums=tuple(checksums),
            tensors=len(message.layout.specs),
            nbytes=message.layout.total_bytes,
            seconds=time.monotonic() - begun,
        )

    def close(self) -> None:
        """Free the mover."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class ModuleSource:
    """The learner's methods of the weight channel for a whole Hugging Face model in this process.

    A sharded learner offers the same methods on every rank; see `WeightChannel`.
    """

    def __init__(self, model: torch.nn.Module, *, wire_dtype: str | None = None) -> None:
        self.model = model
        self._wire_dtype = wire_dtype
        self._outbox = Outbox()

    def describe_weights(self) -> tuple[list[TensorSpec], dict[str, str]]:
        """Specs of the tensors that travel, and tied names."""
        return describe_module(self.model, self._wire_dtype)

    def open_push(self, request: MoverRequest) -> Endpoint:
        """See `Outbox.open`."""
        return self._outbox.open(request)

    def send_push(self, message: PushMessage) -> Receipt:
        """See `Outbox.send`."""
        return self._outbox.send(message, self.model.state_dict(keep_vars=True).items())

    def answer_probe(self, probe: Probe) -> ProbeAnswer:
        """Log-probabilities of the probe, and their noise when the model is not float32."""
        short = next(self.model.parameters()).dtype != torch.float32
        return ProbeAnswer(
            logp=tuple(score_module(self.model, probe)), noise=self.probe_noise(probe) if short else None
        )

    def probe_noise(self, probe: Probe) -> Gap:
        """The model's own gap to a wider type on the probe."""
        single = next(self.model.parameters()).dtype == torch.float32
        wider = copy.deepcopy(self.model).to(torch.float64 if single else torch.float32)
        return probe_gap(score_module(self.model, probe), score_module(wider, probe))

    def close(self) -> None:
        """Free the mover."""
        self._outbox.close()


@torch.inference_mode()
def score_module(model: torch.nn.Module, probe: Probe) -> list[FloatArray]:
    """Full-vocabulary log-probabilities of the completion tokens at temperature 1, one sequence at a time."""
    device = next(model.parameters()).device
    scores = []
    for prompt, completion in zip(probe.prompts, probe.completions, strict=True):
        tokens = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
        logits_TV = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].float()
        logp_T = logits_TV.log_softmax(-1).gather(1, tokens[len(prompt) :, None])[:, 0]
        scores.append(logp_T.cpu().numpy())
    return scores
