"""The CPU's compiled operators as Python callables: argument types, and one thin wrapper for each.

fp32 only, but for the KV cache, which may be quantised; another dtype takes the reference. A wrapper costs a few
microseconds: functions are bound once, addresses are passed as ints, and what a step needs in common rides in its
`StepPlan`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.cpu import latent
from backends.cpu.structs import Latents, Packed, RouteStruct, StepStruct
from backends.cpu.transfer import DTYPES, Transfer, transfers
from backends.metadata import AttentionMetadata
from backends.reference import activation, attention, logits, norm, rotary, sampling
from backends.reference import latent as reference_latent
from backends.reference.kv_codes import QUANTISED
from backends.reference.linear import check_inputs, check_quantization, check_unquantised, quantize_rows
from backends.reference.linear import linear as reference_linear
from backends.reference.linear import pack_linear as reference_pack_linear
from backends.scaled_weight import ScaledWeight

KINDS = {torch.float32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # of the weights of linear.c
IS_SCALED = 3  # fp8 with a scale for each run of inputs
MAX_GROUP = 64  # query heads per kv head that a tile of the attention kernel holds
FP32 = torch.float32
KV_DTYPES = frozenset({FP32, *QUANTISED})  # of the caches that the kernels read and write
PENALISE_DTYPES = (torch.int64, torch.int32, torch.int32, torch.int32, torch.float32, torch.float64, torch.float64)

GROUPED = (None, [POINTER(Packed), c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int])
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "xllm_exp": (None, [c_void_p, c_void_p, c_int64]),
    "xllm_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int]),
    "xllm_add_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int]),
    "xllm_silu_mul": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "xllm_qkv_rope_write": (None, [c_void_p] * 4 + [c_int64, c_void_p, c_int64, c_int] + [c_void_p] * 4 + [c_float]
                            + [c_int64] * 5 + [c_int]),
    "xllm_unit_bytes": (c_int64, []),
    "xllm_partial_floats": (c_int64, [c_int64, c_int64]),
    "xllm_max_units": (c_int64, [POINTER(StepStruct)]),
    "xllm_plan": (None, [POINTER(StepStruct)]),
    "xllm_attention": (None, [POINTER(StepStruct), c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int, c_void_p,
                              c_float, c_int64, c_int]),
    "xllm_latent_rope_write": (None, [c_void_p, c_int64] + [c_void_p] * 4 + [c_int64, c_int] + [c_void_p] * 3
                               + [c_float, c_int] + [c_int64] * 6 + [c_int]),
    "xllm_latent_sums": (None, [POINTER(Latents), c_int]),
    "xllm_panel": (c_int64, []),
    "xllm_pack": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int]),
    "xllm_linear": (None, [POINTER(Packed), c_void_p, c_int64, c_void_p, c_int64, c_int]),
    "xllm_pack_w8a8": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "xllm_linear_w8a8": (None, [POINTER(Packed), c_void_p, c_int64, c_void_p, c_int64, c_int]),
    "xllm_grouped_linear": GROUPED,
    "xllm_grouped_linear_w8a8": GROUPED,
    "xllm_route": (None, [POINTER(RouteStruct), c_int]),
    "xllm_sort_rows": (None, [c_void_p] + [c_int64] * 3 + [c_void_p] * 3),
    "xllm_combine": (None, [c_void_p] * 4 + [c_int64] * 3 + [c_int]),
    "xllm_export_blocks": (None, [POINTER(Transfer)]),
    "xllm_import_blocks": (None, [POINTER(Transfer)]),
    "xllm_apply_token_bitmask": (None, [c_void_p, c_int64, c_void_p, c_void_p] + [c_int64] * 3 + [c_int]),
    "xllm_penalise": (None, [c_void_p, c_int64] + [c_void_p] * 7 + [c_int64, c_int64, c_int]),
    "xllm_argmax": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int]),
    "xllm_sample": (None, [c_void_p] * 7 + [c_int64, c_int64, c_int]),
}


@dataclass(slots=True)
class StepPlan:
    """A step's work units for the kernel, and the tensors whose addresses it holds."""

    step: StepStruct
    owned: tuple[Tensor, ...]


class PanelLinear:
    """A weight in the panels of linear.c or w8a8.c; the original may be dropped. multiply: the C function. group: with
    a scale for each run of so many inputs, in panels too."""

    __slots__ = ("multiply", "nbytes", "num_outputs", "packed", "struct", "tensors")

    def __init__(self, multiply: Any, weight: Tensor, scale_Y: Tensor | None, bias_Y: Tensor | None, num_inputs: int,
                 num_outputs: int, group: int = 0):  # fmt: skip
        self.multiply = multiply
        self.tensors = (weight, scale_Y, bias_Y)  # keep alive what the structure points to
        self.nbytes = sum(t.nbytes for t in self.tensors if t is not None)
        self.num_outputs = num_outputs
        address = [None if t is None else t.data_ptr() for t in self.tensors]
        kind = IS_SCALED if group else KINDS[weight.dtype]
        self.struct = Packed(*address, num_inputs, num_outputs, kind, group)
        self.packed = byref(self.struct)


class Kernels:
    """The operators of one loaded library. Each method honours the contract of the operator of its name in
    `opset.py`."""

    def __init__(self, library: ctypes.CDLL):
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("xllm_") + "_c", function)
        self.num_threads: int | None = None  # None: torch's
        self.panel: int = self.panel_c()
        self.unit_bytes: int = self.unit_bytes_c()

    def threads(self) -> int:
        return self.num_threads or torch.get_num_threads()

    def __getattr__(self, name: str) -> Any:
        """The C functions, which `__init__` binds by name."""
        raise AttributeError(name)

    def exp(self, x: Tensor) -> Tensor:
        """e^x for a whole number of vectors; what the other kernels use inside, here for their tests."""
        y = torch.empty_like(x)
        self.exp_c(x.data_ptr(), y.data_ptr(), x.numel())
        return y

    def pack_linear(self, weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                    quantization: str | None = None) -> Any:
        if isinstance(weight_YX, ScaledWeight):
            check_unquantised(quantization)
            return self.pack_scaled(weight_YX, bias_Y)
        check_quantization(quantization)
        if quantization == "w8a8":
            return self.pack_w8a8(weight_YX, bias_Y)
        if weight_YX.dtype is not FP32:
            return reference_pack_linear(weight_YX, bias_Y, quantization=quantization)
        num_outputs, num_inputs = weight_YX.shape
        weight, scale_Y = (quantize_rows(weight_YX, quantization) if quantization
                           else (weight_YX.detach().contiguous(), None))
        return PanelLinear(self.linear_c, self.in_panels(weight), scale_Y, bias_Y, num_inputs, num_outputs)

    def pack_scaled(self, weight_YX: ScaledWeight, bias_Y: Tensor | None) -> PanelLinear:
        """For x of any dtype."""
        num_outputs, num_inputs = weight_YX.shape
        codes, scales = self.in_panels(weight_YX.codes_YX), self.in_panels(weight_YX.scale_YG)
        bias = None if bias_Y is None else bias_Y.float()
        return PanelLinear(self.linear_c, codes, scales, bias, num_inputs, num_outputs, weight_YX.group)

    def in_panels(self, weight_YX: Tensor) -> Tensor:
        """As linear.c lays them out."""
        weight_YX = weight_YX.contiguous()
        num_outputs, num_inputs = weight_YX.shape
        panels = torch.empty(-(-num_outputs // self.panel) * num_inputs * self.panel, dtype=weight_YX.dtype)
        self.pack_c(weight_YX.data_ptr(), panels.data_ptr(), num_outputs, num_inputs, weight_YX.itemsize,
                    self.threads())
        return panels

    def pack_w8a8(self, weight_YX: Tensor, bias_Y: Tensor | None) -> PanelLinear:
        """Of any dtype: what is multiplied are codes."""
        num_outputs, num_inputs = weight_YX.shape
        check_inputs(num_inputs)
        codes, scale_Y = quantize_rows(weight_YX, "w8a8")
        panels = torch.empty(-(-num_outputs // self.panel) * self.panel * -(-num_inputs // 4) * 4, dtype=torch.int8)
        self.pack_w8a8_c(codes.data_ptr(), panels.data_ptr(), num_outputs, num_inputs, self.threads())
        bias = None if bias_Y is None else bias_Y.float()
        return PanelLinear(self.linear_w8a8_c, panels, scale_Y, bias, num_inputs, num_outputs)

    def linear(self, x_TX: Tensor, packed: Any) -> Tensor:
        if type(packed) is not PanelLinear:
            return reference_linear(x_TX, packed)
        x = x_TX if x_TX.dtype is FP32 else x_TX.float()
        num_tokens = x.shape[0]
        y_TY = x.new_empty((num_tokens, packed.num_outputs))
        packed.multiply(packed.packed, x.data_ptr(), x.stride(0), y_TY.data_ptr(), num_tokens, self.threads())
        return y_TY if x_TX.dtype is FP32 else y_TY.to(x_TX.dtype)

    def embedding(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        return torch.embedding(weight_VD, ids_T)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if x_TD.dtype is not FP32:
            return norm.rms_norm(x_TD, weight_D, eps)
        x_TD = x_TD.contiguous()
        out_TD, size = torch.empty_like(x_TD), x_TD.shape[-1]
        self.rms_norm_c(x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr(), x_TD.numel() // size, size, eps,
                        self.threads())  # fmt: skip
        return out_TD

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if x_TD.dtype is not FP32:
            return norm.add_rms_norm(x_TD, residual_TD, weight_D, eps)
        size = x_TD.shape[-1]
        self.add_rms_norm_c(x_TD.data_ptr(), residual_TD.data_ptr(), weight_D.data_ptr(), x_TD.numel() // size, size,
                            eps, self.threads())  # fmt: skip
        return x_TD

    def silu_mul(self, gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
        if gate_up_TF2.dtype is not FP32:
            return activation.silu_mul(gate_up_TF2, out=out)
        num_tokens, width = gate_up_TF2.shape
        out_TF = gate_up_TF2.new_empty((num_tokens, width // 2)) if out is None else out
        self.silu_mul_c(gate_up_TF2.data_ptr(), out_TF.data_ptr(), num_tokens, width // 2, self.threads())
        return out_TF

    def qkv_rope_write(
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
        if qkv_TX.dtype is not FP32 or k_cache.dtype not in KV_DTYPES:
            return rotary.qkv_rope_write(
                qkv_TX, positions_T, cos_sin_LH, k_cache, v_cache, meta, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=head_dim, q_norm_H=q_norm_H, k_norm_H=k_norm_H, eps=eps,
            )  # fmt: skip
        assert positions_T.dtype is torch.int32 and meta.slot_mapping_T.dtype is torch.int32
        num_tokens = qkv_TX.shape[0]
        q_TNH = qkv_TX.new_empty((num_tokens, num_heads, head_dim))
        self.qkv_rope_write_c(
            qkv_TX.data_ptr(), positions_T.data_ptr(), cos_sin_LH.data_ptr(), k_cache.data_ptr(), k_cache.stride(0),
            v_cache.data_ptr(), v_cache.stride(0), DTYPES[k_cache.dtype], meta.slot_mapping_T.data_ptr(),
            q_TNH.data_ptr(), None if q_norm_H is None else q_norm_H.data_ptr(),
            None if k_norm_H is None else k_norm_H.data_ptr(), eps, num_tokens, num_heads, num_kv_heads, head_dim,
            meta.block_size, self.threads(),
        )  # fmt: skip
        return q_TNH

    def plan(self, meta: AttentionMetadata, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
        if num_heads // num_kv_heads > MAX_GROUP:
            return None
        table_SM, base_S = meta.block_table_SM, meta.kv_base_S
        tables = (meta.query_start_S1, meta.seq_lens_S, table_SM) + (() if base_S is None else (base_S,))
        assert all(t.dtype is torch.int32 for t in tables) and (base_S is not None or table_SM.stride(1) == 1)
        num_seqs = len(meta.seq_lens_S)
        step = StepStruct(
            *(t.data_ptr() for t in tables[:3]), None if base_S is None else base_S.data_ptr(), table_SM.stride(0),
            num_seqs, meta.block_size, num_heads, num_kv_heads, head_dim,
        )  # fmt: skip
        units = torch.empty(self.max_units_c(step) * self.unit_bytes, dtype=torch.uint8)
        step.units = units.data_ptr()
        self.plan_c(step)
        partials = torch.empty(step.num_partials * self.partial_floats_c(num_kv_heads, head_dim), dtype=FP32)
        step.partials = partials.data_ptr()
        return StepPlan(step, (*tables, units, partials))

    def attention(
        self,
        q_TNH: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        num_tokens, num_heads, head_dim = q_TNH.shape
        plan = meta.plan or self.plan(meta, num_heads=num_heads, num_kv_heads=k_cache.shape[1], head_dim=head_dim)
        if plan is None or q_TNH.dtype is not FP32 or k_cache.dtype not in KV_DTYPES:
            return attention.attention(q_TNH, k_cache, v_cache, meta, scale=scale, sliding_window=sliding_window)
        out_TX = q_TNH.new_empty((num_tokens, num_heads * head_dim))
        self.attention_c(plan.step, q_TNH.data_ptr(), k_cache.data_ptr(), k_cache.stride(0), v_cache.data_ptr(),
                         v_cache.stride(0), DTYPES[k_cache.dtype], out_TX.data_ptr(), scale, sliding_window or 0,
                         self.threads())  # fmt: skip
        return out_TX

    def latent_rope_write(
        self,
        latent_TX: Tensor,
        q_TNX: Tensor,
        positions_T: Tensor,
        cos_sin_XR: Tensor,
        cache: Tensor,
        meta: AttentionMetadata,
        *,
        norm_weight_L: Tensor,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        if q_TNX.dtype is not FP32 or cache.dtype not in KV_DTYPES:
            return reference_latent.latent_rope_write(
                latent_TX, q_TNX, positions_T, cos_sin_XR, cache, meta, norm_weight_L=norm_weight_L, eps=eps,
                interleaved=interleaved)
        assert positions_T.dtype is torch.int32 and meta.slot_mapping_T.dtype is torch.int32
        q_TNX = q_TNX.contiguous()
        out_TNX, (num_tokens, num_heads, width), rotated = torch.empty_like(q_TNX), q_TNX.shape, cos_sin_XR.shape[1]
        self.latent_rope_write_c(
            latent_TX.data_ptr(), latent_TX.stride(0), q_TNX.data_ptr(), positions_T.data_ptr(), cos_sin_XR.data_ptr(),
            cache.data_ptr(), cache.stride(0), DTYPES[cache.dtype], meta.slot_mapping_T.data_ptr(), out_TNX.data_ptr(),
            norm_weight_L.data_ptr(), eps, interleaved, num_tokens, num_heads, len(norm_weight_L), rotated,
            width - rotated, meta.block_size, self.threads(),
        )  # fmt: skip
        return out_TNX

    def latent_attention(self, q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata, *,
                         scale: float) -> Tensor:
        sums = self.latent_sums if cache.dtype in KV_DTYPES else None
        return latent.latent_attention(q_TNX, up_NYL, cache, meta, scale=scale, sums=sums)

    def latent_sums(self, q_XNW: Tensor, cache: Tensor, meta: AttentionMetadata, sums_XNL: Tensor) -> None:
        """A `LatentSums`, over a cache of `KV_DTYPES`."""
        table_SM, base_S = meta.block_table_SM, meta.kv_base_S
        tables = (meta.query_start_S1, meta.seq_lens_S, table_SM) + (() if base_S is None else (base_S,))
        assert all(t.dtype is torch.int32 for t in tables) and (base_S is not None or table_SM.stride(1) == 1)
        self.latent_sums_c(Latents(
            q_XNW.data_ptr(), cache.data_ptr(), table_SM.data_ptr(), None if base_S is None else base_S.data_ptr(),
            meta.query_start_S1.data_ptr(), meta.seq_lens_S.data_ptr(), sums_XNL.data_ptr(), table_SM.stride(0),
            cache.stride(0) * cache.itemsize, len(meta.seq_lens_S), latent.FEW, q_XNW.shape[1], sums_XNL.shape[2],
            q_XNW.shape[2], meta.block_size, DTYPES[cache.dtype],
        ), self.threads())  # fmt: skip

    def export_blocks(self, caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                      format: str) -> None:
        for part in transfers(caches, block_ids_B, stored_SX, slots_B, format):
            self.export_blocks_c(part)

    def import_blocks(self, caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                      format: str) -> None:
        for part in transfers(caches, block_ids_B, stored_SX, slots_B, format):
            self.import_blocks_c(part)

    def apply_token_bitmask(self, logits_SV: Tensor, bitmask_XW: Tensor, rows_X: Tensor) -> None:
        if logits_SV.dtype is not FP32 or logits_SV.stride(1) != 1:
            return logits.apply_token_bitmask(logits_SV, bitmask_XW, rows_X)
        assert bitmask_XW.dtype is torch.int32 and rows_X.dtype is torch.int64 and bitmask_XW.is_contiguous()
        num_masks, num_words = bitmask_XW.shape
        self.apply_token_bitmask_c(logits_SV.data_ptr(), logits_SV.stride(0), bitmask_XW.data_ptr(), rows_X.data_ptr(),
                                   num_masks, logits_SV.shape[1], num_words, self.threads())  # fmt: skip

    def penalise(
        self, logits_SV: Tensor, rows_X: Tensor, token_ids_T: Tensor, starts_X1: Tensor, output_starts_X: Tensor,
        repetition_X: Tensor, frequency_X: Tensor, presence_X: Tensor,
    ) -> None:  # fmt: skip
        arguments = (rows_X, token_ids_T, starts_X1, output_starts_X, repetition_X, frequency_X, presence_X)
        if logits_SV.dtype is not FP32 or logits_SV.stride(1) != 1:
            return logits.penalise(logits_SV, *arguments)
        assert tuple(t.dtype for t in arguments) == PENALISE_DTYPES and all(t.is_contiguous() for t in arguments)
        self.penalise_c(logits_SV.data_ptr(), logits_SV.stride(0), *(t.data_ptr() for t in arguments), len(rows_X),
                        logits_SV.shape[1], self.threads())  # fmt: skip

    def argmax(self, logits_SV: Tensor) -> Tensor:
        if logits_SV.dtype is not FP32:
            return sampling.argmax(logits_SV)
        logits_SV, num_rows, vocab_size = logits_SV.contiguous(), *logits_SV.shape
        ids_S = torch.empty(num_rows, dtype=torch.int64)
        self.argmax_c(logits_SV.data_ptr(), ids_S.data_ptr(), num_rows, vocab_size, self.threads())
        return ids_S

    def sample(
        self, logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor,
        uniform_S: Tensor,
    ) -> Tensor:  # fmt: skip
        logits_SV, num_rows, vocab_size = logits_SV.float().contiguous(), *logits_SV.shape
        temperature_S, top_p_S, min_p_S = temperature_S.float(), top_p_S.float(), min_p_S.float()
        top_k_S, uniform_S = top_k_S.long(), uniform_S.double()
        ids_S = torch.empty(num_rows, dtype=torch.int64)
        self.sample_c(
            logits_SV.data_ptr(), temperature_S.data_ptr(), top_k_S.data_ptr(), top_p_S.data_ptr(), min_p_S.data_ptr(),
            uniform_S.data_ptr(), ids_S.data_ptr(), num_rows, vocab_size, self.threads(),
        )  # fmt: skip
        return ids_S
