"""The contracts of the operators that steps call; `quant_contracts.py` and `moe_contracts.py` have the others.

Sources: DOC is the description of an operator that torch_npu carries itself (`torch_npu/_op_plugin_docs.py`, 2.13.0);
numbers with a # are issues or pull requests of vllm-project/vllm-ascend. CANN is its description of
aclnnFusedInferAttentionScoreV3 and V4 (9.1.0), which is newer than DOC, and the tiling that checks it.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_ops.contract import (
    CHECKING,
    FLOATS,
    HALVES,
    INDICES,
    Contract,
    Rule,
    contiguous,
    dtypes,
    on_one_device,
    one_of,
    ranks,
    same_dtype,
    same_shape,
)
from npu_ops.moe_contracts import MOE_CONTRACTS
from npu_ops.quant_contracts import QUANT_CONTRACTS

DOC = "torch_npu operator docs"
CANN = "CANN 9.1, aclnnFusedInferAttentionScore"
MASK_SIZE = 2048  # of the mask that sparse modes 2 to 4 want
BLOCK_SIZES = (128, 256, 384, 512)  # tokens of a KV block that the attention operator is documented for
LATENT_WIDTHS = (512, 64)  # of a latent, and of its rotated part
LATENT_BLOCK_SIZES = (16, 128)  # tokens
LATENT_HEADS = (32, 64, 128)  # newer versions take smaller powers of two as well
LATENT_QUERIES = 16  # of one sequence at most
PACKED = ", packed keys"  # the form of the operator that takes no blocks
MADE_SEQUENCES, MADE_POSITIONS = 4096, 2**20  # of one call of it
MASKS = (torch.bool, torch.int8, torch.uint8)


def _lengths(a: Any) -> list[int]:
    """Tokens of each query, from the cumulative list."""
    ends = a.actual_seq_lengths
    return [end - start for start, end in zip([0, *ends], ends)]


def _blocks_fit(a: Any) -> bool:
    most = max((-(-n // a.block_size) for n in a.actual_seq_lengths_kv), default=0)
    return (a.block_table.ndim == 2 and len(a.block_table) == len(a.actual_seq_lengths_kv)
            and a.block_table.shape[1] >= most)


def _blocks_exist(a: Any) -> bool:
    table, lengths = a.block_table.cpu(), a.actual_seq_lengths_kv
    return all(bool(((row[: -(-n // a.block_size)] >= 0) & (row[: -(-n // a.block_size)] < len(a.key))).all())
               for row, n in zip(table, lengths))


def _slots_differ(a: Any) -> bool:
    """Padding tokens all go to the first slot, whose contents nobody reads."""
    slots = a.slot_mapping[a.slot_mapping > 0].cpu()
    return len(slots.unique()) == len(slots)


def takes_made_widths(key: int, value: int) -> bool:
    """Whether attention over packed keys of such width takes such values."""
    return (key, value) == (192, 128) or (key == value and key % 16 == 0 and key <= 256)


def _packed_lengths_fit(a: Any) -> bool:
    """Both lists are cumulative, and no sequence has more queries than keys."""
    ends = a.actual_seq_lengths_kv
    keys = [end - start for start, end in zip([0, *ends], ends)]
    return len(keys) == len(a.actual_seq_lengths) and all(0 <= q <= kv for q, kv in zip(_lengths(a), keys))


PAGED_ATTENTION = (
    on_one_device("query", "key", "value", "atten_mask", "block_table"),
    Rule("a paged key and value must have fewer than 2^31 numbers",
         f"{DOC}: the product of their axes within int32; kernels count them in 32 bits",
         lambda a: a.key.numel() < 2**31),
    dtypes(DOC, HALVES, "query", "key", "value"),
    same_dtype(DOC, "query", "key", "value"),
    contiguous(f"{DOC}: 'does not support non-contiguous tensors'", "query", "key", "value", "atten_mask"),
    one_of("house rule: one path", "input_layout", ("TND",)),
    ranks(DOC, 3, 3, "query", "key", "value"),
    same_shape(f"{DOC}: 'key and value must have one shape'", "key", "value"),
    Rule("num_heads must be the query's second axis", DOC, lambda a: a.query.shape[1] == a.num_heads),
    Rule("num_heads must be a multiple, at most 64-fold, of num_key_value_heads", DOC,
         lambda a: a.num_key_value_heads > 0 and a.num_heads % a.num_key_value_heads == 0
         and a.num_heads <= 64 * a.num_key_value_heads),
    Rule("there may be at most 256 heads", DOC, lambda a: a.num_heads <= 256),
    Rule("the head dimension must be a multiple of 16 of at most 512", DOC,
         lambda a: a.query.shape[2] % 16 == 0 and a.query.shape[2] <= 512),
    Rule("the cache must be [blocks, block_size, kv heads * head dimension]", DOC,
         lambda a: a.key.shape[1:] == (a.block_size, a.num_key_value_heads * a.query.shape[2])),
    Rule("kv heads * head dimension must be at most 65535", f"{DOC}: hardware limit of this cache layout",
         lambda a: a.key.shape[2] <= 65535),
    one_of(f"{DOC}: 'at least 128, at most 512, a multiple of 128'", "block_size", BLOCK_SIZES),
    Rule("actual_seq_lengths must be cumulative and not fall", DOC,
         lambda a: a.actual_seq_lengths is not None and all(n >= 0 for n in _lengths(a))),
    Rule("actual_seq_lengths must end with the number of tokens", "#6524",
         lambda a: bool(a.actual_seq_lengths) and a.actual_seq_lengths[-1] == len(a.query)),
    Rule("there may be at most 65536 sequences", DOC, lambda a: len(a.actual_seq_lengths) <= 65536),
    Rule("actual_seq_lengths_kv must have a length for each sequence", f"{DOC}: required with a block table",
         lambda a: a.actual_seq_lengths_kv is not None and len(a.actual_seq_lengths_kv) == len(a.actual_seq_lengths)),
    Rule("no sequence may have more queries than keys", f"{DOC}: sparse mode 3",
         lambda a: all(q <= kv for q, kv in zip(_lengths(a), a.actual_seq_lengths_kv))),
    dtypes(DOC, (torch.int32,), "block_table"),
    Rule("block_table must be [sequences, at least the blocks of the longest]", DOC, _blocks_fit),
    Rule("blocks that are read must exist", f"{DOC}: 'block ids are not checked'", _blocks_exist, reads_values=True),
    one_of("#13699, #15503: others are silently wrong with paging", "sparse_mode", (3, 4)),
    dtypes(DOC, MASKS, "atten_mask"),
    Rule("atten_mask must be [2048, 2048]", f"{DOC}: sparse modes 2 to 4",
         lambda a: a.atten_mask is not None and a.atten_mask.shape == (MASK_SIZE, MASK_SIZE)),
    Rule("a band must have pre_tokens + next_tokens >= 0", DOC,
         lambda a: a.sparse_mode != 4 or a.pre_tokens + a.next_tokens >= 0),
)  # fmt: skip

LATENT_ATTENTION = (
    on_one_device("query", "key", "value", "query_rope", "key_rope", "atten_mask", "block_table"),
    Rule("a paged key and value must have fewer than 2^31 numbers", f"{DOC}: the product of their axes within int32",
         lambda a: a.key.numel() < 2**31),
    dtypes(DOC, HALVES, "query", "key", "value", "query_rope", "key_rope"),
    same_dtype(DOC, "query", "key", "value", "query_rope", "key_rope"),
    contiguous(DOC, "query", "key", "value", "query_rope", "key_rope"),
    one_of("vllm-ascend mla_v1", "input_layout", ("TND_NTD",)),
    ranks(DOC, 3, 3, "query", "query_rope", "key", "value", "key_rope"),
    Rule("the query must be [tokens, heads, 512]", f"{DOC}: query_rope", lambda a: a.query.shape[2] == 512),
    Rule("query_rope must be [tokens, heads, 64]", f"{DOC}: query_rope",
         lambda a: a.query_rope.shape == (*a.query.shape[:2], 64)),
    Rule("there must be 32, 64 or 128 heads", f"{DOC}: query_rope", lambda a: a.num_heads in LATENT_HEADS),
    Rule("num_heads must be the query's second axis", DOC, lambda a: a.query.shape[1] == a.num_heads),
    one_of(f"{DOC}: key_rope", "num_key_value_heads", (1,)),
    one_of(f"{DOC}: key_rope", "block_size", LATENT_BLOCK_SIZES),
    Rule("the cache must be [blocks, block_size, 512], that of the rotated part [blocks, block_size, 64]", DOC,
         lambda a: a.key.shape[1:] == (a.block_size, 512) and a.key_rope.shape == (*a.key.shape[:2], 64)),
    same_shape(DOC, "key", "value"),
    Rule("actual_seq_lengths must be cumulative and end with the number of tokens", "#6524",
         lambda a: all(n >= 0 for n in _lengths(a)) and a.actual_seq_lengths[-1] == len(a.query)),
    Rule("a sequence may have 1 to 16 queries", f"{DOC}: query_rope",
         lambda a: all(1 <= n <= LATENT_QUERIES for n in _lengths(a))),
    Rule("no sequence may have more queries than keys", DOC,
         lambda a: all(q <= kv for q, kv in zip(_lengths(a), a.actual_seq_lengths_kv))),
    dtypes(DOC, (torch.int32,), "block_table"),
    Rule("block_table must be [sequences, at least the blocks of the longest]", DOC, _blocks_fit),
    one_of(f"{DOC}: query_rope with more than one query", "sparse_mode", (3,)),
    Rule("atten_mask must be [2048, 2048]", f"{DOC}: sparse modes 2 to 4",
         lambda a: a.atten_mask is not None and a.atten_mask.shape == (MASK_SIZE, MASK_SIZE)),
)  # fmt: skip

PACKED_ATTENTION = (
    on_one_device("query", "key", "value", "atten_mask"),
    dtypes(f"{CANN}; DOC, which is older, has bfloat16 alone", HALVES, "query", "key", "value"),
    same_dtype(DOC, "query", "key", "value"),
    contiguous(DOC, "query", "key", "value", "atten_mask"),
    one_of(f"{DOC}: the lengths", "input_layout", ("TND",)),
    ranks(DOC, 3, 3, "query", "key", "value"),
    Rule("query, key and value must have num_heads heads each", "house rule: what is made is made for each head",
         lambda a: {x.shape[1] for x in (a.query, a.key, a.value)} == {a.num_heads, a.num_key_value_heads}),
    Rule("keys must be as wide as queries", DOC, lambda a: a.query.shape[2] == a.key.shape[2]),
    Rule("keys and values must be 192 and 128 wide, or both the same multiple of 16 of at most 256",
         f"{CANN}: TND; CheckSpecConditions, CheckGqaDSupport",
         lambda a: takes_made_widths(a.key.shape[2], a.value.shape[2])),
    Rule("actual_seq_lengths must be cumulative, with as many keys as queries at least", f"{CANN}: TND",
         _packed_lengths_fit),
    Rule("actual_seq_lengths must end with the number of tokens, actual_seq_lengths_kv with that of keys", "#6524",
         lambda a: a.actual_seq_lengths[-1:] == [len(a.query)]
         and a.actual_seq_lengths_kv[-1:] == [len(a.key)] == [len(a.value)]),
    Rule("there may be at most 4096 sequences", f"{DOC}: TND", lambda a: len(a.actual_seq_lengths) <= MADE_SEQUENCES),
    Rule("there may be at most 2^20 tokens and keys", f"{DOC}: TND",
         lambda a: max(len(a.query), len(a.key)) <= MADE_POSITIONS),
    one_of("house rule: chunks are causal", "sparse_mode", (3,)),
    dtypes(DOC, MASKS, "atten_mask"),
    Rule("atten_mask must be [2048, 2048]", f"{DOC}: sparse modes 2 to 4",
         lambda a: a.atten_mask is not None and a.atten_mask.shape == (MASK_SIZE, MASK_SIZE)),
)  # fmt: skip

SCATTER = (
    on_one_device("key", "value", "key_cache", "value_cache", "slot_mapping"),
    one_of("#8845: the default means another layout", "cache_mode", ("Norm",)),
    ranks(DOC, 3, 3, "key", "value"),
    ranks(DOC, 4, 4, "key_cache", "value_cache"),
    same_dtype(DOC, "key", "value", "key_cache", "value_cache"),
    contiguous(f"{DOC}: 'inputs must not be non-contiguous'", "key", "value", "key_cache", "value_cache",
               "slot_mapping"),
    dtypes(DOC, INDICES, "slot_mapping"),
    Rule("key and value must agree in tokens and heads, and slot_mapping must have a slot a token", DOC,
         lambda a: a.key.shape[:2] == a.value.shape[:2] and a.slot_mapping.shape == a.key.shape[:1]),
    Rule("the caches must be [blocks, block_size, heads, head dimension]", DOC,
         lambda a: a.key_cache.shape[2:] == a.key.shape[1:] and a.value_cache.shape[2:] == a.value.shape[1:]
         and a.key_cache.shape[:2] == a.value_cache.shape[:2]),
    Rule("slots must lie in [0, blocks * block_size)", DOC,
         lambda a: bool(((a.slot_mapping >= 0)
                         & (a.slot_mapping < a.key_cache.shape[0] * a.key_cache.shape[1])).all()), reads_values=True),
    Rule("slots must differ", f"{DOC}: 'correctness is not guaranteed for repeated ones'", _slots_differ,
         reads_values=True),
)  # fmt: skip

def _norm(*added: str) -> tuple[Rule, ...]:
    """added: the tensors that are summed; the first is what is normed."""
    return (
        on_one_device(*added, "gamma"),
        dtypes(DOC, FLOATS, *added, "gamma"),
        same_dtype(DOC, *added, "gamma"),
        ranks(f"{DOC}: 2 to 8 axes", 2, 8, added[0]),
        contiguous("house rule: strided inputs are copied", *added, "gamma"),
        *([same_shape(DOC, *added)] if len(added) > 1 else []),
        Rule("gamma must have the last axes of the input", DOC,
             lambda a: getattr(a, added[0]).shape[getattr(a, added[0]).ndim - a.gamma.ndim:] == a.gamma.shape),
        Rule("epsilon must be positive", DOC, lambda a: a.epsilon > 0),
    )  # fmt: skip


def _rotary_shapes(a: Any) -> bool:
    B, S, N, D = a.input.shape
    return a.r1.shape in ((1, S, 1, D), (B, S, 1, D), (B, S, N, D))


ROTARY_MUL = (
    on_one_device("input", "r1", "r2"),
    dtypes(DOC, FLOATS, "input", "r1", "r2"),
    same_dtype("house rule: the docs name no mixture", "input", "r1", "r2"),
    ranks(DOC, 4, 4, "input", "r1", "r2"),
    contiguous("house rule: strided inputs are copied", "input", "r1", "r2"),
    one_of(DOC, "rotary_mode", ("half", "interleave")),
    same_shape(DOC, "r1", "r2"),
    Rule("r1 and r2 must be [1 or B, S, 1, D] or the input's shape", f"{DOC}: BSND", _rotary_shapes),
    Rule("the head dimension must be even and below 896", DOC,
         lambda a: a.input.shape[3] % 2 == 0 and a.input.shape[3] < 896),
    Rule("batch and heads must be below 1000", DOC, lambda a: a.input.shape[0] < 1000 and a.input.shape[2] < 1000),
    Rule("interleaved: r1 must be [1, S, 1, D], batch * heads below 1000", DOC,
         lambda a: a.rotary_mode == "half" or (a.r1.shape[0] == 1 == a.r1.shape[2]
                                               and a.input.shape[0] * a.input.shape[2] < 1000)),
)  # fmt: skip

APPLY_ROTARY = (
    on_one_device("query", "key", "cos", "sin"),
    dtypes(DOC, FLOATS, "query", "key", "cos", "sin"),
    same_dtype(DOC, "query", "key", "cos", "sin"),
    one_of(f"{DOC}: A2, A3", "layout", ("TND",)),
    one_of(f"{DOC}: A2, A3", "rotary_mode", ("half",)),
    ranks(DOC, 3, 3, "query", "key", "cos", "sin"),
    contiguous("house rule: it works in place", "query", "key", "cos", "sin"),
    Rule("the head dimension must be 64 or 128", f"{DOC}: A2, A3",
         lambda a: {t.shape[2] for t in (a.query, a.key, a.cos, a.sin)} in ({64}, {128})),
    Rule("all must have as many tokens, at least one", DOC,
         lambda a: len({len(t) for t in (a.query, a.key, a.cos, a.sin)}) == 1 and len(a.query) > 0),
    Rule("cos and sin must have one head", DOC, lambda a: a.cos.shape[1] == a.sin.shape[1] == 1),
)  # fmt: skip

MROPE = (
    on_one_device("positions", "query", "key", "cos_sin_cache"),
    dtypes(DOC, INDICES, "positions"),
    dtypes(DOC, FLOATS, "query", "key", "cos_sin_cache"),
    same_dtype("house rule: the docs name no mixture", "query", "key", "cos_sin_cache"),
    ranks(DOC, 2, 2, "query", "key", "cos_sin_cache"),
    one_of(DOC, "rotary_mode", ("half", "interleave")),
    Rule("positions must be [T] or [3, T], query and key [T, heads * head_size]", DOC,
         lambda a: a.positions.shape in ((len(a.query),), (3, len(a.query))) and len(a.key) == len(a.query)
         and a.query.shape[1] % a.head_size == 0 and a.key.shape[1] % a.head_size == 0),
    Rule("the rotated dimensions must be a multiple of 32 (of 16 in float32), at most head_size", DOC,
         lambda a: a.cos_sin_cache.shape[1] % (16 if a.query.dtype is torch.float32 else 32) == 0
         and a.cos_sin_cache.shape[1] <= a.head_size),
    Rule("mrope_section must be three numbers, of half the rotated dimensions with positions [3, T]", DOC,
         lambda a: len(a.mrope_section) == 3
         and (a.positions.ndim == 1 or sum(a.mrope_section) == a.cos_sin_cache.shape[1] // 2)),
    Rule("positions must have a row in cos_sin_cache", DOC,
         lambda a: bool(((a.positions >= 0) & (a.positions < len(a.cos_sin_cache))).all()), reads_values=True),
)  # fmt: skip

SWIGLU = (
    dtypes(DOC, FLOATS, "input"),
    ranks(DOC, 1, 8, "input"),
    contiguous("house rule: strided inputs are copied", "input"),
    Rule("the axis must be even", DOC, lambda a: a.input.shape[a.dim] % 2 == 0),
)

TOP_K_TOP_P = (
    dtypes(DOC, FLOATS, "logits", "p"),
    same_dtype(DOC, "logits", "p"),
    ranks(DOC, 2, 2, "logits"),
    Rule("p or k must be given", DOC, lambda a: a.p is not None or a.k is not None),
    dtypes(DOC, (torch.int32,), "k"),
    Rule("p and k must have an entry a row", DOC,
         lambda a: all(t is None or t.shape == a.logits.shape[:1] for t in (a.p, a.k))),
    Rule("k must lie in [1, 1024] and be at most the vocabulary", DOC,
         lambda a: a.k is None or bool(((a.k >= 1) & (a.k <= min(1024, a.logits.shape[1]))).all()), reads_values=True),
    Rule("p must lie in [0, 1]", DOC,
         lambda a: a.p is None or bool(((a.p >= 0) & (a.p <= 1)).all()), reads_values=True),
)  # fmt: skip

CONTRACTS = {contract.op + contract.form: contract for contract in (
    Contract("npu_fused_infer_attention_score", PAGED_ATTENTION),
    Contract("npu_fused_infer_attention_score_v2", LATENT_ATTENTION),
    Contract("npu_fused_infer_attention_score_v2", PACKED_ATTENTION, PACKED),
    Contract("npu_scatter_pa_kv_cache", SCATTER),
    Contract("npu_rms_norm", _norm("input")),
    Contract("npu_add_rms_norm", _norm("x1", "x2")),
    Contract("npu_rotary_mul", ROTARY_MUL),
    Contract("npu_apply_rotary_pos_emb", APPLY_ROTARY),
    Contract("npu_mrope", MROPE),
    Contract("npu_swiglu", SWIGLU),
    Contract("npu_top_k_top_p", TOP_K_TOP_P),
    *QUANT_CONTRACTS,
    *MOE_CONTRACTS,
)}  # fmt: skip


def check(op: str, **arguments: Any) -> None:
    """Raise ContractError if checking is on and the arguments are not what `op` documents."""
    if CHECKING.on:
        CONTRACTS[op].check(arguments, read_values=CHECKING.reads_values())
