"""What the references compute, each held against another way to say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.npu.op_samples import (
    BF16,
    BLOCK,
    BLOCKS,
    HALF,
    D,
    K,
    N,
    dense,
    ints,
    latent,
    packed,
    paged,
    rand,
    v2,
)

npu, atb = torch.ops.npu, torch.ops.atb


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query (Q, N, D), key and value (S, K, D), visible (Q, S), all in double: out and the log of the sums."""
    ratio = query.shape[1] // key.shape[1]
    wide_key, wide_value = (each.double().repeat_interleave(ratio, 1) for each in (key, value))
    scores = torch.einsum("qnd,snd->nqs", query.double(), wide_key) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    out = torch.einsum("nqs,snd->qnd", scores.softmax(-1), wide_value)
    return out, scores.logsumexp(-1).T


def close(given: Tensor, expected: Tensor, tolerance: float = 8e-3) -> None:
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)


def causal(num_q: int, num_keys: int, diagonal: int) -> Tensor:
    return torch.ones(num_q, num_keys, dtype=torch.bool).tril(diagonal)


@pytest.mark.parametrize("form", ["flat", "heads", "nz"])
def test_paged_attention_in_three_forms_of_cache(form: str) -> None:
    (query, key, value), given = paged(softmax_lse_flag=True)
    table, lens = given["block_table"], given["actual_seq_lengths_kv"]
    start = 0
    forms = {
        "flat": lambda cache: cache,
        "heads": lambda cache: cache.view(BLOCKS, BLOCK, K, D).transpose(1, 2).contiguous(),
        "nz": lambda cache: cache.view(BLOCKS, BLOCK, K, D // 16, 16).permute(0, 2, 3, 1, 4).contiguous(),
    }
    out, lse = npu.npu_fused_infer_attention_score(query, forms[form](key), forms[form](value), **given)
    for row, end in enumerate(given["actual_seq_lengths"]):
        keys, values = (cache[table[row].long()].view(-1, K, D)[: lens[row]] for cache in (key, value))
        visible = causal(end - start, lens[row], lens[row] - (end - start))
        expected, sums = plain_attention(query[start:end], keys, values, visible, D**-0.5)
        close(out[start:end], expected)
        close(lse[start:end, :, 0], sums, 1e-4)
        start = end


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_dense_layouts_and_masks(layout: str, mode: int) -> None:
    mask = torch.ones(2048, 2048, dtype=torch.int8).triu(1) if mode else None
    more: dict[str, Any] = {"pre_tokens": 2, "next_tokens": 1} if mode == 4 else {}
    (query, key, value), given = dense(layout, sparse_mode=mode, atten_mask=mask, **more)
    out, _ = npu.npu_fused_infer_attention_score(query, key, value, **given)
    rows = causal(5, 9, 9)
    visible = {0: rows, 2: causal(5, 9, 0), 3: causal(5, 9, 4), 4: causal(5, 9, 5) & ~causal(5, 9, 1)}[mode]
    source, target = layout.partition("_")[0], layout.rpartition("_")[2]

    def as_bsnd(x: Tensor, form: str, heads: int) -> Tensor:
        return x.transpose(1, 2) if form == "BNSD" else x.reshape(2, -1, heads, D)

    for row in range(2):
        parts = [as_bsnd(x, source, heads)[row] for x, heads in ((query, N), (key, K), (value, K))]
        expected, _ = plain_attention(*parts, visible, D**-0.5)
        close(as_bsnd(out, target, N)[row], expected)


def test_lengths_within_a_dense_batch() -> None:
    (query, key, value), given = dense("BSND", actual_seq_lengths=[5, 3], actual_seq_lengths_kv=[9, 4])
    out, _ = npu.npu_fused_infer_attention_score(query, key, value, **given)
    expected, _ = plain_attention(query[1, :3], key[1, :4], value[1, :4], causal(3, 4, 4), D**-0.5)
    close(out[1, :3], expected)
    assert not out[1, 3:].any()


def test_a_mask_that_is_given() -> None:
    mask = torch.rand(2, 1, 5, 9) < 0.4
    mask[..., 0] = False
    (query, key, value), given = dense("BSND", atten_mask=mask)
    out, _ = npu.npu_fused_infer_attention_score(query, key, value, **given)
    for row in range(2):
        close(out[row], plain_attention(query[row], key[row], value[row], ~mask[row, 0], D**-0.5)[0])


@pytest.mark.parametrize(("layout", "widths"), [("TND", (D, D)), ("NTD_TND", (D, D)), ("TND_NTD", (D, D)),
                                                ("TND", (192, 128)), ("NTD_TND", (192, 128)), ("TND", (256, 256))])
def test_packed_layouts(layout: str, widths: tuple[int, int]) -> None:
    (query, key, value), given = packed(layout, *widths)
    out, _ = npu.npu_fused_infer_attention_score(query, key, value, **given)
    if layout.startswith("NTD"):
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    out = out.transpose(0, 1) if layout.endswith("NTD") else out
    for queries, keys in ((slice(0, 1), slice(0, 3)), (slice(1, 5), slice(3, 9))):
        num_q, num_keys = queries.stop - queries.start, keys.stop - keys.start
        visible = causal(num_q, num_keys, num_keys - num_q)
        close(out[queries], plain_attention(query[queries], key[keys], value[keys], visible, D**-0.5)[0])


@pytest.mark.parametrize(("message", "layout", "widths", "change"), [
    ("only 192, 192, 128", "TND", (192, 64), {}), ("or the same", "NTD_TND", (256, 256), {}),
    ("or the same", "TND", (272, 272), {}), ("without a mask", "TND", (D, D), {"sparse_mode": 0}),
    ("3 keys'", "TND", (D, D), {"actual_seq_lengths_kv": [3, 4, 9]}),
    ("do not ascend", "TND", (D, D), {"actual_seq_lengths_kv": [11, 9]}),
    ("more queries than keys", "TND", (D, D), {"actual_seq_lengths_kv": [6, 9]}),
])  # fmt: skip
def test_what_packed_attention_refuses(message: str, layout: str, widths: tuple[int, int],
                                       change: dict[str, Any]) -> None:
    args, given = packed(layout, *widths)
    with pytest.raises(RuntimeError, match=message):
        npu.npu_fused_infer_attention_score(*args, **{**given, **change})


def test_a_sink_takes_its_share() -> None:
    sink = rand(N, dtype=BF16)
    args, given = v2(paged(), learnable_sink=sink, return_softmax_lse=True)
    with_sink, sums = npu.npu_fused_infer_attention_score_v2(*args, **given)
    without, lse = npu.npu_fused_infer_attention_score_v2(*args, **{**given, "learnable_sink": None})
    close(sums[..., 0], torch.logaddexp(lse[..., 0], sink.float()), 1e-5)
    close(with_sink, without.float() * torch.exp(lse - sums), 2e-2)


def test_latents_are_keys_and_values() -> None:
    """The rotated part only scores, and the heads come first."""
    (query, key, _), given = latent()
    out, _ = npu.npu_fused_infer_attention_score_v2(query, key, key, **given)
    start = 0
    for row, (end, num_keys) in enumerate(zip(given["actual_seq_qlen"], given["actual_seq_kvlen"])):
        blocks, num_q = given["block_table"][row].long(), end - start
        keys, ropes = (cache[blocks].flatten(0, 1)[:num_keys, None] for cache in (key, given["key_rope"]))
        wide = torch.cat((query, given["query_rope"]), -1)[start:end]
        visible = causal(num_q, num_keys, num_keys - num_q)
        close(out[:, start:end].transpose(0, 1), plain_attention(wide, torch.cat((keys, ropes), -1), keys, visible,
                                                                 given["softmax_scale"])[0], 2e-2)
        start = end


@pytest.mark.parametrize(("message", "change"), [
    ("go together", {"key_rope": None}), ("layout BSND", {"input_layout": "BSND"}),
    ("PageAttention", {"block_table": None}), ("ropes torch.float16", {"query_rope": rand(4, 32, 64, dtype=HALF)}),
    ("16 heads", {"num_query_heads": 16}), ("over 2", {"num_key_value_heads": 2}),
    ("only 512 and 64", {"query_rope": rand(4, 32, 32, dtype=BF16)}), ("blockSize", {"block_size": 32}),
    ("key_rope", {"key_rope": rand(BLOCKS, 16, 128, dtype=BF16)}),
    ("contiguous", {"key_rope": rand(BLOCKS, 16, 128, dtype=BF16)[..., :64]}),
    ("without a mask", {"sparse_mode": 0}), ("without a mask", {"sparse_mode": 4}),
    ("1 to 16 queries", {"actual_seq_qlen": [4, 4]}),
])  # fmt: skip
def test_what_attention_over_latents_refuses(message: str, change: dict[str, Any]) -> None:
    args, given = latent()
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        npu.npu_fused_infer_attention_score_v2(*args, **{**given, **change})


def test_chunks_that_are_too_long_for_latents() -> None:
    args, given = latent(lens=(17, 18), kv_lens=(20, 7))
    with pytest.raises(RuntimeError, match="1 to 16 queries"):
        npu.npu_fused_infer_attention_score_v2(*args, **given)


def test_sequences_without_keys() -> None:
    (query, key, value), given = paged(kv_lens=(0, 7), softmax_lse_flag=True)
    out, lse = npu.npu_fused_infer_attention_score(query, key, value, **given)
    assert not out[0].any() and (lse[0] == float("inf")).all() and out[1:].isfinite().all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("last element", {"actual_seq_lengths": [1, 2]}),
        ("do not ascend", {"actual_seq_lengths": [4, 3]}),
        ("2048", {"atten_mask": None}),
        ("2048", {"atten_mask": torch.ones(3, 130, dtype=torch.int8).triu(1)}),
        ("above the diagonal", {"atten_mask": torch.ones(2048, 2048, dtype=torch.int8).tril(-1)}),
        ("int32", {"block_table": torch.ones(2, 2, dtype=torch.int64)}),
        ("not all in", {"block_table": torch.full((2, 2), BLOCKS, dtype=torch.int32)}),
        ("needs|need", {"actual_seq_lengths_kv": [300, 7]}),
        ("needs", {"actual_seq_lengths_kv": None}),
        ("heads", {"num_heads": 3}),
        ("cache", {"block_size": 64, "actual_seq_lengths_kv": [60, 7]}),
        ("plain mean", {"sparse_mode": 0, "atten_mask": None}),
    ],
)
def test_what_attention_refuses(message: str, change: dict[str, Any]) -> None:
    args, given = paged()
    with pytest.raises(RuntimeError, match=message):
        npu.npu_fused_infer_attention_score(*args, **{**given, **change})


def test_decode_of_atb_is_fused_attention() -> None:
    (query, key, value), given = paged(lens=(1, 2))
    out = torch.empty_like(query)
    caches = [cache.view(BLOCKS, BLOCK, K, D) for cache in (key, value)]
    lens = ints(*given["actual_seq_lengths_kv"])
    atb._npu_paged_attention(query, *caches, K, N, D**-0.5, given["block_table"], lens, out)
    assert torch.equal(out, npu.npu_fused_infer_attention_score(query, key, value, **given)[0])


def test_partial_attentions_put_together() -> None:
    query, key, value = rand(6, 1, D), rand(20, 1, D), rand(20, 1, D)
    whole, total = plain_attention(query, key, value, causal(6, 20, 20), 0.1)
    parts = [plain_attention(query, key[a:b], value[a:b], causal(6, b - a, 20), 0.1) for a, b in ((0, 7), (7, 20))]
    lse, outs = [lse[:, 0].float() for _, lse in parts], [out[:, 0].float() for out, _ in parts]
    out, sums = npu.npu_attention_update(lse, outs, 1)
    close(out, whole[:, 0], 1e-5)
    close(sums, total[:, 0], 1e-5)


def test_norm_and_nz_lay_a_block_out_differently() -> None:
    key, value, slots = rand(3, K, D, dtype=BF16), rand(3, K, D, dtype=BF16), ints(128, 5, 700)
    caches = {mode: torch.zeros(2, BLOCKS, BLOCK, K, D, dtype=BF16) for mode in ("Norm", "PA_NZ")}
    for mode, cache in caches.items():
        npu.npu_scatter_pa_kv_cache(key, value, cache[0], cache[1], slots, cache_mode=mode)
    default = torch.zeros_like(caches["Norm"])
    npu.npu_scatter_pa_kv_cache(key, value, default[0], default[1], slots)
    assert torch.equal(default, caches["PA_NZ"]) and not torch.equal(default, caches["Norm"])
    for token, slot in enumerate(slots.tolist()):
        block, at = divmod(slot, BLOCK)
        assert torch.equal(caches["Norm"][0, block, at], key[token])
        fractal = caches["PA_NZ"][0, block].view(K * D // 16, BLOCK, 16)
        assert torch.equal(fractal[:, at].flatten(), key[token].flatten())
    assert int((caches["PA_NZ"] != 0).sum()) == int((caches["Norm"] != 0).sum())


@pytest.mark.parametrize("slots", [[-1, 5, 6], [0, 1, BLOCKS * BLOCK]])
def test_slots_out_of_range(slots: list[int]) -> None:
    new, cache = rand(3, K, D, dtype=BF16), torch.zeros(BLOCKS, BLOCK, K, D, dtype=BF16)
    with pytest.raises(RuntimeError, match="are not all in"):
        npu.npu_scatter_pa_kv_cache(new, new, cache, cache.clone(), ints(*slots), cache_mode="Norm")


def test_a_slot_that_two_rows_write_is_undefined() -> None:
    new, cache = rand(3, K, D, dtype=BF16), torch.zeros(BLOCKS, BLOCK, K, D, dtype=BF16)
    npu.npu_scatter_pa_kv_cache(new, new, cache, cache.clone(), ints(4, 7, 4), cache_mode="Norm")
    assert cache[0, 4].isnan().all() and torch.equal(cache[0, 7], new[1])
    new[2] = new[0]
    npu.npu_scatter_pa_kv_cache(new, new, cache, cache.clone(), ints(4, 7, 4), cache_mode="Norm")
    assert torch.equal(cache[0, 4], new[0])


def test_gathering_what_was_scattered() -> None:
    key, value = rand(9, K, D, dtype=BF16), rand(9, K, D, dtype=BF16)
    caches = [torch.zeros(BLOCKS, BLOCK, K, D, dtype=BF16) for _ in range(2)]
    slots = [BLOCK * 4 + i for i in range(3)] + [BLOCK * 2 + i for i in range(6)]
    npu.npu_scatter_pa_kv_cache(key, value, *caches, ints(*slots), cache_mode="Norm")
    for lens, cumulated in ((ints(3, 6), False), (ints(0, 3, 9), True)):
        out = [torch.empty_like(key), torch.empty_like(value)]
        npu.npu_gather_pa_kv_cache(*caches, ints(4, 0, 2, 0).view(2, 2), lens, *out, is_seq_lens_cumsum=cumulated)
        assert torch.equal(out[0], key) and torch.equal(out[1], value)


def test_top_k_and_top_p_one_by_one() -> None:
    logits, p, k = rand(5, 30), torch.tensor([0.0, 0.2, 0.7, 0.95, 1.0]), ints(30, 9, 5, 30, 1)
    kept = npu.npu_top_k_top_p(logits, p, k)
    for row in range(5):
        order = logits[row].argsort(descending=True)[: int(k[row])]
        probabilities = logits[row][order].softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        wanted = set(order[(before < p[row]) | (torch.arange(len(order)) == 0)].tolist())
        assert set(kept[row].isfinite().nonzero().flatten().tolist()) == wanted
        assert torch.equal(kept[row][list(wanted)], logits[row][list(wanted)])


def test_mrope_takes_each_section_from_its_own_row() -> None:
    positions, cache = ints(*range(9)).view(3, 3), rand(16, D)
    query, key = rand(3, N * D), rand(3, K * D)
    out, _ = npu.npu_mrope(positions, query, key, cache, D, mrope_section=[8, 12, 12])
    cos, sin = cache.chunk(2, -1)
    index = torch.tensor([0] * 8 + [1] * 12 + [2] * 12)
    for token in range(3):
        place = positions[index, token].long()
        c, s = cos[place, torch.arange(32)], sin[place, torch.arange(32)]
        first, second = query[token].view(N, 2, 32).unbind(1)
        expected = torch.cat((first * c - second * s, second * c + first * s), -1)
        close(out[token].view(N, D), expected, 1e-5)


def test_three_ways_to_rotate() -> None:
    cache = rand(16, 2, D // 2)
    query, key, positions = rand(3, N * D), rand(3, K * D), ints(0, 5, 9)
    expected, _ = npu.npu_mrope(positions, query, key, cache.view(16, D), D)
    cos, sin = (torch.cat((each, each), -1)[None, :, None] for each in cache[positions.long()].unbind(1))
    heads = query.view(1, 3, N, D)
    close(npu.npu_rotary_mul(heads, cos, sin).view(3, -1), expected, 1e-5)
    close(npu.npu_apply_rotary_pos_emb(heads, key.view(1, 3, K, D), cos, sin)[0].view(3, -1), expected, 1e-5)


def test_quantised_products_are_near_the_plain_one() -> None:
    x, weight = rand(7, 64, dtype=BF16), rand(64, 48)
    scale = weight.abs().amax(0) / 127
    quantised, row_scale = npu.npu_dynamic_quant(x)
    assert quantised.dtype is torch.int8 and int(quantised.abs().amax(-1).min()) == 127
    whole = (weight / scale).round().to(torch.int8)
    out = npu.npu_quant_matmul(quantised, whole, scale, pertoken_scale=row_scale, output_dtype=BF16)
    expected = (quantised.double() * row_scale[:, None]) @ (whole.double() * scale)
    close(out, expected, 1e-2)
    assert float((out.double() - x.double() @ weight.double()).abs().max()) < 0.5
    only_weight = npu.npu_weight_quant_batchmatmul(x, whole, scale.to(BF16))
    close(only_weight, x.double() @ (whole.double() * scale.to(BF16).double()), 2e-2)


def test_without_output_dtype_a_quantised_product_is_int8() -> None:
    ones = torch.ones(2, 32, dtype=torch.int8)
    assert npu.npu_quant_matmul(ones, ones.T.contiguous(), torch.tensor([10.0])).tolist() == [[127, 127], [127, 127]]
