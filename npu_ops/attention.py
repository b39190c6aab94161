"""Attention over the paged cache by one operator for every step: prefill, chunks, decode and drafts; that over latents,
and that over keys and values made of them.

`npu_fused_infer_attention_score` with layout TND (tokens of all sequences one after the other), keys and values where
the block table says, and the causal mask aligned to the last query and the last key (sparse mode 3), for which the
operator wants a fixed triangle of 2048 x 2048. The lengths are lists of the host, so that in a graph each launch is a
task (`recording.py`).

Letters: T tokens, S sequences, N query heads, K kv heads, H head dim, B blocks, P tokens per block, M blocks each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_ops.contracts import MASK_SIZE, PACKED, check
from npu_ops.recording import TaskRecorder, current_recorder, weak

CAUSAL, BAND = 3, 4  # sparse modes
UNBOUNDED = 2**31 - 1  # tokens before or behind a query, where a band has no limit: the operator's own default
_masks: dict[torch.device, Tensor] = {}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of a step, on the host: where each sequence's tokens end, and how many keys it has with them."""

    query_ends: list[int] = field(default_factory=list)
    kv_lens: list[int] = field(default_factory=list)


def causal_mask(device: torch.device) -> Tensor:
    """int8 [2048, 2048], 1 above the diagonal; made once a device, outside of any capture."""
    if device not in _masks:
        _masks[device] = torch.ones((MASK_SIZE, MASK_SIZE), dtype=torch.int8, device=device).triu_(1)
    return _masks[device]


def paged_attention(
    *, query_TNH: Tensor, key_BPX: Tensor, value_BPX: Tensor, block_table_SM: Tensor, lengths: Callable[[], Lengths],
    num_kv_heads: int, scale: float, sliding_window: int | None = None,
) -> Tensor:
    """[T, N, H] in the query's dtype. key, value: [B, P, K * H].

    lengths: asked for at each issue; a captured call keeps it. sliding_window: how many keys a query sees, itself
    included; None: all.
    """  # fmt: skip
    options = {
        "atten_mask": causal_mask(query_TNH.device), "block_table": block_table_SM, "block_size": key_BPX.shape[1],
        "input_layout": "TND", "num_heads": query_TNH.shape[1], "num_key_value_heads": num_kv_heads, "scale": scale,
        **_mask_mode(sliding_window),
    }  # fmt: skip
    return _launch("npu_fused_infer_attention_score", ("actual_seq_lengths", "actual_seq_lengths_kv"),
                   {"query": query_TNH, "key": key_BPX, "value": value_BPX}, options, lengths)


def latent_attention(
    *, query_TNL: Tensor, query_rope_TNR: Tensor, key_BPL: Tensor, key_rope_BPR: Tensor, block_table_SM: Tensor,
    lengths: Callable[[], Lengths], scale: float,
) -> Tensor:
    """Attention over a latent cache (DeepSeek's MLA, absorbed form), up to 16 tokens a sequence: [N, T, L].

    L is 512, R, the rotated part, 64. Keys and values are the same numbers; the rotated part scores only.
    """  # fmt: skip
    options = {
        "query_rope": query_rope_TNR, "key_rope": key_rope_BPR, "atten_mask": causal_mask(query_TNL.device),
        "block_table": block_table_SM, "block_size": key_BPL.shape[1], "input_layout": "TND_NTD",
        "num_query_heads": query_TNL.shape[1], "num_key_value_heads": 1, "softmax_scale": scale, "sparse_mode": CAUSAL,
    }  # fmt: skip
    return _launch("npu_fused_infer_attention_score_v2", ("actual_seq_qlen", "actual_seq_kvlen"),
                   {"query": query_TNL, "key": key_BPL, "value": key_BPL}, options, lengths)


def packed_attention(*, query_TNH: Tensor, key_CNH: Tensor, value_CNV: Tensor, lengths: Lengths,
                     scale: float) -> Tensor:
    """Attention over keys and values that lie one after the other, not in blocks, as many heads as queries have:
    [T, N, V]. H is 192 and V 128, or both are the same (`contracts.takes_made_widths`). lengths: where the queries, and
    where the keys of each sequence end. Not for captures, which keep them."""
    options = {
        "atten_mask": causal_mask(query_TNH.device), "input_layout": "TND", "num_query_heads": query_TNH.shape[1],
        "num_key_value_heads": key_CNH.shape[1], "softmax_scale": scale, "sparse_mode": CAUSAL,
        "actual_seq_qlen": lengths.query_ends, "actual_seq_kvlen": lengths.kv_lens,
    }  # fmt: skip
    assert current_recorder() is None
    given = {"query": query_TNH, "key": key_CNH, "value": value_CNV, **options}
    check(f"npu_fused_infer_attention_score_v2{PACKED}", **_renamed(given))
    out: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2(**given)[0]
    return out


def _mask_mode(sliding_window: int | None) -> dict[str, int]:
    """A band starts that many tokens before a query's own place."""
    if sliding_window is None:
        return {"sparse_mode": CAUSAL}
    return {"sparse_mode": BAND, "pre_tokens": sliding_window - 1, "next_tokens": 0}


def _launch(name: str, length_names: tuple[str, str], tensors: dict[str, Tensor], options: dict[str, Any],
            lengths: Callable[[], Lengths]) -> Tensor:
    def arguments(kept: dict[str, Any]) -> dict[str, Any]:
        now = lengths()
        given = {**kept, length_names[0]: now.query_ends, length_names[1]: now.kv_lens}
        check(name, **_renamed(given))
        return given

    recorder, op = current_recorder(), getattr(torch.ops.npu, name)
    if recorder is None:
        out: Tensor = op(**arguments({**tensors, **options}))[0]
        return out
    return _record(recorder, name, op, {**tensors, **options}, arguments)


def _record(recorder: TaskRecorder, name: str, op: Any, given: dict[str, Any],
            arguments: Callable[[dict[str, Any]], dict[str, Any]]) -> Tensor:
    """The launch as a task of the capture, over outputs and a workspace that stay where they are."""
    query = given["query"]
    out, lse = _outputs(name, given)
    key = (name, query.shape, *(given.get(k) for k in ("sparse_mode", "pre_tokens")), given["num_key_value_heads"])
    workspace = recorder.workspace(key, lambda: _workspace(name, arguments(given)))
    kept = {k: weak(v) if isinstance(v, Tensor) else v for k, v in given.items()}
    results = [weak(out), weak(lse)]
    recorder.add(lambda: op.out(**arguments(kept), workspace=workspace, out=results))
    return out


def _outputs(name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query = given["query"]
    transposed = given["input_layout"].endswith("NTD")
    shape = (query.shape[1], query.shape[0], query.shape[2]) if transposed else tuple(query.shape)
    return query.new_empty(shape), query.new_empty(1, dtype=torch.float32)


def _workspace(name: str, given: dict[str, Any]) -> Tensor:
    """As large as any lengths of these shapes need."""
    made: Tensor = getattr(torch.ops.npu, f"_{name}_get_max_workspace")(**given)
    return made


# The contract names arguments as the first version of the operator does.
_FIRST_NAMES = {"actual_seq_qlen": "actual_seq_lengths", "actual_seq_kvlen": "actual_seq_lengths_kv",
                "num_query_heads": "num_heads"}


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokens": UNBOUNDED, "next_tokens": UNBOUNDED,
            **{_FIRST_NAMES.get(name, name): value for name, value in given.items()}}
