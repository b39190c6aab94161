"""The contracts of the operators of mixtures of experts; see `opset.py`, which has the others.

Letters: T tokens, E experts, K experts a token, F width of a gated mlp. X and Y are any sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from backends.scaled_weight import ScaledWeight


class RouteOp(Protocol):
    def __call__(self, logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None = None) -> ExpertChoice:
        """Choose `rule.num_chosen` experts for each token, the best first; among equals the one with the smaller id.

        scores = softmax or sigmoid of the logits, in fp32. Groups and experts are chosen by scores + bias_E (fp32), the
        weights are the scores without it; the sum that they are divided by has 1e-20 added, so that it is never zero.
        A token with a score that is not a number gets different experts, whichever, and weights of NaN.
        Kept groups hold at least num_chosen experts together. Rows do not depend on each other.
        """
        ...


class PackExpertsOp(Protocol):
    def __call__(self, experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> Any:
        """Bring the weights [Y, X] of all experts of a layer, in their order and of one shape and kind, into the form
        that `grouped_linear` wants; done once at load time. They are taken one after the other: no more than one need
        exist beside the result.

        quantization: as in `pack_linear`, each expert for itself. The result is opaque but has `.nbytes`.
        Raises ValueError as `pack_linear` does.
        """
        ...


class PackGatedExpertsOp(Protocol):
    def __call__(self, experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> Any:
        """As `pack_experts`, for `gated_grouped_linear`: of each expert the matrices of its gate and its up, the one
        below the other, [2F, X]."""
        ...


class GroupedLinearOp(Protocol):
    def __call__(self, x: Any, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                 out: Tensor | None = None) -> Tensor:
        """The product of each row with the weight of its expert: [T * K, Y] in x's dtype, a row for each token and each
        of its experts, in an order of the op set's own (`ExpertChoice.order`).

        from_tokens: x is [T, X], and a token's row goes to all of its experts. Else x is [T * K, X], in the order of an
        earlier result with the same choice; what works row by row may have changed it. Or it is what
        `gated_grouped_linear` has given, unchanged.
        out: the result, if its memory is the caller's; of x's dtype, and apart from x.
        A row is computed as `linear` does, with "w8a8" too, and does not depend on the rows beside it. Weights of
        experts that no token has chosen are not read.
        """
        ...


class GatedGroupedLinearOp(Protocol):
    def __call__(self, x_TX: Tensor, packed: Any, choice: ExpertChoice, *, room: Tensor | None = None,
                 out: Tensor | None = None) -> Any:
        """What is between the products of a mixture of gated mlps: `silu_mul` of `grouped_linear` from tokens, for each
        of the T * K rows. packed: of `pack_gated_experts`.

        The result is for `grouped_linear` with the same choice, and opaque: rows of [T * K, F] in x's dtype or, with
        "w8a8", the codes and scales that such a product makes of rows first, of numbers that were not rounded on the
        way. room, out: memory of the caller's for the product, [T * K, 2F], and for the rows, both of x's dtype and
        apart from x and from each other; who needs none leaves them as they are.
        """
        ...


class CombineOp(Protocol):
    def __call__(self, y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
        """Back to tokens: the sum of each token's rows of `grouped_linear`, times their weights: [T, X] in y's dtype.

        Products and sums in fp32, in the order of the token's experts, then rounded. out: as in `grouped_linear`.
        """
        ...
