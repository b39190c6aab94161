"""`REFERENCE`: the naive truth of every operator, in plain torch, on any device that torch knows."""

from __future__ import annotations

from backends.gated_experts import gated_by
from backends.opset import OpSet
from backends.reference import (
    activation,
    attention,
    experts,
    kv,
    latent,
    linear,
    logits,
    norm,
    rotary,
    sampling,
    stored_kv,
)
from backends.reference.lora import REFERENCE_LORA

REFERENCE = OpSet(
    name="reference",
    pack_linear=linear.pack_linear,
    linear=linear.linear,
    pack_lora=REFERENCE_LORA.pack_lora,
    lora_add=REFERENCE_LORA.lora_add,
    embedding=linear.embedding,
    feed_tokens=linear.feed_tokens,
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    qkv_rope_write=rotary.qkv_rope_write,
    plan=attention.plan,
    attention=attention.attention,
    latent_rope_write=latent.latent_rope_write,
    latent_attention=latent.latent_attention,
    silu_mul=activation.silu_mul,
    route=experts.route,
    pack_experts=experts.pack_experts,
    grouped_linear=experts.grouped_linear,
    pack_gated_experts=experts.pack_experts,
    gated_grouped_linear=gated_by(experts.grouped_linear, activation.silu_mul),
    combine=experts.combine,
    copy_blocks=kv.copy_blocks,
    stored_bytes=stored_kv.stored_bytes,
    export_blocks=stored_kv.export_blocks,
    import_blocks=stored_kv.import_blocks,
    apply_token_bitmask=logits.apply_token_bitmask,
    penalise=logits.penalise,
    argmax=sampling.argmax,
    sample=sampling.sample,
)
