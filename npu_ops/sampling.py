"""Choosing tokens from logits.

`sample` is one sort and a few passes over the vocabulary, without anything that waits for the host. The fused filter
`top_k_top_p` cannot serve it: its k ends at 1024 and has no "all", and a captured step cannot look which it is.

Letters: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_ops.contracts import check


def argmax(logits_SV: Tensor) -> Tensor:
    """The smallest index among a row's largest; what the device's own argmax takes of equals is not documented."""
    vocab_size = logits_SV.shape[1]
    ids_V = torch.arange(vocab_size, dtype=torch.int32, device=logits_SV.device)
    is_largest_SV = logits_SV == logits_SV.amax(dim=1, keepdim=True)
    first_S = torch.where(is_largest_SV, ids_V, vocab_size).amin(dim=1)
    return first_S.clamp(max=vocab_size - 1).long()  # a row of NaN has no largest


def sample(logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor,
           uniform_S: Tensor) -> Tensor:
    temperature = torch.where(temperature_S > 0, temperature_S, 1.0)[:, None]
    x_SV = logits_SV.float() / temperature
    kept_SV = _kept(x_SV, top_k_S, top_p_S[:, None], min_p_S[:, None])
    weights_SV = torch.where(kept_SV, torch.exp(x_SV - x_SV.amax(dim=1, keepdim=True)), 0.0)
    return torch.where(temperature_S > 0, _invert_cdf(weights_SV, uniform_S), argmax(logits_SV))


def _kept(x_SV: Tensor, top_k_S: Tensor, top_p_S1: Tensor, min_p_S1: Tensor) -> Tensor:
    """Which tokens are left: in the order of their probabilities each rule keeps the first few."""
    vocab_size = x_SV.shape[1]
    ordered_SV = x_SV.sort(dim=1, descending=True).values
    k_S = torch.where(top_k_S > 0, top_k_S, vocab_size).clamp(max=vocab_size).long()
    kth_S1 = ordered_SV.gather(1, (k_S - 1)[:, None])
    probs_SV = torch.softmax(ordered_SV.masked_fill(ordered_SV < kth_S1, float("-inf")), dim=1)
    before_SV = probs_SV.cumsum(dim=1) - probs_SV
    fits_SV = (probs_SV > 0) & (probs_SV >= min_p_S1 * probs_SV[:, :1]) & ((before_SV < top_p_S1) | (top_p_S1 >= 1.0))
    num_kept_S1 = fits_SV.int().sum(dim=1, keepdim=True).clamp(min=1)
    last_S1 = ordered_SV.gather(1, num_kept_S1 - 1)
    return (x_SV > last_S1) | _first_equals(x_SV, last_S1, num_kept_S1)


def _first_equals(x_SV: Tensor, last_S1: Tensor, num_kept_S1: Tensor) -> Tensor:
    """Of the tokens that equal the last one kept, as many as are left to keep, smaller ids first."""
    equal_SV = x_SV == last_S1
    room_S1 = num_kept_S1 - (x_SV > last_S1).int().sum(dim=1, keepdim=True)
    return equal_SV & (equal_SV.int().cumsum(dim=1) <= room_S1)


def _invert_cdf(weights_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The first id at which the running sum exceeds uniform * total; weights need not sum to one."""
    ids_V = torch.arange(weights_SV.shape[1], device=weights_SV.device)
    cdf_SV = weights_SV.cumsum(dim=1)
    passed_S = (cdf_SV <= uniform_S[:, None] * cdf_SV[:, -1:]).int().sum(dim=1)
    last_kept_S = torch.where(weights_SV > 0, ids_V, 0).amax(dim=1)
    return torch.minimum(passed_S, last_kept_S)


def top_k_top_p(*, logits_SV: Tensor, p_S: Tensor | None = None, k_S: Tensor | None = None) -> Tensor:
    """The logits with all but the k largest, then all but the smallest set that reaches p, at -inf. k in [1, 1024]."""
    check("npu_top_k_top_p", logits=logits_SV, p=p_S, k=k_S)
    out: Tensor = torch.ops.npu.npu_top_k_top_p(logits_SV, p=p_S, k=k_S)
    return out
