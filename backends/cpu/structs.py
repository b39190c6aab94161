"""Structures that Python and the C kernels share."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class StepStruct(Structure):
    """`Step` of attention.c."""

    _fields_ = [
        ("query_start", c_void_p), ("seq_lens", c_void_p), ("block_table", c_void_p), ("kv_base", c_void_p),
        ("table_stride", c_int64), ("num_seqs", c_int64), ("block_size", c_int64),
        ("num_heads", c_int64), ("num_kv_heads", c_int64), ("head_dim", c_int64),
        ("units", c_void_p), ("num_units", c_int64), ("num_partials", c_int64), ("cost", c_int64),
        ("partials", c_void_p),
    ]  # fmt: skip


class Latents(Structure):
    """`Latents` of latent.c."""

    _fields_ = [
        ("q", c_void_p), ("cache", c_void_p), ("block_table", c_void_p), ("kv_base", c_void_p),
        ("query_start", c_void_p), ("seq_lens", c_void_p), ("sums", c_void_p),
        ("table_stride", c_int64), ("block_bytes", c_int64), ("num_seqs", c_int64), ("most", c_int64),
        ("num_heads", c_int64), ("width", c_int64), ("whole", c_int64), ("block_size", c_int64), ("format", c_int64),
    ]  # fmt: skip


class Packed(Structure):
    """`Packed` of panels.h."""

    _fields_ = [
        ("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("X", c_int64), ("Y", c_int64),
        ("kind", c_int32), ("group", c_int32),
    ]  # fmt: skip


class RouteStruct(Structure):
    """`Route` of experts.c."""

    _fields_ = [
        ("logits", c_void_p), ("bias", c_void_p), ("ids", c_void_p), ("weights", c_void_p), ("T", c_int64),
        ("E", c_int64), ("K", c_int64), ("sigmoid", c_int64), ("num_groups", c_int64), ("num_kept_groups", c_int64),
        ("summed_per_group", c_int64), ("renormalise", c_int64), ("scale", c_float),
    ]  # fmt: skip
