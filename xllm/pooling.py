"""`PoolingParams`: a request for one vector that stands for a whole text, instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.errors import RequestError

KINDS = ("last", "mean")
MAX_DIMENSIONS = 2**20


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """kind: the last token's hidden state, or the mean over all tokens; after the model's final norm.

    dimensions: only the first so many numbers (Matryoshka embeddings; Kusupati et al. 2022). normalize: to length 1,
    after that cut.

    Raises:
        RequestError: a value is out of range; `.field` names it.
    """

    kind: str = "last"
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"pooling must be one of {', '.join(KINDS)}, got {self.kind!r}", field="pooling")
        if self.dimensions is not None and (type(self.dimensions) is not int
                                            or not 1 <= self.dimensions <= MAX_DIMENSIONS):
            raise RequestError(f"dimensions must be an integer in 1 to {MAX_DIMENSIONS}, got {self.dimensions!r}",
                               field="dimensions")

    def check_width(self, hidden_size: int) -> None:
        """Raise RequestError if the model's vectors have fewer numbers."""
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise RequestError(f"dimensions: the model's embeddings have {hidden_size} numbers, not {self.dimensions}",
                               field="dimensions")

    @property
    def needs_every_token(self) -> bool:
        """Whether no token may come from a cache."""
        return self.kind == "mean"
