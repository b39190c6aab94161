"""`RouteRule` and `ExpertChoice`: how a layer's router chooses experts for each token, and what it chose.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRule:
    """What `OpSet.route` does with a layer's logits.

    num_chosen: K. sigmoid: scores are sigmoids of the logits (DeepSeek-V3), else their softmax.
    num_groups, num_kept_groups: the experts are so many groups of equal size, and only those of the best groups can be
    chosen (DeepSeek-V2). A group is as good as its `summed_per_group` best experts together.
    renormalise: divide the weights by their sum. scale: multiplies them at last.
    """

    num_chosen: int
    sigmoid: bool = False
    num_groups: int = 1
    num_kept_groups: int = 1
    summed_per_group: int = 1
    renormalise: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        assert 1 <= self.num_kept_groups <= self.num_groups and self.num_chosen >= 1 and self.summed_per_group >= 1


@dataclass(slots=True)
class ExpertChoice:
    """The experts of each token of a step, in one layer; built by `OpSet.route`.

    ids_TK: int32, those of a token all different. weights_TK: fp32.
    order: in which order the op set keeps the T * K rows of these experts; made by the first operator that wants it,
    and private to the op set. Whoever changes the ids sets it to None.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    order: Any = None
