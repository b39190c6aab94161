"""Each operator at the sizes of a real model, against float64 on the CPU: that the device's own float64, by which
`ops` judges all else, is right, and that what holds for small cases holds for large ones.

Little enough is computed that a few seconds of a few cores do: of `lm_head` some outputs, of the sampler some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.expert_choice import ExpertChoice, RouteRule
from backends.reference.kv_codes import QUANTISED
from benchmarks.gpu.op_cases import (
    NEXT_CODE,
    QUANTIZATIONS,
    TOLERANCE,
    Check,
    World,
    in_codes,
    later,
    lora_truth,
    norm_truth,
    rounded,
)
from benchmarks.gpu.op_cases_experts import experts_truth, gated_truth
from benchmarks.gpu.op_cases_kv import rope_check, transfer_check
from benchmarks.gpu.op_cases_latent import V2_LITE, attention_check, latent_step, rope_write_check
from benchmarks.gpu.op_cases_sampling import LIMITS, bitmask_check, first_largest, penalise_check, sample_check
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.shapes import ModelShape, expert_layer

HOST = torch.device("cpu")
Spots = Callable[[World, ModelShape], Iterator[Check]]
TOKENS = 64
JUDGED_ROWS, JUDGED_OUTPUTS, HISTORY = 4, 512, 700
DECODED, CHUNK = 8, 384  # sequences of a decode step, tokens of a chunk
LATENTS = 1024  # of the longest sequence: the CPU makes keys and values of them all


def on_host(check: Check) -> Check:
    """What the device found is brought to the CPU before it is compared."""
    return replace(check, run=lambda: [x.to(HOST) for x in check.run()],
                   truth=lambda: [x.to(HOST) for x in check.truth()])  # fmt: skip


def linear(world: World, shape: ModelShape) -> Iterator[Check]:
    """The fused projection of queries, keys and values in each quantisation, with few rows and with many; lm_head."""
    X, Y, dtype = shape.hidden, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, world.dtypes[0]
    for quantization in (None, *QUANTIZATIONS):
        weight = world.randn(Y, X, dtype=dtype)
        for rows in (TOKENS, 4 * TOKENS):
            yield _linear(world, weight, rows, quantization, slice(None))
    yield _linear(world, world.randn(shape.vocab, X, dtype=dtype), TOKENS, None, slice(0, shape.vocab, _stride(shape)))


def _stride(shape: ModelShape) -> int:
    return max(1, shape.vocab // JUDGED_OUTPUTS)


def _linear(world: World, weight: Tensor, rows: int, quantization: str | None, judged: slice) -> Check:
    x, dtype = world.randn(rows, weight.shape[1], dtype=weight.dtype), weight.dtype

    def run() -> Sequence[Tensor]:
        packed = world.ops.pack_linear(weight.clone(), quantization=quantization)
        return (world.ops.linear(x, packed)[:, judged],)

    def truth() -> Sequence[Tensor]:
        kept, rows_TX = weight.to(HOST)[judged], x.to(HOST)
        exact = kept.double() if quantization is None else rounded(kept, quantization)
        return ((in_codes(rows_TX) if quantization == "w8a8" else rows_TX.double()) @ exact.T,)

    tolerance = 6e-2 if quantization == "fp8" and rows > TOKENS else TOLERANCE[dtype]
    tolerance = max(tolerance, NEXT_CODE if quantization == "w8a8" else 0.0)
    return Check(name=f"{quantization or 'plain'}/{rows}x{len(weight)}x{weight.shape[1]}", run=run, truth=truth,
                 tolerance=tolerance, may_refuse=quantization is not None)  # fmt: skip


def lora_add(world: World, shape: ModelShape) -> Iterator[Check]:
    dtype, rank, slots = world.dtypes[0], 16, 4
    parts = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim)
    a = (world.randn(slots, len(parts) * rank, shape.hidden) / shape.hidden**0.5).to(dtype)
    b = (world.randn(slots, sum(parts), rank) / rank**0.5).to(dtype)
    x, y = world.randn(TOKENS, shape.hidden, dtype=dtype), world.randn(TOKENS, sum(parts), dtype=dtype)
    slots_T = world.randint(slots + 1, TOKENS, dtype=torch.int32)
    packed = world.ops.pack_lora(a.clone(), b.clone(), parts)

    def run() -> Sequence[Tensor]:
        added = y.clone()
        world.ops.lora_add(added, x, packed, slots_T)
        return (added,)

    def truth() -> Sequence[Tensor]:
        return (lora_truth(y.to(HOST), x.to(HOST), a.to(HOST), b.to(HOST), slots_T.to(HOST), parts),)

    yield Check(name=f"{TOKENS}x{sum(parts)}x{shape.hidden}", run=run, truth=truth, tolerance=2 * TOLERANCE[dtype])


def embedding(world: World, shape: ModelShape) -> Iterator[Check]:
    table = world.randn(shape.vocab, shape.hidden, dtype=world.dtypes[0])
    ids = world.randint(shape.vocab, 4 * TOKENS, dtype=torch.int32)
    ids[0], ids[1] = 0, shape.vocab - 1
    yield Check(name=f"{shape.vocab}x{shape.hidden}", run=lambda: (world.ops.embedding(ids, table),),
                truth=lambda: (table.to(HOST)[ids.to(HOST).long()],))  # fmt: skip


def feed_tokens(world: World, shape: ModelShape) -> Iterator[Check]:
    rows = 4 * TOKENS
    ids, tokens = world.randint(shape.vocab, rows, dtype=torch.int32), world.randint(shape.vocab, rows) - 3
    feed = world.randint(2 * rows, rows, dtype=torch.int32) - rows

    def truth() -> Sequence[Tensor]:
        known = tokens.tolist()
        fed = [max(known[f], 0) if f >= 0 else i for i, f in zip(ids.tolist(), feed.tolist())]
        return (torch.tensor(fed, dtype=torch.int32),)

    yield Check(name=f"{rows}", run=lambda: (world.ops.feed_tokens(ids, feed, tokens),), truth=truth)


def rms_norm(world: World, shape: ModelShape) -> Iterator[Check]:
    dtype = world.dtypes[0]
    x, weight = world.randn(4 * TOKENS, shape.hidden, dtype=dtype), world.randn(shape.hidden, dtype=dtype)
    yield Check(name=f"{len(x)}x{shape.hidden}", run=lambda: (world.ops.rms_norm(x, weight, 1e-6),),
                truth=lambda: (norm_truth(x.to(HOST), weight.to(HOST), 1e-6),), tolerance=TOLERANCE[dtype])


def add_rms_norm(world: World, shape: ModelShape) -> Iterator[Check]:
    dtype, rows = world.dtypes[0], 4 * TOKENS
    x, residual = (world.randn(rows, shape.hidden, dtype=dtype) for _ in range(2))
    weight = world.randn(shape.hidden, dtype=dtype)

    def run() -> Sequence[Tensor]:
        added = residual.clone()
        return world.ops.add_rms_norm(x.clone(), added, weight, 1e-6), added

    def truth() -> Sequence[Tensor]:
        added = x.to(HOST).double() + residual.to(HOST).double()
        return norm_truth(added, weight.to(HOST), 1e-6), added

    yield Check(name=f"{rows}x{shape.hidden}", run=run, truth=truth, tolerance=TOLERANCE[dtype])


def silu_mul(world: World, shape: ModelShape) -> Iterator[Check]:
    dtype = world.dtypes[0]
    x = world.randn(4 * TOKENS, 2 * shape.ffn, dtype=dtype) * 3

    def truth() -> Sequence[Tensor]:
        gate, up = x.to(HOST).double().chunk(2, 1)
        return (F.silu(gate) * up,)

    yield Check(name=f"{len(x)}x{shape.ffn}", run=lambda: (world.ops.silu_mul(x),), truth=truth,
                tolerance=TOLERANCE[dtype])  # fmt: skip


def steps(world: World, shape: ModelShape) -> Iterator[tuple[str, PagedStep]]:
    """A decode step and a chunk behind others, over each form of the cache."""
    most = min(shape.max_len, world.longest, 4096)
    ragged = [1, most, *(world.rng.randint(1, most) for _ in range(DECODED - 2))]
    chunk = min(CHUNK, most // 2)
    for kv_dtype in (None, *world.backend.kv_dtypes):
        for name, query_lens, seq_lens in (("decode", [1] * DECODED, ragged),
                                           ("chunk", [chunk, 1, chunk // 3], [most // 2, 5, chunk // 3]),
                                           ("prompt", [1, most], [9, most])):  # fmt: skip
            over = f" over {QUANTISED[kv_dtype]}" if kv_dtype else ""
            yield f"{name}{over}", PagedStep(
                world.backend, query_lens, seq_lens, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
                dtype=world.dtypes[0], generator=world.generator, kv_dtype=kv_dtype)  # fmt: skip


def attention(world: World, shape: ModelShape) -> Iterator[Check]:
    for name, step in steps(world, shape):
        q, caches = step.random(sum(step.query_lens), shape.heads, shape.head_dim), step.filled_caches()

        def truth(step: PagedStep = step, q: Tensor = q) -> Sequence[Tensor]:
            return (step.truth(q.to(HOST)),)

        yield Check(name=name, tolerance=2 * TOLERANCE[step.dtype], may_refuse=step.kv_dtype in QUANTISED,
                    run=later(step.attend, world.ops, q, caches), truth=truth)


def qkv_rope_write(world: World, shape: ModelShape) -> Iterator[Check]:
    for name, step in steps(world, shape):
        yield rope_check(world, step, shape.heads, name, normed=True, judge=HOST)


def latent_steps(world: World) -> Iterator[tuple[str, PagedStep]]:
    """At the widths of DeepSeek V2-Lite. A prompt so long is expanded, a chunk is not."""
    most = min(world.longest, LATENTS)
    chunk = min(CHUNK, most // 2)
    for kv_dtype in (None, *world.backend.kv_dtypes):
        for name, query_lens, seq_lens in (("decode", [1] * 4, [1, most, most // 3 + 1, 7]),
                                           ("chunk", [chunk, 1, chunk // 3], [most // 2, 5, chunk // 3]),
                                           ("prompt", [1, most], [9, most])):  # fmt: skip
            over = f" over {QUANTISED[kv_dtype]}" if kv_dtype else ""
            yield f"{name}{over}", latent_step(world, V2_LITE, query_lens, seq_lens, world.dtypes[0], kv_dtype)


def latent_attention(world: World, shape: ModelShape) -> Iterator[Check]:
    for name, step in latent_steps(world):
        yield attention_check(world, step, V2_LITE, name, HOST)


def latent_rope_write(world: World, shape: ModelShape) -> Iterator[Check]:
    for name, step in latent_steps(world):
        yield rope_write_check(world, step, V2_LITE, name, interleaved=True, judge=HOST)


def copy_blocks(world: World, shape: ModelShape) -> Iterator[Check]:
    for kv_dtype in (None, *world.backend.kv_dtypes):
        step = PagedStep(world.backend, [1], [16 * world.backend.default_block_size], num_kv_heads=shape.kv_heads,
                         head_dim=shape.head_dim, dtype=world.dtypes[0], generator=world.generator,
                         kv_dtype=kv_dtype)  # fmt: skip
        cache, src = step.filled_caches()[0], torch.arange(8, device=world.device.torch)

        def run(cache: Tensor = cache, src: Tensor = src) -> Sequence[Tensor]:
            changed = cache.clone()
            world.ops.copy_blocks(changed, src, src + 8)
            return (changed.view(torch.uint8),)

        def truth(cache: Tensor = cache) -> Sequence[Tensor]:
            changed = cache.to(HOST).view(torch.uint8).clone()
            changed[8:16] = changed[:8].clone()
            return (changed,)

        yield Check(name=str(cache.dtype), run=run, truth=truth, may_refuse=kv_dtype is not None)


def transfers(world: World, shape: ModelShape) -> Iterator[Check]:
    """Out and back: both operators are in one case."""
    plain = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[world.dtypes[0]]
    forms = [(plain, None), ("int8", None), ("fp8", None), *((QUANTISED[d], d) for d in world.backend.kv_dtypes)]
    for format, kv_dtype in forms:
        yield transfer_check(world, format, world.dtypes[0], kv_dtype, num_kv_heads=shape.kv_heads,
                             head_dim=shape.head_dim)  # fmt: skip


def logits_of(world: World, shape: ModelShape, rows: int) -> Tensor:
    return world.randn(rows, shape.vocab) * 3


def argmax(world: World, shape: ModelShape) -> Iterator[Check]:
    logits = logits_of(world, shape, TOKENS).round()  # of equals the first counts
    yield Check(name=f"{TOKENS}x{shape.vocab}", run=lambda: (world.ops.argmax(logits),),
                truth=lambda: (first_largest(logits.to(HOST)),))


def sample(world: World, shape: ModelShape) -> Iterator[Check]:
    rows = world.rng.sample(LIMITS, JUDGED_ROWS)
    yield sample_check(world, logits_of(world, shape, JUDGED_ROWS), rows, world.rand(JUDGED_ROWS),
                       f"{JUDGED_ROWS}x{shape.vocab}", judge=HOST)


def penalise(world: World, shape: ModelShape) -> Iterator[Check]:
    rows = torch.randperm(TOKENS, generator=world.generator, device=world.device.torch)[: TOKENS // 2]
    starts = [i * HISTORY for i in range(len(rows) + 1)]
    tokens = world.randint(shape.vocab, starts[-1], dtype=torch.int32)
    yield penalise_check(world, logits_of(world, shape, TOKENS), rows, tokens, starts,
                         [start + HISTORY // 3 for start in starts[:-1]], f"{len(rows)}x{shape.vocab}", judge=HOST)


def apply_token_bitmask(world: World, shape: ModelShape) -> Iterator[Check]:
    yield bitmask_check(world, logits_of(world, shape, TOKENS), -(-shape.vocab // 32), judge=HOST)


def route(world: World, shape: ModelShape) -> Iterator[Check]:
    """Of a layer of experts, whatever the model. Weights may be equal but for rounding, so that no ids are compared."""
    layer = expert_layer(large=world.device.is_cuda)
    logits = world.randn(4 * TOKENS, layer.num_experts) * 2
    rule = RouteRule(num_chosen=layer.num_chosen, renormalise=True)

    def truth() -> Sequence[Tensor]:
        best = logits.to(HOST).double().softmax(1).topk(layer.num_chosen, dim=1).values
        return (best / best.sum(1, keepdim=True),)

    yield Check(name=f"{len(logits)}/K{layer.num_chosen} of {layer.num_experts}", truth=truth,
                run=lambda: (world.ops.route(logits, rule).weights_TK,), tolerance=TOLERANCE[torch.float32])


def grouped_linear(world: World, shape: ModelShape) -> Iterator[Check]:
    """gate and up of a layer of experts and back to the tokens, in each quantisation, with few tokens and with many."""
    layer, dtype = expert_layer(large=world.device.is_cuda), world.dtypes[0]
    X, Y, K = layer.hidden, 2 * layer.ffn, layer.num_chosen
    weights = tuple(world.randn(Y, X, dtype=dtype) for _ in range(max(K, layer.num_experts // 8)))
    for quantization in (None, *QUANTIZATIONS):
        packed = world.ops.pack_experts(weights, quantization=quantization)
        for rows in (JUDGED_ROWS, TOKENS):
            x, ids = world.randn(rows, X, dtype=dtype), world.rand(rows, len(weights)).argsort(dim=1)[:, :K].int()
            choice = ExpertChoice(ids.contiguous(), world.rand(rows, K))

            def run(x: Tensor = x, packed: object = packed, choice: ExpertChoice = choice) -> Sequence[Tensor]:
                again = ExpertChoice(choice.ids_TK, choice.weights_TK)
                return (world.ops.combine(world.ops.grouped_linear(x, packed, again, from_tokens=True), again),)

            def truth(x: Tensor = x, choice: ExpertChoice = choice, of: str | None = quantization) -> Sequence[Tensor]:
                return (experts_truth(x.to(HOST), [weight.to(HOST) for weight in weights], choice.ids_TK.to(HOST),
                                      choice.weights_TK.to(HOST), of),)

            tolerance = 2 * max(TOLERANCE[dtype], NEXT_CODE if quantization == "w8a8" else 0.0)
            yield Check(name=f"{quantization or 'plain'}/{rows}x{Y}x{X}/K{K} of {len(weights)}", run=run, truth=truth,
                        tolerance=tolerance)


def gated_grouped_linear(world: World, shape: ModelShape) -> Iterator[Check]:
    """A whole layer of gated experts, in each quantisation, with few tokens and with many."""
    layer, dtype = expert_layer(large=world.device.is_cuda), world.dtypes[0]
    X, F, K = layer.hidden, layer.ffn, layer.num_chosen
    number = max(K, layer.num_experts // 8)
    ups = tuple(world.randn(2 * F, X, dtype=dtype) / X**0.5 for _ in range(number))
    downs = tuple(world.randn(X, F, dtype=dtype) / F**0.5 for _ in range(number))
    for quantization in (None, *QUANTIZATIONS):
        up = world.ops.pack_gated_experts(ups, quantization=quantization)
        down = world.ops.pack_experts(downs, quantization=quantization)
        for rows in (JUDGED_ROWS, TOKENS):
            x, ids = world.randn(rows, X, dtype=dtype), world.rand(rows, number).argsort(dim=1)[:, :K].int()
            choice = ExpertChoice(ids.contiguous(), world.rand(rows, K))

            def run(x: Tensor = x, packed: tuple[object, object] = (up, down), choice: ExpertChoice = choice
                    ) -> Sequence[Tensor]:
                again = ExpertChoice(choice.ids_TK, choice.weights_TK)
                rows_RF = world.ops.gated_grouped_linear(x, packed[0], again)
                return (world.ops.combine(world.ops.grouped_linear(rows_RF, packed[1], again, from_tokens=False),
                                          again),)

            def truth(x: Tensor = x, choice: ExpertChoice = choice, of: str | None = quantization) -> Sequence[Tensor]:
                return (gated_truth(x.to(HOST), [up.to(HOST) for up in ups], [down.to(HOST) for down in downs],
                                    choice.ids_TK.to(HOST), choice.weights_TK.to(HOST), of),)

            tolerance = 4 * max(TOLERANCE[dtype], NEXT_CODE if quantization == "w8a8" else 0.0)
            yield Check(name=f"{quantization or 'plain'}/{rows}x{F}x{X}/K{K} of {number}", run=run, truth=truth,
                        tolerance=tolerance)


SPOTS: dict[str, Spots] = {
    "linear": linear, "lora_add": lora_add, "embedding": embedding, "feed_tokens": feed_tokens, "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm, "qkv_rope_write": qkv_rope_write, "attention": attention, "silu_mul": silu_mul,
    "latent_rope_write": latent_rope_write, "latent_attention": latent_attention,
    "copy_blocks": copy_blocks, "export_blocks": transfers, "apply_token_bitmask": apply_token_bitmask,
    "penalise": penalise, "argmax": argmax, "sample": sample, "route": route, "grouped_linear": grouped_linear,
    "gated_grouped_linear": gated_grouped_linear,
}  # fmt: skip
# Those that take part in another's case.
WITHIN = {"pack_linear": "linear", "pack_lora": "lora_add", "plan": "attention", "stored_bytes": "export_blocks",
          "import_blocks": "export_blocks", "pack_experts": "grouped_linear", "combine": "grouped_linear",
          "pack_gated_experts": "gated_grouped_linear"}  # fmt: skip
