"""The operators of a step against float64 truth, in all dtypes that they document, with contracts on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.linear import quantize_rows
from npu_ops import rotary
from npu_ops.format import FRACTAL_NZ, ND, cast_format, format_of
from tests.npu.device import HALVES, assert_near, npu, randn

FLOATS = [*HALVES, torch.float32]
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def norm_truth(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.cpu().double(), weight.cpu().double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (5, 512), (3, 1000)], ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[1], dtype=dtype)
    before = x.clone()
    assert_near(npu().ops.rms_norm(x, weight, EPS), norm_truth(x, weight))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_rms_norm_adds_in_place(dtype: torch.dtype) -> None:
    x, residual, weight = randn(5, 512, dtype=dtype), randn(5, 512, dtype=dtype), randn(512, dtype=dtype)
    total = x.cpu().double() + residual.cpu().double()
    out = npu().ops.add_rms_norm(x, residual, weight, EPS)
    assert_near(residual, total, roundings=1)
    assert_near(out, norm_truth(total, weight))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    x = randn(7, 300, dtype=dtype) * 4
    gate, up = x.cpu().double().chunk(2, -1)
    assert_near(npu().ops.silu_mul(x), gate / (1 + (-gate).exp()) * up)


def test_nan_reaches_its_own_row_only() -> None:
    x = randn(3, 64, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    for out in (npu().ops.rms_norm(x, torch.ones_like(x[0]), EPS), npu().ops.silu_mul(x.clone())):
        assert out[1].isnan().any() and out[[0, 2]].isfinite().all()


def table(head_dim: int, length: int = 500) -> Tensor:
    """cos_sin_LH as models make it."""
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).float().to(npu().device)


def turn(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotated pairs (x[i], x[i + H/2]) of [T, N, H] in float64."""
    first, second = x.cpu().double().chunk(2, -1)
    cos, sin = cos_sin[positions.long()].cpu().double()[:, None].chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def write_case(T: int, N: int, K: int, H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """qkv, positions and where the tokens go: every third nowhere."""
    slots = 128 + torch.randperm(2 * 128)[:T].int()
    slots[::3] = -1
    unused = torch.zeros(2, dtype=torch.int32)
    meta = AttentionMetadata(query_start_S1=unused, seq_lens_S=unused[:1], block_table_SM=unused[None], block_size=128,
                             slot_mapping_T=slots.to(npu().device), max_query_len=1, max_seq_len=1,
                             num_tokens=T)  # fmt: skip
    positions = torch.randint(0, 500, (T,), dtype=torch.int32).to(npu().device)
    return randn(T, (N + 2 * K) * H, dtype=dtype), positions, meta


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("norms", ["", "qk"])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (7, 4, 2, 16), (90, 8, 2, 128)], ids=str)
def test_qkv_rope_write(shape: tuple[int, int, int, int], every: int, norms: str, dtype: torch.dtype) -> None:
    """Also into caches whose blocks lie apart; block 0 is where unwanted tokens go."""
    T, N, K, H = shape
    qkv, positions, meta = write_case(T, N, K, H, dtype)
    size, cos_sin = 128 * K * H, table(H)
    caches = [torch.full((4 * every * size,), 7.0, dtype=dtype, device=npu().device).as_strided(
        (4, 128, K, H), (every * size, K * H, H, 1), at * size) for at in range(min(2, every))]
    k_cache, v_cache = caches[0], caches[1] if every > 1 else caches[0].clone()
    q_norm, k_norm = (randn(H, dtype=dtype) if norms else None for _ in "qk")
    heads = qkv.cpu().double().view(T, N + 2 * K, H)
    q, k, v = heads.split([N, K, K], 1)
    q_TNH = npu().ops.qkv_rope_write(qkv, positions, cos_sin, k_cache, v_cache, meta, num_heads=N, num_kv_heads=K,
                                     head_dim=H, q_norm_H=q_norm, k_norm_H=k_norm, eps=EPS)  # fmt: skip
    q, k = (x if w is None else norm_truth(x, w) for x, w in ((q, q_norm), (k, k_norm)))
    assert_near(q_TNH, turn(q, cos_sin, positions), roundings=8)
    slots = meta.slot_mapping_T.cpu().long()
    written = slots[slots > 0]
    assert_near(k_cache.flatten(0, 1).cpu()[written], turn(k, cos_sin, positions)[slots > 0], roundings=8)
    assert torch.equal(v_cache.flatten(0, 1).cpu()[written].double(), v[slots > 0])
    others = torch.ones(4 * 128, dtype=torch.bool)
    others[written], others[0] = False, False  # the latter is where the others went
    for cache in (k_cache, v_cache):
        assert (cache.flatten(0, 1).cpu()[others] == 7.0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_other_rotations_agree(head_dim: int, dtype: torch.dtype) -> None:
    """Both of q and k at once: by `apply_rotary_pos_emb`, and by `mrope` with one position a token."""
    query, key, cos_sin = randn(6, 4, head_dim, dtype=dtype), randn(6, 2, head_dim, dtype=dtype), table(head_dim)
    positions = torch.randint(0, 500, (6,), dtype=torch.int32).to(npu().device)
    cos, sin = rotary.angles(cos_sin, positions, dtype)
    truths = turn(query, cos_sin, positions), turn(key, cos_sin, positions)
    by_mrope = rotary.mrope(positions=positions, query_TX=query.flatten(1), key_TX=key.flatten(1),
                            cos_sin_LR=cos_sin.to(dtype), head_dim=head_dim)
    by_apply = rotary.apply_rotary_pos_emb(query_TNH=query.clone(), key_TKH=key.clone(), cos=cos, sin=sin)
    for mine, other, truth in zip(by_mrope, by_apply, truths):
        assert_near(mine.view(truth.shape), truth, roundings=8)
        assert_near(other, truth, roundings=8)


def test_mrope_takes_each_section_from_its_own_position() -> None:
    query, key, cos_sin = randn(5, 2, 64, dtype=torch.bfloat16), randn(5, 1, 64, dtype=torch.bfloat16), table(64)
    positions = torch.randint(0, 500, (3, 5), dtype=torch.int64).to(npu().device)
    found, _ = rotary.mrope(positions=positions, query_TX=query.flatten(1), key_TX=key.flatten(1),
                            cos_sin_LR=cos_sin.bfloat16(), head_dim=64, sections=(8, 12, 12))
    cos, sin = cos_sin.cpu().double().chunk(2, -1)
    of_angle = torch.tensor([0] * 8 + [1] * 12 + [2] * 12)
    at = positions.cpu()[of_angle].t()  # [T, 32]
    cos, sin = cos.gather(0, at)[:, None], sin.gather(0, at)[:, None]
    first, second = query.cpu().double().chunk(2, -1)
    truth = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    assert_near(found.view(truth.shape), truth, roundings=8)


# --- products


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool, dtype: torch.dtype) -> None:
    x, weight = randn(5, 96, dtype=dtype), randn(40, 96, dtype=dtype)
    added = randn(40, dtype=dtype) if bias else None
    truth = x.cpu().double() @ weight.cpu().double().t() + (added.cpu().double() if added is not None else 0)
    packed = npu().ops.pack_linear(weight, added)
    assert packed.nbytes == weight.nbytes + (80 if bias else 0)
    assert_near(npu().ops.linear(x, packed), truth)
    assert_near(npu().ops.linear(randn(5, 200, dtype=dtype)[:, :96].copy_(x), packed), truth)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [40, 70000])
def test_int8_weights(rows: int, bias: bool, dtype: torch.dtype) -> None:
    """70000 columns are more than the operator takes at once."""
    x, weight = randn(3, 32, dtype=dtype), randn(rows, 32, dtype=dtype)
    added = randn(rows, dtype=dtype) if bias else None
    codes, scale = quantize_rows(weight, "int8")
    truth = x.cpu().double() @ (codes.cpu().double() * scale.to(dtype).cpu().double()[:, None]).t()
    if added is not None:
        truth += added.cpu().double()
    packed = npu().ops.pack_linear(weight, added, quantization="int8")
    assert packed.nbytes < 2 * weight.numel()
    assert_near(npu().ops.linear(x, packed), truth)


def test_quantisations_that_it_lacks() -> None:
    with pytest.raises(ValueError, match="not in fp8"):
        npu().ops.pack_linear(randn(4, 4, dtype=torch.bfloat16), quantization="fp8")
    with pytest.raises(ValueError, match="up to 65535 inputs, not 65536"):
        npu().ops.pack_linear(torch.zeros(1, 65536, dtype=torch.bfloat16), quantization="int8")


def test_formats_keep_the_numbers() -> None:
    x = randn(48, 64, dtype=torch.bfloat16)
    tiled = cast_format(x=x, acl_format=FRACTAL_NZ)
    assert format_of(tiled) == FRACTAL_NZ and format_of(x) in (0, ND)
    assert torch.equal(cast_format(x=tiled, acl_format=ND).cpu(), x.cpu())


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding(ids_dtype: torch.dtype) -> None:
    weight, ids = randn(50, 16, dtype=torch.bfloat16), torch.tensor([3, 49, 0, 3], dtype=ids_dtype)
    assert torch.equal(npu().ops.embedding(ids.to(npu().device), weight).cpu(), weight.cpu()[ids.long()])


def test_feed_tokens() -> None:
    own, feed, sampled = torch.tensor([5, 6, 7]).int(), torch.tensor([-1, 1, 0]).int(), torch.tensor([11, -3])
    found = npu().ops.feed_tokens(*(x.to(npu().device) for x in (own, feed, sampled)))
    assert found.tolist() == [5, 0, 11] and found.dtype is torch.int32


@pytest.mark.parametrize("present", [None, (1, 2)])
def test_lora_add(present: tuple[int, ...] | None) -> None:
    """Two adapters of rank 4 beside a layer of two stacked outputs; tokens of slot 0 have none."""
    parts, slots = (16, 32), torch.tensor([0, 2, 1, 2], dtype=torch.int32)
    x, y, a, b = (randn(*shape, dtype=torch.float16) for shape in ((4, 24), (4, 48), (2, 8, 24), (2, 48, 4)))
    before = y.cpu().double()
    npu().ops.lora_add(y, x, npu().ops.pack_lora(a, b, parts), slots.to(npu().device), present)
    truth = before.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot:
            inner = a[slot - 1].cpu().double() @ x[t].cpu().double()
            b_YR = b[slot - 1].cpu().double()
            truth[t] += torch.cat((b_YR[:16] @ inner[:4], b_YR[16:] @ inner[4:]))
    assert torch.equal(y[0].cpu().double(), before[0])
    assert_near(y, truth, roundings=8)
