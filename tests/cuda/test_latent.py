"""How kernels of latent attention share their work, and what half precision makes of codes; their results are in
`tests/ops`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backends.opset import LATENT_OPS, OpSet
from cuda_ops import latent, launch
from cuda_ops.latent_rope import latent_rope_write
from tests.ops.conftest import Groups, Paged, kv_dtype, spread_cache
from tests.ops.test_latent import D, L, N, R, inputs, truth
from xllm.config import EngineConfig
from xllm.worker.loading import _check_ops, _check_special_ops

__all__ = ["kv_dtype"]


def test_a_model_with_latents_is_not_refused(ops: OpSet) -> None:
    device: Any = SimpleNamespace(name="cuda", ops=ops, strict_ops=True, computes_on_host=False)
    model: Any = SimpleNamespace(architecture="DeepseekV3ForCausalLM", special_ops=LATENT_OPS)
    _check_special_ops(device, model, EngineConfig.from_flat(model="m"))
    assert _check_ops(device, True, LATENT_OPS) == []


def check(ops: OpSet, case: Paged, *, atol: float = 3e-6) -> None:
    q_TNX, up_NYL = inputs(case)
    out = ops.latent_attention(q_TNX, up_NYL, case.v_cache, case.meta, scale=0.3)
    torch.testing.assert_close(out.double(), truth(case, q_TNX, up_NYL, 0.3), rtol=0, atol=atol)


@pytest.mark.parametrize(("num_sms", "contiguous"), [(1, True), (3, False), (20, False)])
def test_any_number_of_programs_shares_the_work(ops: OpSet, monkeypatch: pytest.MonkeyPatch, num_sms: int,
                                                contiguous: bool) -> None:
    """From two programs that have several sequences each to more than there are tiles; some rows of drafts fill more
    than a tile."""
    monkeypatch.setattr(launch, "INTERPRETED_SMS", num_sms)
    check(ops, Paged(query_lens=[1, 8, 1, 0, 1], seq_lens=[5, 200, 33, 0, 129], num_heads=N, num_kv_heads=1,
                     head_dim=L + R, block_size=32, contiguous=contiguous))


def test_chunks_beside_the_rows_that_a_graph_pads_with(ops: OpSet) -> None:
    """One token each, at the first slot of a block that others own."""
    case = Paged(query_lens=[9, 1, 1, 17], seq_lens=[100, 1, 1, 17], num_heads=N, num_kv_heads=1, head_dim=L + R,
                 block_size=16)
    case.meta.block_table_SM[1:3, 0] = case.meta.block_table_SM[0, 0]
    case.values[1] = case.values[2] = case.values[0][:1]
    check(ops, case)


@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
def test_nothing_is_read_past_the_end_of_codes(ops: OpSet, kv_dtype: torch.dtype, contiguous: bool) -> None:
    """With NaN wherever a sequence has no positions yet; blocks of one tile and of several."""
    case = Paged(query_lens=[1, 10, 2], seq_lens=[5, 60, 33], num_heads=N, num_kv_heads=1, head_dim=L + R,
                 block_size=32, kv_dtype=kv_dtype, contiguous=contiguous)
    groups = Groups.of(ops, case.v_cache, keys=False)
    for s, length in enumerate(case.seq_lens):
        index, used = (length - 1) // 32, (length - 1) % 32 + 1
        block = case.meta.block_table_SM[s, index] if case.meta.kv_base_S is None else case.meta.kv_base_S[s] + index
        groups.codes[block, :, used:], groups.scales[block, :, used:] = 0xFF, 0xFF
    check(ops, case)


@pytest.mark.parametrize("size", [1e-4, 6e4])
def test_latents_of_any_size_in_fp16(ops: OpSet, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
                                     size: float) -> None:
    """As a device multiplies them, in fp16: the weights times the scales must neither vanish nor overflow."""
    monkeypatch.setattr(latent, "INTERPRETED", False)
    case = Paged(query_lens=[1, 9], seq_lens=[19, 26], num_heads=N, num_kv_heads=1, head_dim=L + R, block_size=16,
                 kv_dtype=kv_dtype)
    groups = Groups.of(ops, case.v_cache, keys=False)
    for s, kept in enumerate(case.values):
        position = torch.arange(len(kept))
        block = case.meta.block_table_SM[s, position // 16].long()
        case.values[s] = groups.put(block, position % 16, kept / kept.abs().amax(2, keepdim=True) * size)
    q_TNX, up_NYL = (x.half() for x in inputs(case))
    out = ops.latent_attention(q_TNX / size, up_NYL / 4, case.v_cache, case.meta, scale=0.3)
    assert out.dtype is torch.float16
    exact = truth(case, q_TNX / size, up_NYL / 4, 0.3)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=size * 4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_the_plain_cache_quantised(kv_dtype: torch.dtype, dtype: torch.dtype, ops: OpSet) -> None:
    """From half precision, to which latents are rounded before; and nothing else is touched."""
    P, T = 5, 9
    plain = torch.full((4, 1, P, L + R), float("nan"), dtype=dtype)
    written = spread_cache(ops, 4, P, 1, L + R, 8, kv_dtype)
    latent_TX = torch.randn(T, L + R) * torch.randn(T, 1).mul(2).exp()
    latent_TX[2, 3], latent_TX[3, L + 1], latent_TX[4] = float("nan"), float("inf"), 0
    angles_LR, slots_T = torch.randn(T, R), torch.randperm(4 * P)[:T].int()
    slots_T[6] = -1
    norm_L, q_TNX = (1 + 0.2 * torch.randn(L)).to(dtype), torch.randn(T, N, D + R).to(dtype)
    turned = [latent_rope_write(latent_TX.to(dtype), q_TNX.clone(), torch.arange(T, dtype=torch.int32), angles_LR,
                                cache, slots_T, norm_weight_L=norm_L, eps=1e-6, interleaved=True)
              for cache in (plain, written)]
    assert torch.equal(*turned) and not torch.equal(turned[0], q_TNX)
    slots = slots_T[slots_T >= 0].long()
    expected = spread_cache(ops, 4, P, 1, L + R, 8, kv_dtype)
    at = slots // P, slots % P
    Groups.of(ops, expected, keys=False).put(*at, plain[at[0], :, at[1]])
    found, exact = (torch.as_strided(x.view(torch.uint8), (4, x.stride(0)), (x.stride(0), 1))
                    for x in (written, expected))
    assert torch.equal(found, exact)
