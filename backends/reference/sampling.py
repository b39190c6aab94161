"""Choosing tokens from logits in plain torch: whole sorts in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(logits_SV: Tensor) -> Tensor:
    vocab_size = logits_SV.shape[1]
    is_largest = logits_SV == logits_SV.amax(dim=1, keepdim=True)
    ids = torch.arange(vocab_size, device=logits_SV.device)
    first = torch.where(is_largest, ids, vocab_size).amin(dim=1)
    return first.clamp_(max=vocab_size - 1)  # a row of NaN has no largest value


def keep_top_k(logits_SV: Tensor, top_k_S: Tensor) -> Tensor:
    """The logits with all but the k largest of each row at -inf; equals of the k-th are kept, 0 keeps all."""
    vocab_size = logits_SV.shape[1]
    k_S = torch.where(top_k_S > 0, top_k_S, vocab_size).clamp(max=vocab_size).long()
    kth_S = logits_SV.sort(dim=1, descending=True).values.gather(1, (k_S - 1)[:, None])
    return logits_SV.masked_fill(logits_SV < kth_S, float("-inf"))


def keep_top_p(probs_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """The probabilities with all but the most likely tokens at 0: as few as reach top_p, smaller ids first."""
    ordered, ids = probs_SV.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    dropped = (before >= top_p_S[:, None]) & (top_p_S[:, None] < 1.0)
    dropped[:, 0] = False
    return probs_SV.masked_fill(torch.zeros_like(dropped).scatter_(1, ids, dropped), 0.0)


def invert_cdf(weights_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The first id at which the running sum exceeds uniform * total; weights need not sum to one."""
    cdf_SV = weights_SV.cumsum(dim=1)
    target_S = uniform_S[:, None] * cdf_SV[:, -1:]
    ids = torch.arange(weights_SV.shape[1], device=weights_SV.device)
    last_kept_S = torch.where(weights_SV > 0, ids, 0).amax(dim=1)
    return torch.minimum((cdf_SV <= target_S).sum(dim=1), last_kept_S)


def sample(
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, uniform_S: Tensor
) -> Tensor:
    greedy_S = argmax(logits_SV)
    temperature = torch.where(temperature_S > 0, temperature_S, 1.0).double()
    logits = keep_top_k(logits_SV.double() / temperature[:, None], top_k_S)
    probs = torch.softmax(logits, dim=1)
    probs = probs.masked_fill(probs < min_p_S.double()[:, None] * probs.amax(dim=1, keepdim=True), 0.0)
    probs = keep_top_p(probs, top_p_S.double())
    return torch.where(temperature_S > 0, invert_cdf(probs, uniform_S.double()), greedy_S)
