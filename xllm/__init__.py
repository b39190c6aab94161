"""xLLM: an LLM inference engine. Public names load on first use, so that importing the package stays cheap."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xllm.env import leave_torch_backends_asleep, let_openmp_sleep
from xllm.own_packages import check_own_packages
from xllm.version import __version__

if TYPE_CHECKING:
    from xllm.async_llm import AsyncLLM as AsyncLLM
    from xllm.config import EngineConfig as EngineConfig
    from xllm.kv.store_client import KVStoreClient as KVStoreClient
    from xllm.llm import LLM as LLM
    from xllm.outputs import CompletionOutput as CompletionOutput
    from xllm.outputs import EmbeddingOutput as EmbeddingOutput
    from xllm.outputs import RequestOutput as RequestOutput
    from xllm.pooling import PoolingParams as PoolingParams
    from xllm.request import SamplingParams as SamplingParams
    from xllm.structured.spec import StructuredOutput as StructuredOutput

check_own_packages()
leave_torch_backends_asleep()
let_openmp_sleep()

_HOMES = {
    "AsyncLLM": "xllm.async_llm",
    "CompletionOutput": "xllm.outputs",
    "EmbeddingOutput": "xllm.outputs",
    "EngineConfig": "xllm.config",
    "KVStoreClient": "xllm.kv.store_client",
    "LLM": "xllm.llm",
    "PoolingParams": "xllm.pooling",
    "RequestOutput": "xllm.outputs",
    "SamplingParams": "xllm.request",
    "StructuredOutput": "xllm.structured.spec",
}

__all__ = [
    "AsyncLLM", "CompletionOutput", "EmbeddingOutput", "EngineConfig", "KVStoreClient", "LLM", "PoolingParams",
    "RequestOutput", "SamplingParams", "StructuredOutput", "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xllm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
