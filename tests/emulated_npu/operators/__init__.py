"""The emulated operators of torch_npu. Every other one of its namespaces `npu` and `atb` raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.emulated_npu.kernels import Launcher
from tests.emulated_npu.operators import caches, experts, fused, norms, quantised, ropes, sampling  # noqa: F401
from tests.emulated_npu.operators.formats import replace_format_cast
from tests.emulated_npu.operators.registry import BY_DESCRIPTION, REFERENCES, overload

# Operators whose own C++ is wanted: they look at a tensor's description and run nothing on the device.
NATIVE = frozenset(
    {
        "npu::get_npu_format",
        "npu::get_storage_size",
        "npu::_npu_fused_infer_attention_score_infer_output",  # allocates the results, no more
        "npu::_npu_fused_infer_attention_score_v2_infer_output",
    }
)


def replace_npu(launcher: Launcher) -> list[torch.library.Library]:
    """The libraries must be kept: the kernels go with them."""
    libraries = {name: torch.library.Library(name, "IMPL") for name in ("npu", "atb")}
    for name, reference in REFERENCES.items():
        namespace, rest = name.split("::")
        libraries[namespace].impl(rest, reference.function, "CPU")
        kernel = launcher.kernel(overload(name), reference.shapes, host_only=reference.host_only)
        libraries[namespace].impl(rest, _inspected(kernel, reference.inspect), "PrivateUse1", allow_override=True)
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, rest = name.split("::")
        if namespace in libraries and name not in REFERENCES and name not in NATIVE | set(BY_DESCRIPTION):
            libraries[namespace].impl(rest, _missing(name), "PrivateUse1", allow_override=True)
    return [*libraries.values(), replace_format_cast()]


def _inspected(kernel: Callable[..., Any], inspect: Callable[..., None] | None) -> Callable[..., Any]:
    if inspect is None:
        return kernel

    def run(*args: Any, **kwargs: Any) -> Any:
        inspect(*args, **kwargs)
        return kernel(*args, **kwargs)

    return run


def _missing(name: str) -> Callable[..., Any]:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not emulated")

    return raises
