"""`PoolingParams`: a request for one vector that stands for a whole text, instead of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xllm.errors import RequestError

KINDS = ("last", "cls", "mean", "max", "weightedmean", "mean_sqrt_len_tokens")
MAX_DIMENSIONS = 2**20  # A bound on nonsense, far beyond any model; `resolve` refuses more than the model has


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingDefaults:
    """What a checkpoint means by an embedding; `width` numbers. See `PoolingParams`."""

    kind: str = "last"
    normalize: bool = True
    width: int


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """kind: what becomes of the hidden states after the model's final norm, as in sentence-transformers: the last
    token's (`last`), the first one's (`cls`), their mean, their largest numbers (`max`), the mean weighted by position
    from 1 on (`weightedmean`), the sum over the root of their number (`mean_sqrt_len_tokens`); None: as the checkpoint
    says, else `last`.

    dimensions: only the first so many numbers (Matryoshka embeddings; Kusupati et al. 2022). normalize: to length 1,
    after that cut; None: as the checkpoint's modules.json says, else yes.

    Raises:
        RequestError: a value is out of range; `.field` names it.
    """

    kind: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise RequestError(f"pooling must be one of {', '.join(KINDS)}, got {self.kind!r}", field="pooling")
        if self.dimensions is not None and (type(self.dimensions) is not int
                                            or not 1 <= self.dimensions <= MAX_DIMENSIONS):
            raise RequestError(f"dimensions must be an integer in 1 to {MAX_DIMENSIONS}, got {self.dimensions!r}",
                               field="dimensions")

    def resolve(self, defaults: PoolingDefaults) -> PoolingParams:
        """With all that was left open. Raises RequestError if the model's vectors have fewer numbers."""
        if self.dimensions is not None and self.dimensions > defaults.width:
            raise RequestError(f"dimensions: the model's embeddings have {defaults.width} numbers, not "
                               f"{self.dimensions}", field="dimensions")
        return replace(self, kind=self.kind or defaults.kind,
                       normalize=defaults.normalize if self.normalize is None else self.normalize)

    @property
    def needs_every_token(self) -> bool:
        """Whether no token may come from a cache."""
        return self.kind != "last"
