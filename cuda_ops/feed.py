"""Which tokens a step computes: the host's, or those that the step before it sampled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import launch

BLOCK = 256  # tokens of one program. Chosen: the kernel copies one number a token, whatever the block


@triton.jit(do_not_specialize=["T"])
def feed_tokens_kernel(input_ids_ptr, feed_ptr, sampled_ptr, out_ptr, T, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    feed = tl.load(feed_ptr + place, place < T, -1)
    fed = tl.load(sampled_ptr + feed, feed >= 0, 0)
    own = tl.load(input_ids_ptr + place, place < T, 0)
    tl.store(out_ptr + place, tl.where(feed >= 0, tl.maximum(fed, 0).to(tl.int32), own), place < T)


def feed_tokens(input_ids_T: Tensor, feed_T: Tensor, sampled_Q: Tensor) -> Tensor:
    T = len(input_ids_T)
    out_T = torch.empty_like(input_ids_T)
    launch(feed_tokens_kernel, (triton.cdiv(T, BLOCK),), input_ids_T, feed_T, sampled_Q, out_T, T, BLOCK=BLOCK,
           num_warps=4)
    return out_T
