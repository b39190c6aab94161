"""The op sets present, and builders of paged caches with poison wherever nothing may be read.

Every test of an operator runs on each of `NAMES`, which is the one list of them: the reference, the CPU's without and
with compiled kernels, and those of the devices that are there. With TRITON_INTERPRET=1 it is CUDA's alone, interpreted
on CPU tensors: Triton decides when a kernel is defined whether it is, so that they need a process of their own
(`make test` has one). Interpreted programs are slow, and get fewer sizes (`sizes`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from backends import get_backend
from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.reference import REFERENCE
from backends.reference import kv as cpu_kv
from backends.reference.kv_codes import QUANTISED, SCALE_BYTES, dequantise, quantise, row_width
from tests.ops.on_device import on_device
from xllm import env

NAN = float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICES = [name for name, found in (("cuda", torch.cuda.is_available()),) if found]
NAMES = ["cuda-interpreted"] if INTERPRETED else ["reference", "torch", "compiled", *DEVICES]
# Nothing in them is CUDA's, or interpreted: they run once, in the other process.
OF_THE_CPU = {"test_backend.py", "test_compiled_kv.py", "test_cpu_threads.py", "test_npu_blocks_apart.py",
              "test_on_device.py", "test_pool.py", "test_threads.py", "test_vmm.py"}
collect_ignore = sorted(OF_THE_CPU) if INTERPRETED else []

T = TypeVar("T")


def sizes(full: list[T], interpreted: list[T]) -> list[T]:
    """What a test is parametrised with, in this process."""
    return interpreted if INTERPRETED else full


def load_ops(name: str) -> OpSet | None:
    """None: it cannot be had here."""
    if name == "reference":
        return REFERENCE
    if name == "cuda-interpreted":
        from backends.cuda import OPS

        return OPS
    if name in DEVICES:
        backend = get_backend(name)

        def synchronize() -> None:
            backend.synchronize_copies()
            backend.synchronize()

        return on_device(backend.ops, backend.device, synchronize)
    backend = get_backend("cpu", cache_dir=env.cache_dir(), compiled=name == "compiled")
    return None if name == "compiled" and backend.describe()["kernels"] == "plain torch" else backend.ops


@pytest.fixture(scope="session")
def op_sets() -> dict[str, OpSet]:
    loaded = {name: load_ops(name) for name in NAMES}
    return {name: ops for name, ops in loaded.items() if ops is not None}


@pytest.fixture(params=NAMES)
def ops(request: pytest.FixtureRequest, op_sets: dict[str, OpSet]) -> OpSet:
    if request.param not in op_sets:
        pytest.skip("no C compiler here")
    return op_sets[request.param]


@pytest.fixture(params=QUANTISED, ids=QUANTISED.__getitem__)
def kv_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of a quantised cache."""
    dtype: torch.dtype = request.param
    return dtype


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a device makes an inf or a NaN and says nothing, NumPy warns."""
    for item in items:
        if INTERPRETED and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an op set's caches have their numbers.

    shape: of (num_blocks, block_size, num_kv_heads, head_dim). keys, values: views of a cache as [B, K, P, H].
    """

    shape: Callable[[int, int, int, int], tuple[int, ...]]
    keys: Callable[[Tensor], Tensor]
    values: Callable[[Tensor], Tensor]


def _as_it_lies(cache: Tensor) -> Tensor:
    return cache


TRANSPOSED_KEYS = Layout(shape=cpu_kv.cache_shape, keys=lambda cache: cpu_kv.keys_BKHP(cache).transpose(2, 3),
                         values=_as_it_lies)
ROWS = Layout(shape=cpu_kv.cache_shape, keys=_as_it_lies, values=_as_it_lies)
POSITIONS = Layout(shape=lambda B, P, K, H: (B, P, K, H), keys=lambda cache: cache.transpose(1, 2),
                   values=lambda cache: cache.transpose(1, 2))
LAYOUTS = {"reference": TRANSPOSED_KEYS, "cpu": TRANSPOSED_KEYS, "cuda": ROWS, "npu": POSITIONS}


def layout_of(ops: OpSet) -> Layout:
    return LAYOUTS[ops.name]


@pytest.fixture(autouse=True)
def seed_and_poison() -> Iterator[None]:
    """A fixed seed, one thread, and NaN in all memory that `torch.empty` returns: an unwritten output shows."""
    num_threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # idle threads that spin between tiny operators would take most of the time
    torch.use_deterministic_algorithms(True)  # with this torch fills uninitialised memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(num_threads)


def spread_cache(ops: OpSet, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, gap: int = 0,
                 dtype: torch.dtype = torch.float32) -> Tensor:
    """A cache of NaN whose blocks lie `gap` numbers apart, as those of several layers in one page do.

    A quantised one has 0xFF in every byte: its scales are NaN.
    """
    width = row_width(head_dim, dtype)
    shape = layout_of(ops).shape(num_blocks, block_size, num_kv_heads, width)
    size = num_kv_heads * block_size * width
    poison = torch.tensor(0xFF, dtype=torch.uint8) if dtype in QUANTISED else torch.tensor(NAN, dtype=dtype)
    memory = poison.repeat(num_blocks * (size + gap))
    strides = (size + gap, *torch.empty(shape, device="meta").stride()[1:])
    return memory.view(dtype).as_strided(shape, strides)


@dataclass(frozen=True)
class Groups:
    """Keys or values of a quantised cache, as views of its bytes: codes [B, K, P, H], scales [B, K, P, bytes]."""

    format: str
    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, ops: OpSet, cache: Tensor, *, keys: bool) -> Groups:
        format, (block_size, width), layout = QUANTISED[cache.dtype], cache.shape[2:], layout_of(ops)
        num_bytes = SCALE_BYTES[format]
        tiles_BKX = cache.view(torch.uint8).flatten(2)
        assert tiles_BKX.data_ptr() == cache.data_ptr() and layout is not POSITIONS
        size = block_size * (width - num_bytes)
        codes, scales = tiles_BKX[..., :size].unflatten(2, (block_size, -1)), tiles_BKX[..., size:]
        return cls(format, (layout.keys if keys else layout.values)(codes), scales.unflatten(2, (block_size, -1)))

    def put(self, blocks_X: Tensor, offsets_X: Tensor, x_XKH: Tensor) -> Tensor:
        """Store numbers as `kv_codes.quantise` would; returns what is then read, fp32 [X, K, H]."""
        codes, scales = quantise(x_XKH, self.format, dim=2)
        self.codes[blocks_X, :, offsets_X] = codes.view(torch.uint8)
        as_bytes = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        self.scales[blocks_X, :, offsets_X] = as_bytes
        return dequantise(codes, scales, self.format)


def store(ops: OpSet, cache: Tensor, blocks_X: Tensor, offsets_X: Tensor, x_XKH: Tensor, *, keys: bool) -> Tensor:
    """Keys or values into a cache of any dtype; returns what is then read."""
    if cache.dtype in QUANTISED:
        return Groups.of(ops, cache, keys=keys).put(blocks_X, offsets_X, x_XKH)
    layout = layout_of(ops)
    (layout.keys if keys else layout.values)(cache)[blocks_X, :, offsets_X] = x_XKH
    return x_XKH


@dataclass(kw_only=True)
class Paged:
    """A step over sequences whose keys and values are known; all else in the caches is NaN.

    keys, values: per sequence [seq_len, K, H], of which the last query_len belong to this step.
    contiguous: each sequence's blocks follow each other, and stand between others that nobody owns (`kv_base_S`).
    gap: numbers between one block of a cache and the next.
    kv_dtype: of the caches. With a quantised one keys and values are what its codes and scales say, and what is in a
    sequence's last block past its end is finite.
    """

    ops: OpSet = REFERENCE  # whose layout the caches have
    query_lens: list[int]
    seq_lens: list[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    contiguous: bool = False
    gap: int = 0
    kv_dtype: torch.dtype = torch.float32
    k_cache: Tensor = field(init=False)
    v_cache: Tensor = field(init=False)
    meta: AttentionMetadata = field(init=False)

    def __post_init__(self) -> None:
        P, K, H = self.block_size, self.num_kv_heads, self.head_dim
        num_used = [-(-n // P) for n in self.seq_lens]
        num_blocks, most = sum(num_used) + 3 + len(num_used), max(num_used)
        shuffled = torch.randperm(num_blocks, dtype=torch.int32)
        table = torch.full((len(num_used), most + 2), 2**30, dtype=torch.int32)  # garbage past the end
        self.k_cache, self.v_cache = (spread_cache(self.ops, num_blocks, P, K, H, self.gap, self.kv_dtype)
                                      for _ in range(2))
        self.keys, self.values, slots, taken = [], [], [], 0
        for s, (count, length, query_len) in enumerate(zip(num_used, self.seq_lens, self.query_lens)):
            in_order = torch.arange(taken + s + 1, taken + s + 1 + count, dtype=torch.int32)
            table[s, :count] = in_order if self.contiguous else shuffled[taken : taken + count]
            taken += count
            positions = torch.arange(length)
            slot = table[s, positions // P].long() * P + positions % P
            if self.kv_dtype in QUANTISED:
                self._store_past_the_end(int(table[s, count - 1]), length)
            at, numbers = (slot // P, slot % P), (torch.randn(length, K, H), torch.randn(length, K, H))
            self.keys.append(store(self.ops, self.k_cache, *at, numbers[0], keys=True))
            self.values.append(store(self.ops, self.v_cache, *at, numbers[1], keys=False))
            slots.append(slot[length - query_len :])
        starts = torch.tensor([0, *self.query_lens]).cumsum(0)
        self.meta = AttentionMetadata(
            query_start_S1=starts.int(), seq_lens_S=torch.tensor(self.seq_lens, dtype=torch.int32),
            block_table_SM=table, slot_mapping_T=torch.cat(slots).int(), max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens), num_tokens=sum(self.query_lens), block_size=P,
        )  # fmt: skip
        if self.contiguous:
            self.meta.kv_base_S, self.meta.block_table_SM = table[:, 0].clone(), table[:, :0].clone()

    def _store_past_the_end(self, last_block: int, length: int) -> None:
        """Numbers of any size where a sequence has no positions yet."""
        offsets = torch.arange((length - 1) % self.block_size + 1, self.block_size)
        shape = (len(offsets), self.num_kv_heads, self.head_dim)
        for cache, keys in ((self.k_cache, True), (self.v_cache, False)):
            sizes = torch.randn(*shape[:2], 1).mul(20).exp()
            store(self.ops, cache, torch.full_like(offsets, last_block), offsets, torch.randn(shape) * sizes, keys=keys)

    def by_table(self) -> None:
        """Name the same blocks by a table instead of a base."""
        base_S, self.meta.kv_base_S = self.meta.kv_base_S, None
        assert base_S is not None
        most = -(-max(self.seq_lens) // self.block_size)
        self.meta.block_table_SM = base_S[:, None] + torch.arange(most, dtype=torch.int32)

    def to(self, dtype: torch.dtype) -> Paged:
        """The caches in another dtype."""
        self.k_cache, self.v_cache = self.k_cache.to(dtype), self.v_cache.to(dtype)
        return self

    def queries(self) -> Tensor:
        return torch.randn(sum(self.query_lens), self.num_heads, self.head_dim)

    def attend(self, ops: OpSet, q_TNH: Tensor, window: int | None = None) -> Tensor:
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        self.meta.plan = ops.plan(self.meta, **heads)
        scale = self.head_dim**-0.5
        return ops.attention(q_TNH, self.k_cache, self.v_cache, self.meta, scale=scale, sliding_window=window)

    def truth(self, q_TNH: Tensor, window: int | None = None) -> Tensor:
        """The same in float64, from `keys` and `values`."""
        rows, t, group = [], 0, self.num_heads // self.num_kv_heads
        for keys, values, length, query_len in zip(self.keys, self.values, self.seq_lens, self.query_lens):
            age = torch.arange(length - query_len, length)[:, None] - torch.arange(length)
            seen = (age >= 0) & (age < (window or length))
            q = q_TNH[t : t + query_len].double() * self.head_dim**-0.5
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
            weights = torch.einsum("qnh,cnh->nqc", q, k).masked_fill(~seen, float("-inf")).softmax(-1)
            rows.append(torch.einsum("nqc,cnh->qnh", weights, v).flatten(1))
            t += query_len
        return torch.cat(rows)
