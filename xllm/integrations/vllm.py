"""`XllmConnector`: vLLM's KV blocks in our shared store (V1's connector interface).

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "XllmConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "xllm.integrations.vllm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"folder": "/mnt/kv", "size": "50GiB"}}'

vLLM makes it twice: where it schedules (`BlockPlan`) and in each rank's process (`BlockCopies`).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from xllm.integrations.block_copies import BlockCopies
from xllm.integrations.block_plan import BlockPlan, StepRuns
from xllm.integrations.block_writer import BlockWriter
from xllm.kv.store_client import KVStoreClient
from xllm.sizes import parse_amount
from xllm.suggestion import nearest

# The members of `kv_connector_extra_config`, with their defaults.
SETTINGS: dict[str, Any] = {"folder": None, "size": "0", "key_file": None, "namespace": "", "refresh_s": 1.0,
                            "write_buffer": "256MiB"}
# That share a sequence's blocks among ranks, or give a rank some of the layers.
NOT_BUILT = ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """From where vLLM schedules to the ranks."""

    runs: StepRuns = field(default_factory=StepRuns)


class XllmConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Raises ValueError (or ConfigError, which is one) where vLLM is set up so that it cannot work.

    Requests with an adapter, media or embeddings as their prompt are neither loaded nor saved: their KV depends on more
    than their tokens.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = read_settings(self._kv_transfer_config.kv_connector_extra_config)
        check_setup(vllm_config, kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._plan: BlockPlan | None = None
        self._store: KVStoreClient | None = None
        self._writer: BlockWriter | None = None
        self._copies: BlockCopies | None = None
        self._failed = frozenset[int]()
        if role is KVConnectorRole.SCHEDULER:
            stores = [self._client(rank, "0") for rank in range(vllm_config.parallel_config.tensor_parallel_size)]
            self._plan = BlockPlan(stores, self._block_size, loads=self._kv_transfer_config.is_kv_consumer,
                                   saves=self._kv_transfer_config.is_kv_producer)

    def _client(self, rank: int, size: str) -> KVStoreClient:
        group = self._kv_cache_config.kv_cache_groups[0]
        return KVStoreClient(
            self._settings["folder"], namespace_of(self._vllm_config, self._kv_cache_config, rank,
                                                   self._settings["namespace"]),
            block_size=self._block_size, block_bytes=group.kv_cache_spec.page_size_bytes * len(group.layer_names),
            size=size, key_file=self._settings["key_file"], refresh_s=self._settings["refresh_s"])

    # --- where vLLM schedules

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._plan is not None
        if not depends_on_tokens_alone(request):
            return 0, False
        return self._plan.num_loadable(request.request_id, request.prompt_token_ids, num_computed_tokens,
                                       request.cache_salt or ""), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._plan is not None
        if depends_on_tokens_alone(request):
            self._plan.begin(request.request_id, request.prompt_token_ids, num_external_tokens,
                             request.cache_salt or "")

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self._plan is not None
        step, scheduled, cached = StepMetadata(), scheduler_output.num_scheduled_tokens, (
            scheduler_output.scheduled_cached_reqs)
        for new in scheduler_output.scheduled_new_reqs:
            self._plan.step(new.req_id, new.block_ids[0], new.num_computed_tokens, scheduled[new.req_id], step.runs,
                            begins=True)
        for request_id, block_ids, num_computed in zip(cached.req_ids, cached.new_block_ids,
                                                       cached.num_computed_tokens, strict=True):
            self._plan.step(request_id, () if block_ids is None else block_ids[0], num_computed, scheduled[request_id],
                            step.runs, begins=request_id in cached.resumed_req_ids)
        return step

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._plan is not None
        if connector_output.invalid_block_ids:
            self._plan.failed(connector_output.invalid_block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._plan is not None
        self._plan.end(request.request_id)
        return False, None

    # --- in the process of a rank

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        writes = self._kv_transfer_config.is_kv_producer
        self._store = self._client(get_tensor_model_parallel_rank(), self._settings["size"] if writes else "0")
        if writes:
            self._writer = BlockWriter(self._store, parse_amount("write_buffer", self._settings["write_buffer"])[0])
        layers = {name: kv_caches[name] for name in self._kv_cache_config.kv_cache_groups[0].layer_names}
        for name, layer in layers.items():
            if layer.shape[0] != self._kv_cache_config.num_blocks:
                raise ValueError(f"XllmConnector: layer {name} keeps {layer.shape[0]} blocks where vLLM counts "
                                 f"{self._kv_cache_config.num_blocks}: its kernel has blocks of another size")
        self._copies = BlockCopies(self._store, self._writer, layers)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._copies is not None and self.has_connector_metadata():
            self._failed = self._copies.load(self._get_connector_metadata().runs.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are taken with all their layers, once the step has filled them."""

    def wait_for_save(self) -> None:
        if self._copies is not None and self.has_connector_metadata():
            self._copies.save(self._get_connector_metadata().runs.saves)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, frozenset()
        return set(failed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """Nothing of a request outlives it: its blocks were copied before its last step ended."""
        if self._copies is not None:
            self._copies.forget(finished_req_ids)
        return None, None

    def shutdown(self) -> None:
        """Write what waits to be written. Idempotent."""
        if self._writer is not None:
            self._writer.close()
        if self._store is not None:
            self._store.close()


def depends_on_tokens_alone(request: Any) -> bool:
    """Whether the KV of a request is a function of its tokens and its salt."""
    return (request.prompt_token_ids is not None and not request.mm_features and request.lora_request is None
            and getattr(request, "prompt_embeds", None) is None)


def read_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError naming the member."""
    for name in given:
        if name not in SETTINGS:
            raise ValueError(f"kv_connector_extra_config: unknown member {name!r}{nearest(name, list(SETTINGS))}")
    if not given.get("folder"):
        raise ValueError("kv_connector_extra_config.folder must name the folder of the store")
    return {**SETTINGS, **given}


def check_setup(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError for what would go wrong later."""
    transfer = vllm_config.kv_transfer_config
    if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "recompute":
        raise ValueError("XllmConnector needs kv_load_failure_policy \"recompute\": that a block is damaged is found "
                         "when it is read, and vLLM would fail the request")
    if transfer.is_kv_producer and not parse_amount(
            "kv_connector_extra_config.size", transfer.kv_connector_extra_config.get("size", "0"))[0]:
        raise ValueError("kv_connector_extra_config.size must say how much may be stored, such as 50GiB; with "
                         "kv_role \"kv_consumer\" nothing is")
    for name in NOT_BUILT:
        if getattr(vllm_config.parallel_config, name, 1) > 1:
            raise ValueError(f"XllmConnector does not work with {name} above 1")
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise ValueError(f"XllmConnector works with one group of full attention layers, and the model has: {kinds}")


def namespace_of(vllm_config: Any, kv_cache_config: Any, rank: int, own: str) -> dict[str, object]:
    """What the bytes of a block depend on beside its tokens. Computed alike where vLLM schedules and in each rank.

    own: what the user says besides, such as the version of weights that have kept their name.
    """
    model, group = vllm_config.model_config, kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    return {
        "engine": f"vllm {version('vllm')}", "model": model.model, "revision": model.revision, "own": own,
        "factors": model.compute_hash(), "layers": list(group.layer_names), "rank": rank,
        "ranks": vllm_config.parallel_config.tensor_parallel_size, "kind": type(spec).__name__,
        "dtype": str(spec.dtype), "heads": spec.num_kv_heads, "width": [spec.head_size, spec.head_size_v],
        "cache_dtype": str(vllm_config.cache_config.cache_dtype), "layout": kv_cache_config.kv_cache_layout,
        # How a processor's kernels pack a block depends on what it can do.
        "device": [current_platform.device_name, platform.machine(),
                   torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else ""]}
