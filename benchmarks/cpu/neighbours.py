"""`xllm bench neighbours` with what developers hold it against: another tree of this repository, and llama.cpp.

`python -m benchmarks.cpu.neighbours --baseline TREE`: the engine of that tree takes turns with this one. Where
llama-cpp-python is installed (the extra `bench-peers`), llama.cpp is measured beside neighbours as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.cpu.peers import PEERS
from serving.commands.bench import neighbours_bench, report
from serving.commands.bench.neighbours_bench import Bench, Ratio, Rounds, beside, note

LLAMACPP = "llamacpp-q8"


class PeersBench(Bench):
    """`Bench` with the row `alone`, and llama.cpp in the rows beside neighbours."""

    PROG = "python -m benchmarks.cpu.neighbours"
    ROWS = ("alone", *Bench.ROWS)
    RATIOS: ClassVar[dict[str, Ratio]] = {
        "alone": Ratio("alone", "baseline_alone", "decode, batch 1, no neighbour: over the baseline tree's", 0.98),
        **Bench.RATIOS, **beside("llamacpp", "llamacpp_", "llama.cpp, ", (None, None))}

    def __init__(self, args: argparse.Namespace, folder: Path, scratch: Path, rows: list[str], stack: ExitStack):
        super().__init__(args, folder, scratch, rows, stack)
        tree, self.baseline, self.llamacpp = self._tree(), None, None
        if tree and "alone" in rows:
            self.baseline = self._start("xllm-w8a8", args.threads, tree=tree)
        if importlib.util.find_spec("llama_cpp") and {"beside_1", "beside_2"} & set(rows):
            report.note("converting the checkpoint for llama.cpp ...")
            weights = PEERS.weights_for(LLAMACPP, folder, scratch)
            self.llamacpp = self._start(LLAMACPP, args.threads, PEERS, weights=weights)

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--baseline", help="folder of another tree of this repository, for the row `alone` and for "
                            "one thread; none: this tree with one thread, and no ratio `alone`")

    @classmethod
    def reads(cls, args: argparse.Namespace) -> list[str | None]:
        return [args.baseline]

    def facts(self) -> dict[str, Any]:
        return {"baseline": "another tree" if self._args.baseline else "this tree, one thread",
                "llamacpp": "weights in Q8_0, KV in fp32" if self.llamacpp else "not measured"}

    def _tree(self) -> Path | None:
        return Path(self._args.baseline).resolve() if self._args.baseline else None

    def row(self, row: str, rates: Rounds) -> None:
        """One round of a row: the rates whose ratios it is, and what neighbours counted meanwhile."""
        if row == "alone":
            if self.baseline is not None:
                note(rates, "baseline_alone", self.decode(self.rested(self.baseline)))
            note(rates, "alone", self.decode(self.rested(self.own)))
            return
        super().row(row, rates)
        if row in ("beside_1", "beside_2") and self.llamacpp is not None:
            self._beside(int(row[-1]), self.llamacpp, "llamacpp", rates)


if __name__ == "__main__":
    sys.exit(report.ended(lambda: neighbours_bench.run(PeersBench, sys.argv[1:])))
