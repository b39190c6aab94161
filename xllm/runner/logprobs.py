"""Log-probabilities of the model's own distribution: log_softmax of the logits as they came out,
before temperature, penalties and truncation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xllm.request import TokenLogprobs


def token_logprobs(logits_XV: Tensor, token_ids_X: np.ndarray, num_top_X: np.ndarray) -> list[TokenLogprobs]:
    """One entry a row of logits (fp32), for the token that was chosen (or given) there.

    num_top_X: how many of the likeliest tokens to name. The rank counts the tokens with larger logits.
    """
    chosen_X1 = torch.from_numpy(token_ids_X.astype(np.int64)).to(logits_XV.device)[:, None]
    log_sum_X1 = torch.logsumexp(logits_XV, dim=-1, keepdim=True)
    chosen_logit_X1 = logits_XV.gather(1, chosen_X1)
    ranks = ((logits_XV > chosen_logit_X1).sum(dim=-1) + 1).tolist()
    logprobs = (chosen_logit_X1 - log_sum_X1)[:, 0].tolist()
    num_top = min(int(num_top_X.max(initial=0)), logits_XV.shape[1])
    top_logits, top_ids = torch.topk(logits_XV, num_top, dim=-1)
    all_top_ids, all_top_logprobs = top_ids.tolist(), (top_logits - log_sum_X1).tolist()
    return [
        TokenLogprobs(
            token_id=token_id, logprob=logprobs[i], rank=ranks[i],
            top_ids=tuple(all_top_ids[i][:num]), top_logprobs=tuple(all_top_logprobs[i][:num]),
        )
        for i, (token_id, num) in enumerate(zip(token_ids_X.tolist(), num_top_X.tolist(), strict=True))
    ]
