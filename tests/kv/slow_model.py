"""A slow, obvious model of what the KV manager promises, to hold it against."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SlowBlock:
    holders: list[int] = field(default_factory=list)  # rows
    fence: int = -1
    num_pins: int = 0
    deadlines: list[float] = field(default_factory=list)  # of leases
    path: tuple[int, ...] = ()  # every token from the root to the block's end, once it is written


class SlowModel:
    """Knows every block's holders, fence, pins, leases and contents; knows no free list, order or hash."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.blocks = [SlowBlock() for _ in range(num_blocks)]
        self.settled = -1
        self.now = 0.0

    def may_be_reused(self, block: int) -> bool:
        b = self.blocks[block]
        is_leased = any(deadline > self.now for deadline in b.deadlines)
        return not b.holders and b.fence <= self.settled and not b.num_pins and not is_leased

    def hold(self, row: int, block: int) -> None:
        self.blocks[block].holders.append(row)

    def take_new(self, row: int, block: int) -> None:
        assert self.may_be_reused(block), f"block {block} was given away while in use: {self.blocks[block]}"
        self.blocks[block] = SlowBlock(holders=[row])

    def let_go(self, row: int, block: int, fence: int) -> None:
        b = self.blocks[block]
        b.holders.remove(row)
        b.fence = max(b.fence, fence)

    def write(self, block: int, path: tuple[int, ...]) -> None:
        self.blocks[block].path = path

    def check_hit(self, blocks: list[int], tokens: tuple[int, ...]) -> None:
        for i, block in enumerate(blocks):
            wanted = tokens[: (i + 1) * self.block_size]
            assert self.blocks[block].path == wanted, f"block {block} does not hold that prefix"
