"""Multi-head latent attention (DeepSeek-V2, 2024) in plain torch, by its definition: keys and values are made of all
latents of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.attention import attend, visible
from backends.reference.kv import latent_width, latents_of, write_latents
from backends.reference.norm import rms_norm
from backends.reference.rotary import rotate


def latent_rope_write(
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
    width, rotated = len(norm_weight_L), cos_sin_XR.shape[1]
    cos_TX, sin_TX = cos_sin_XR[positions_T].chunk(2, dim=-1)
    shared_T1R, q_TNR = latent_TX[:, None, width:], q_TNX[..., -rotated:]
    if interleaved:
        shared_T1R, q_TNR = in_halves(shared_T1R), in_halves(q_TNR)
    latents_TL = rms_norm(latent_TX[:, :width].contiguous(), norm_weight_L, eps)
    kept_TX = torch.cat((latents_TL, rotate(shared_T1R, cos_TX, sin_TX)[:, 0]), dim=-1)
    write_latents(kept_TX, cache, meta.slot_mapping_T)
    return torch.cat((q_TNX[..., :-rotated], rotate(q_TNR, cos_TX, sin_TX)), dim=-1)


def in_halves(x: Tensor) -> Tensor:
    """The numbers of even places, then those of odd ones, along the last axis."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata, *, scale: float) -> Tensor:
    num_heads, width = up_NYL.shape[0], up_NYL.shape[2]
    key_dim = q_TNX.shape[2] - (latent_width(cache) - width)
    out_TNV = q_TNX.new_zeros((len(q_TNX), num_heads, up_NYL.shape[1] - key_dim))
    starts = meta.query_start_S1.tolist()
    for s, seq_len in enumerate(meta.seq_lens_S.tolist()):
        begin, end = starts[s], starts[s + 1]
        kept_CX = latents_of(cache, meta, s, seq_len).float()
        made_NCY = torch.einsum("cl,nyl->ncy", kept_CX[:, :width], up_NYL.float())
        shared_NCR = kept_CX[:, width:].expand(num_heads, -1, -1)
        keys_NCX = torch.cat((made_NCY[..., :key_dim], shared_NCR), dim=-1)
        seen_QC = visible(end - begin, seq_len, None, q_TNX.device)
        out_TNV[begin:end] = attend(q_TNX[begin:end], keys_NCX, made_NCY[..., key_dim:], scale, seen_QC)
    return out_TNV.flatten(1)
