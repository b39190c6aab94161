"""`OpSet`: every operator that a model or the sampler calls, bound once per process.

A backend derives its set from the naive truth: `OPS = replace(REFERENCE, name="cpu", rms_norm=...)`,
so that file is the table of what the backend implements itself. An operator's contract is the
docstring of its Protocol, here or in `expert_ops.py`; every implementation honours all of it.

Letters: T tokens, S sequences, N query heads, K kv heads, H head dim, D hidden, F ffn, V vocabulary,
P tokens per block, B blocks, L width of a latent, R of what is rotated beside it. X and Y are any sizes.
Tensors are contiguous unless said otherwise.

KV caches are not: each block is, but between blocks there may be anything (`stride(0)`), and under the xtensor
layout a block without an owner may have no memory behind it. An operator touches the blocks that the metadata or its
arguments name and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from backends.expert_ops import (
    CombineOp,
    GatedGroupedLinearOp,
    GroupedLinearOp,
    PackExpertsOp,
    PackGatedExpertsOp,
    RouteOp,
)
from backends.metadata import AttentionMetadata
from backends.scaled_weight import ScaledWeight


class PackLinearOp(Protocol):
    def __call__(self, weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                 quantization: str | None = None) -> Any:
        """Bring a weight into the form that `linear` wants; done once at load time.

        quantization: None, or one fp32 scale per output row and codes: "int8" (symmetric, in [-127, 127]) or "fp8"
        (float8_e4m3fn, its largest number 448), which are for the weight alone, or "w8a8": the weight as with "int8",
        and `linear` brings x to int8 as well.
        A `ScaledWeight` is kept as it is, without a quantization; only op sets of backends with `takes_scaled_weights`
        get one.
        The result is opaque but has `.nbytes`. The caller drops its own copy of the weight.
        Raises ValueError for a quantization that this op set does not have, for any of a `ScaledWeight`, and for "w8a8"
        with more inputs than its sums have room for: 133144, whose sum of products of 127 still fits int32, or what the
        device takes at most.
        """
        ...


class LinearOp(Protocol):
    def __call__(self, x_TX: Tensor, packed: Any) -> Tensor:
        """y_TY = x @ weight.T + bias, in x's dtype; x may be a view whose last axis is contiguous.

        Where a device multiplies fp8 numbers, x of many rows may be brought to fp8 too, with a scale per row, if the
        weight is fp8: an error of up to 2^-4 of each number. So it may with a `ScaledWeight`, by a scale for each of
        the runs that the weight's scales are for; else the product is that of the matrix it stands for.

        With "w8a8" each row of x becomes int8 codes with a scale of its own, whatever rows stand beside it: with m the
        row's largest absolute number, codes = round(x * (127 / m)), ties to even, and scale = m * (1 / 127), in fp32.
        A row with m below 2^-100 counts as zeros; one that is not finite gives NaN. The codes' products are summed in
        int32, exactly, so that no order and no batch shows: y = sum * scale of the row * scale of the output + bias, in
        fp32 from left to right, then rounded to x's dtype. A device with an instruction for the codes may round them as
        that does.
        """
        ...


class PackLoraOp(Protocol):
    def __call__(self, a_LRX: Tensor, b_LYR: Tensor, parts: tuple[int, ...]) -> Any:
        """Bring the adapters of a linear layer into the form that `lora_add` wants; done when one comes or goes.

        The layer's Y outputs are stacked parts of these widths. a_LRX: [L, parts * r, X], the parts' matrices one below
        the other; b_LYR: [L, Y, r]. Slot l of `lora_add` is entry l - 1.
        """
        ...


class LoraAddOp(Protocol):
    def __call__(self, y_TY: Tensor, x_TX: Tensor, packed: Any, slots_T: Tensor,
                 present: Sequence[int] | None = None) -> None:
        """y += b[slot] @ (a[slot] @ x), in place, each output by its own part of the inner product; tokens of slot 0
        stay as they are. slots_T: int32 in [0, L]. Sums in fp32.

        present: the slots other than 0 that occur, where the host knows them; None in a captured graph.
        """
        ...


class EmbeddingOp(Protocol):
    def __call__(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of the table: [T, D]. ids int32 or int64, all in [0, V)."""
        ...


class FeedTokensOp(Protocol):
    def __call__(self, input_ids_T: Tensor, feed_T: Tensor, sampled_Q: Tensor) -> Tensor:
        """sampled_Q[feed_T] where feed_T >= 0, else input_ids_T: int32 [T]. Negative entries of sampled_Q count as 0.

        input_ids_T, feed_T int32; sampled_Q int64. A graph holds it, so that its shapes are all that may matter.
        """
        ...


class RMSNormOp(Protocol):
    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, over the last axis, into a new tensor; rows of x may lie apart.

        Statistics in fp32; the normalised value is rounded to x's dtype before the weight.
        """
        ...


class AddRMSNormOp(Protocol):
    def __call__(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """residual += x (in place), then rms_norm(residual) into a new tensor (or into x)."""
        ...


class QKVRopeWriteOp(Protocol):
    def __call__(
        self,
        qkv_TX: Tensor,
        positions_T: Tensor,
        cos_sin_LH: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm_H: Tensor | None = None,
        k_norm_H: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Split the fused projection, norm q and k per head (if weights are given), rotate both,
        write k and v into their cache slots, and return q_TNH.

        qkv_TX: [T, (N + 2K) * H], q heads first, then k, then v. May be overwritten.
        positions_T: int32. cos_sin_LH: fp32 [max_len, H]: cos of the H/2 angles, then sin, already
        multiplied by rope's attention factor. Rotation is the half-split form (rotate_half) used by
        Llama and Qwen checkpoints in Hugging Face format. Slots of -1 are not written.
        """
        ...


class PlanOp(Protocol):
    def __call__(self, meta: AttentionMetadata, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
        """What `attention` wants computed once per step; the runner stores it in `meta.plan`."""
        ...


class AttentionOp(Protocol):
    def __call__(
        self,
        q_TNH: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        """Causal attention of this step's queries over the cached keys and values: [T, N * H].

        Query head n reads kv head n // (N / K). Query i of a sequence sees positions
        <= seq_len - query_len + i, and with a sliding window w only the last w of those
        (itself included). Scores and sums in fp32.
        """
        ...


class LatentRopeWriteOp(Protocol):
    def __call__(
        self,
        latent_TX: Tensor,
        q_TNX: Tensor,
        positions_T: Tensor,
        cos_sin_XR: Tensor,
        cache: Any,
        meta: AttentionMetadata,
        *,
        norm_weight_L: Tensor,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        """What multi-head latent attention (DeepSeek-V2, 2024) does before it attends: norm the latents, rotate, write
        the layer's one part; q with its rotated part.

        latent_TX: [T, L + R], a token's latent and then the R numbers that all its keys share. q_TNX: [T, N, D + R],
        the last R of each head to be rotated. Both may be views whose last axis is contiguous, and may be overwritten.
        The slot gets [rms_norm(latent) | the R numbers rotated]; slots of -1 are not written. cos_sin_XR: as in
        `qkv_rope_write`. interleaved: the pairs that are rotated are (x[2i], x[2i + 1]), as DeepSeek's checkpoints have
        them, and not (x[i], x[i + R/2]). In the results, of q and of the cache, they stand in the second order.
        cache: as `Backend.latent_cache_shapes` has it: a tensor, or the pair of the latents' and the rotated numbers'.
        """
        ...


class LatentAttentionOp(Protocol):
    def __call__(self, q_TNX: Tensor, up_NYL: Tensor, cache: Any, meta: AttentionMetadata, *,
                 scale: float) -> Tensor:
        """Causal attention of this step's queries over the cached latents: [T, N * V].

        q_TNX: [T, N, D + R]. up_NYL: [N, D + V, L]. cache: as in `latent_rope_write`. Where a position has
        the latent c and the rotated numbers r, the key of head n is [up[n, :D] @ c | r] and its value up[n, D:] @ c.
        They may be made, which is less work for many queries, or the same be computed on latents alone (the absorbed
        form, for few): queries [up[n, :D].T @ q | r of q], and up[n, D:] @ the weighted sum of latents. Which, the op
        set decides for each sequence by its lengths. `meta.plan` need not be made: who wants lengths on the host makes
        it there. Query i of a sequence sees positions <= seq_len - query_len + i. Scores and sums in
        fp32.
        """
        ...


class SiluMulOp(Protocol):
    def __call__(self, gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
        """silu(gate) * up for x = [gate | up] on the last axis: [T, 2F] -> [T, F]. out: as in `grouped_linear`."""
        ...


class CopyBlocksOp(Protocol):
    def __call__(self, cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
        """cache[dst] = cache[src], in place. src and dst int64, disjoint, dst without repeats."""
        ...


class StoredBytesOp(Protocol):
    def __call__(self, caches: Sequence[Tensor], *, format: str) -> int:
        """Bytes of one block of one layer in the stored form of `export_blocks`."""
        ...


class ExportBlocksOp(Protocol):
    def __call__(
        self, caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *, format: str
    ) -> None:
        """stored[slots] = blocks of one layer, as bytes: its parts one after the other.

        caches: the layer's parts, of one dtype: keys and values, or one part alone, which lies as values do. Parts may
        differ in heads and widths.
        stored_SX: uint8 [any, stored_bytes], in host memory; its rows may lie apart, and nothing between them is
        touched. block_ids_B, slots_B: int64 in host memory, of equal length; slots_B without repeats.
        format: "fp32", "bf16", "fp16" (the numbers, rounded to nearest even), "int8" or "fp8" (with scales). The order
        of the bytes is the op set's own. A format that holds the cache's dtype is exact. What was imported into a
        cache that holds it exactly is exported as the same bytes.
        NaN stays NaN and inf stays inf, or becomes NaN together with its group of numbers; neither turns into a number.
        The caches may be written meanwhile in other blocks. Called from several threads at once; on a device the copy
        is queued and done after `Backend.synchronize_copies`.
        """
        ...


class ImportBlocksOp(Protocol):
    def __call__(
        self, caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *, format: str
    ) -> None:
        """The reverse of `export_blocks`: blocks of one layer = stored[slots]. block_ids_B without repeats."""
        ...


class ApplyTokenBitmaskOp(Protocol):
    def __call__(self, logits_SV: Tensor, bitmask_XW: Tensor, rows_X: Tensor) -> None:
        """logits[rows[x], t] = -inf for every token t that mask x forbids, in place; rows without a mask stay.

        bitmask_XW: int32, token t in bit t % 32 of word t // 32, 1: allowed. Tokens past the last word are forbidden,
        bits past the vocabulary have no meaning. rows_X: int64, without repeats. logits fp32; rows may lie apart.
        """
        ...


class PenaliseOp(Protocol):
    def __call__(
        self, logits_SV: Tensor, rows_X: Tensor, token_ids_T: Tensor, starts_X1: Tensor, output_starts_X: Tensor,
        repetition_X: Tensor, frequency_X: Tensor, presence_X: Tensor,
    ) -> None:
        """Repetition (Keskar et al. 2019), frequency and presence penalties of rows[x], by its history, in place.

        The history is token_ids_T[starts[x]:starts[x + 1]]; what was generated of it begins at output_starts[x]. A
        token that is in the history has its logit divided by `repetition`, or multiplied where it is not positive; one
        that was generated n > 0 times then loses frequency * n + presence, which is computed in float64 and rounded.
        token_ids, starts and output_starts int32; rows_X int64, without repeats; repetition fp32, frequency and
        presence float64. logits fp32; rows may lie apart. All implementations give the same bits.
        """
        ...


class ArgmaxOp(Protocol):
    def __call__(self, logits_SV: Tensor) -> Tensor:
        """Index of each row's largest value, the smallest index among equals: int64 [S]."""
        ...


class SampleOp(Protocol):
    def __call__(
        self, logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor,
        uniform_S: Tensor,
    ) -> Tensor:
        """Draw one token a row by inverting the CDF at `uniform_S` in [0, 1): int64 [S].

        Rows are independent: a row's result depends on its own inputs only. Order of work: divide by
        temperature (0 means argmax, and nothing else applies), keep the top_k largest (0: all; ties
        at the k-th value are kept), softmax, drop tokens below min_p * largest, then keep the
        smallest set of the most likely tokens whose sum reaches top_p (1: all; the one that crosses
        is kept), renormalise. The CDF runs in token-id order. fp32 in, all maths in fp32 or better.
        `logits_SV` may be overwritten.
        """
        ...


# Not in every step, or hardly more than torch calls: a backend may well take these from the reference.
COLD_OPS = frozenset({"pack_linear", "pack_lora", "pack_experts", "pack_gated_experts", "feed_tokens", "copy_blocks",
                      "stored_bytes"})
# Only some models call these (`ModelConfig.special_ops`): to others it does not matter who has them.
EXPERT_OPS = frozenset({"route", "grouped_linear", "gated_grouped_linear", "combine"})
LATENT_OPS = frozenset({"latent_rope_write", "latent_attention"})
SPECIAL_OPS = EXPERT_OPS | LATENT_OPS


@dataclass(frozen=True, kw_only=True)
class OpSet:
    """The operators of one backend. Ops know no request and no layer."""

    name: str
    pack_linear: PackLinearOp
    linear: LinearOp
    pack_lora: PackLoraOp
    lora_add: LoraAddOp
    embedding: EmbeddingOp
    feed_tokens: FeedTokensOp
    rms_norm: RMSNormOp
    add_rms_norm: AddRMSNormOp
    qkv_rope_write: QKVRopeWriteOp
    plan: PlanOp
    attention: AttentionOp
    latent_rope_write: LatentRopeWriteOp
    latent_attention: LatentAttentionOp
    silu_mul: SiluMulOp
    route: RouteOp
    pack_experts: PackExpertsOp
    grouped_linear: GroupedLinearOp
    pack_gated_experts: PackGatedExpertsOp
    gated_grouped_linear: GatedGroupedLinearOp
    combine: CombineOp
    copy_blocks: CopyBlocksOp
    stored_bytes: StoredBytesOp
    export_blocks: ExportBlocksOp
    import_blocks: ImportBlocksOp
    apply_token_bitmask: ApplyTokenBitmaskOp
    penalise: PenaliseOp
    argmax: ArgmaxOp
    sample: SampleOp

    def inherited_from(self, other: OpSet) -> list[str]:
        """Names of the operators that are the very ones of `other`."""
        return [f.name for f in fields(self) if f.name != "name" and getattr(self, f.name) is getattr(other, f.name)]
