"""KV of one byte a number, where CUDA is alone: how kernels share such work, half precision, and what is assembly."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from cuda_ops import attention, kv_codes, launch
from cuda_ops.rotary import qkv_rope_write
from tests.ops.conftest import Groups, Paged, kv_dtype, spread_cache
from tests.ops.test_attention import STEPS, check

__all__ = ["kv_dtype"]


@pytest.mark.parametrize(("num_sms", "window", "contiguous"), [(1, None, True), (3, 70, False)])
def test_any_number_of_programs_shares_the_work(ops: OpSet, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
                                                num_sms: int, window: int | None, contiguous: bool) -> None:
    """With NaN wherever a sequence has no positions yet."""
    monkeypatch.setattr(launch, "INTERPRETED_SMS", num_sms)
    case = Paged(ops=ops, query_lens=[1, 2, 1, 1], seq_lens=[5, 300, 33, 129], num_heads=4, num_kv_heads=2, head_dim=16,
                 block_size=32, kv_dtype=kv_dtype, contiguous=contiguous)  # fmt: skip
    for s, length in enumerate(case.seq_lens):
        index, used = (length - 1) // 32, (length - 1) % 32 + 1
        block = case.meta.block_table_SM[s, index] if case.meta.kv_base_S is None else case.meta.kv_base_S[s] + index
        for cache in (case.k_cache, case.v_cache):
            groups = Groups.of(ops, cache, keys=True)
            groups.codes[block, :, used:], groups.scales[block, :, used:] = 0xFF, 0xFF
    check(ops, case, window)


@pytest.mark.parametrize("size", [1e-4, 6e4])
def test_values_of_any_size_in_fp16(ops: OpSet, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
                                    size: float) -> None:
    """As a device multiplies them, in fp16: the weights times the scales must neither vanish nor overflow."""
    monkeypatch.setattr(attention, "INTERPRETED", False)
    query_lens, seq_lens = STEPS["mixed"]
    case = Paged(ops=ops, query_lens=query_lens, seq_lens=seq_lens, num_heads=4, num_kv_heads=2, head_dim=16,
                 block_size=16, kv_dtype=kv_dtype)  # fmt: skip
    groups = Groups.of(ops, case.v_cache, keys=False)
    for s, values in enumerate(case.values):
        position = torch.arange(len(values))
        block = case.meta.block_table_SM[s, position // 16].long()
        case.values[s] = groups.put(block, position % 16, values / values.abs().amax(2, keepdim=True) * size)
    q_TNH = case.queries().half()
    out = case.attend(ops, q_TNH)
    assert out.dtype is torch.float16
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=size * 4e-3)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_the_plain_cache_quantised(ops: OpSet, kv_dtype: torch.dtype, dtype: torch.dtype,
                                                      norm: bool) -> None:
    """From half precision, to which keys are rounded before; and nothing else is touched."""
    N, K, H, P, T = 5, 3, 20, 5, 9
    plain = [torch.full((4, K, P, H), float("nan"), dtype=dtype) for _ in range(2)]
    written = [spread_cache(ops, 4, P, K, H, 8, kv_dtype) for _ in range(2)]
    qkv_TXH = torch.randn(T, N + 2 * K, H) * torch.randn(T, N + 2 * K, 1).mul(2).exp()
    qkv_TXH[2, N + 1, 2], qkv_TXH[3, N + K, 1], qkv_TXH[4, N + 2], qkv_TXH[4, -1] = float("nan"), float("inf"), 0, 0
    qkv_TX, angles_LH, slots_T = qkv_TXH.to(dtype).flatten(1), torch.randn(T, H), torch.randperm(4 * P)[:T].int()
    slots_T[6] = -1
    weight_H = torch.rand(H).to(dtype) if norm else None
    q_TNH = [qkv_rope_write(qkv_TX, torch.arange(T, dtype=torch.int32), angles_LH, *caches, slots_T, num_heads=N,
                            num_kv_heads=K, head_dim=H, q_norm_H=weight_H, k_norm_H=weight_H)
             for caches in (plain, written)]  # fmt: skip
    assert torch.equal(*q_TNH)
    slots = slots_T[slots_T >= 0].long()
    for cache, numbers in zip(written, plain):
        expected = spread_cache(ops, 4, P, K, H, 8, kv_dtype)
        at = slots // P, slots % P
        Groups.of(ops, expected, keys=True).put(*at, numbers[at[0], :, at[1]])
        found, truth = (torch.as_strided(x.view(torch.uint8), (4, x.stride(0)), (x.stride(0), 1))
                        for x in (cache, expected))
        assert torch.equal(found, truth)


def run_ptx(text: str, word: Tensor) -> list[Tensor]:
    """What the assembly, in which $2 is this word, leaves in $0 and $1 by the PTX ISA: 32 bits as int64."""
    registers = {"$2": word}

    def value(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(word, int(name, 0))

    def permuted(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
        picks = [int(selector[0]) >> (4 * i) & 0xF for i in range(4)]
        assert max(picks) < 8
        pool = a | b << 32
        return sum(((pool >> 8 * pick & 0xFF) << 8 * i for i, pick in enumerate(picks)), torch.zeros_like(a))

    def looked_up(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
        bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
        return sum(((table >> index & 1) << i for i, index in enumerate(bits)), torch.zeros_like(a))

    def multiplied(dtype: torch.dtype, *abc: Tensor) -> Tensor:
        halves = []
        for shift in (0, 16):
            a, b, c = ((x >> shift & 0xFFFF).to(torch.uint16).view(dtype).double() for x in abc)
            exact = a * b + c
            assert torch.equal(exact.to(dtype).double(), exact)
            halves.append(exact.to(dtype).view(torch.uint16).long() << shift)
        return halves[0] | halves[1]

    run = {
        "mov.b32": lambda a: a, "and.b32": torch.bitwise_and, "xor.b32": torch.bitwise_xor, "prmt.b32": permuted,
        "shr.u32": lambda a, b: a >> b, "lop3.b32": looked_up,
        "fma.rn.bf16x2": lambda *abc: multiplied(torch.bfloat16, *abc),
        "fma.rn.f16x2": lambda *abc: multiplied(torch.float16, *abc),
    }  # fmt: skip
    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if line.strip():
            name, operands = line.split(maxsplit=1)
            out, *inputs = (operand.strip() for operand in operands.split(","))
            registers[out] = run[name](*map(value, inputs))
    return [registers["$0"], registers["$1"]]


@pytest.mark.parametrize(("ptx", "dtype"), [
    (kv_codes.WIDEN_E4M3_BF16, torch.bfloat16), (kv_codes.WIDEN_E4M3_FP16, torch.float16),
    (kv_codes.WIDEN_INT8_BF16, torch.bfloat16), (kv_codes.WIDEN_INT8_FP16, torch.float16)],
    ids=["e4m3-bf16", "e4m3-fp16", "int8-bf16", "int8-fp16"])  # fmt: skip
def test_every_code_is_widened_in_every_place(ptx: Any, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    codes = (torch.arange(256)[:, None] + torch.tensor([0, 77, 130, 201])) % 256  # four in a word
    pairs = run_ptx(ptx.value, sum((codes[:, i] << 8 * i for i in range(4)), torch.zeros(256, dtype=torch.int64)))
    found = torch.stack([pairs[i // 2] >> 16 * (i % 2) & 0xFFFF for i in range(4)], 1).to(torch.uint16).view(dtype)
    stored = torch.float8_e4m3fn if "e4m3" in request.node.name else torch.int8
    truth = codes.to(torch.uint8).view(stored).to(dtype)
    known = truth.isfinite()
    assert known.sum() >= 4 * 254
    assert torch.equal(found[known].view(torch.uint16), truth[known].view(torch.uint16))  # -0 too
