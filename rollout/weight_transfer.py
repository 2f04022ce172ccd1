"""The push inside a vLLM worker: an engine registered with vLLM's weight-transfer interface, and the receiving mixin.

vLLM drives it as it drives its own backends: `start_weight_update`, one `update_weights` with the metadata message
(the buckets come through the mover), `finish_weight_update`. Loading goes through vLLM's layerwise reload, because its
CPU linears repack their weight and leave the parameter empty. That reload never repacks a head that is tied to the
embedding: its layer owns no tensor of its own, so it keeps the old copy without a word. `repack_shared` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout import vllm_internals as internals
from rollout.buckets import BucketError
from rollout.live_adapter import ROWS, LiveAdapter, is_adapter
from rollout.receiving import Inbox, PushFault, PushMessage, Receipt

BACKEND = "windlass"
"""Name of the backend: `weight_transfer_config={"backend": BACKEND}`."""


@dataclass
class PushInitInfo(internals.WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on beforehand: the endpoint comes with every message."""


@dataclass
class PushUpdateInfo(internals.WeightTransferUpdateInfo):  # type: ignore[misc]
    """The metadata message of a push."""

    message: PushMessage
    rank: int
    """Receiver rank of this worker."""


class PushTransferEngine(internals.WeightTransferEngine):  # type: ignore[misc]
    """Receives packed buckets through any mover."""

    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._inbox = Inbox()
        self._loaded: set[str] = set()
        self._message: PushMessage
        self.receipt: Receipt | None = None
        """Of the last push."""

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        """Nothing to do; see `PushInitInfo`."""

    def start_weight_update(self) -> None:
        """Prepare the model for the layerwise reload."""
        self.receipt = None
        self._loaded = set()
        internals.initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        """Receive, verify and load every bucket; see `Inbox.receive` for the errors."""
        message = update_info.message
        self._message = message

        def load(tensors: list[tuple[str, Tensor]]) -> None:
            self._loaded |= self.model.load_weights(tensors)

        self.receipt = self._inbox.receive(message, rank=update_info.rank, device=str(self.device), load=load)

    def finish_weight_update(self) -> None:
        """Process what was loaded.

        Raises:
            BucketError: a parameter of the model was not part of the push.
        """
        internals.finalize_layerwise_reload(self.model, self.model_config)
        missing = sorted({name for name, _ in self.model.named_parameters()} - self._loaded)
        if missing and not self._message.blind:
            raise BucketError(f"the push did not load {', '.join(missing)}")
        if self._message.fault is not PushFault.WITHHOLD_HEAD:
            repack_shared(self.model)

    def receive_adapter(self, message: PushMessage, rank: int) -> dict[str, Tensor]:
        """Receive and verify an adapter; nothing of the model is touched."""
        tensors: dict[str, Tensor] = {}
        self.receipt = self._inbox.receive(message, rank=rank, device=str(self.device), load=tensors.update)
        return tensors

    def abandon_adapter(self, error: BaseException) -> None:
        """Tell the sender."""
        self._inbox.fail(f"{type(error).__name__}: {error}")

    def abandon(self, error: BaseException) -> None:
        """Tell the sender, and give the layers their tensors back; some are of the old version, some of the new.

        Without it a later push would meet half-filled layers, complete them with its first tensors and drop the rest.
        """
        self._inbox.fail(f"{type(error).__name__}: {error}")
        internals.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Drop the connection to the sender."""
        self._inbox.close()


def repack_shared(model: torch.nn.Module) -> list[str]:
    """Repack the modules whose weight another module owns (a tied head); returns their names.

    Modules that own their weight were processed by the layerwise reload. Where nothing is packed (GPU), the processing
    of an unquantised head leaves the weight as it is.
    """
    owners: dict[int, str] = {}
    repacked = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in owners and parameter.numel():
                internals.process_weights_after_loading(module)
                repacked.append(name)
            owners.setdefault(id(parameter), name)
    return repacked


def register_engine() -> None:
    """Make the backend known to vLLM in this process; may be called again."""
    if not internals.weight_transfer_registered(BACKEND):
        internals.register_weight_transfer(BACKEND, PushTransferEngine)


class WeightReceiver:
    """Mixin of the vLLM worker extension; the methods of the worker it is mixed into do the rest.

    Importing this module registers the backend, so a worker that has the extension can build the engine.
    """

    weight_transfer_engine: PushTransferEngine

    def receive_push(self, message: PushMessage, first_rank: int) -> Receipt:
        """One whole push into this worker.

        Args:
            message: the metadata.
            first_rank: receiver rank of the first worker of this engine.

        Raises:
            BucketError: a bucket or a parameter is missing or wrong.
            MoverError: the sender failed or fell silent.
        """
        worker: Any = self
        if is_adapter(spec.name for spec in message.layout.specs):
            return self._receive_adapter(message, first_rank + worker.rank)
        try:
            worker.start_weight_update()
            worker.update_weights({"message": message, "rank": first_rank + worker.rank})
            worker.finish_weight_update()
        except BaseException as error:
            self.weight_transfer_engine.abandon(error)
            raise
        receipt = self.weight_transfer_engine.receipt
        if receipt is None:
            raise BucketError(f"the push of version {message.version} left no receipt")
        return receipt

    def _receive_adapter(self, message: PushMessage, rank: int) -> Receipt:
        """The factors as an adapter of the message's version, the rows into the model; the last adapter is retired."""
        worker: Any = self
        engine, shape = self.weight_transfer_engine, worker.windlass_live_adapter
        if not shape.on:
            raise BucketError(f"version {message.version} is an adapter, and the engine was started without one")
        try:
            tensors = engine.receive_adapter(message, rank)
            replace_rows(worker.model_runner.model, tensors, shape)
            factors = {name: value for name, value in tensors.items() if not name.startswith(ROWS)}
            worker.windlass_adapter_slot.request = internals.replace_lora(
                worker.model_runner, factors, version=message.version, rank=shape.rank, alpha=shape.alpha
            )
        except BaseException as error:
            engine.abandon_adapter(error)
            raise
        if engine.receipt is None:
            raise BucketError(f"the push of version {message.version} left no receipt")
        return engine.receipt


@torch.no_grad()
def replace_rows(model: torch.nn.Module, tensors: Mapping[str, Tensor], shape: LiveAdapter) -> None:
    """Write the rows of an adapter into the embedding, and into a head of its own; a tied head follows.

    Raises:
        BucketError: a matrix is not there, or was repacked (an untied head on CPU), or the rows are others.
    """
    rows = {name.removeprefix(ROWS).removesuffix(".weight"): v for name, v in tensors.items() if name.startswith(ROWS)}
    for name, rows_NH in rows.items():
        module: Any = dict(model.named_modules()).get(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None or not weight.numel() or len(rows_NH) != shape.rows:
            raise BucketError(f"rows of {name}: {len(rows_NH)} for a matrix that is absent or packed")
        weight.data[shape.first_row : shape.first_row + shape.rows] = rows_NH.to(weight.dtype)
    if rows:
        repack_shared(model)


def take_push(llm: Any, message: PushMessage, rank: int) -> Receipt:
    """One push into all workers of a `vllm.LLM` whose extension mixes `WeightReceiver` in.

    Raises:
        BucketError: see `WeightReceiver.receive_push`, or the workers received different bytes.
        MoverError: see there.
    """
    receipts: Sequence[Receipt] = llm.collective_rpc("receive_push", args=(message, rank))
    if len({receipt.checksums for receipt in receipts}) != 1:
        raise BucketError(f"the workers of an engine received different buckets of version {message.version}")
    llm.reset_prefix_cache()
    return receipts[0]


register_engine()
