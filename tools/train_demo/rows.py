"""`RowSampler`: rows of one length out of the stream of tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RowSampler:
    """Cut the stream into rows of one length; a new offset and a new order for each pass over it."""

    def __init__(self, stream: np.ndarray, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.epoch = 0
        self.starts: list[int] = []

    def _refill(self) -> None:
        rng = np.random.default_rng([self.seed, self.length, self.epoch])
        starts = np.arange(rng.integers(self.length), len(self.stream) - self.length, self.length)
        self.starts = rng.permutation(starts).tolist()
        self.epoch += 1

    def rows(self, count: int) -> Tensor:
        """Return (count, length + 1) token ids."""
        while len(self.starts) < count:
            self._refill()
        starts = [self.starts.pop() for _ in range(count)]
        return torch.from_numpy(np.stack([self.stream[s:s + self.length + 1] for s in starts]))
