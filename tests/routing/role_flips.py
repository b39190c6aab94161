"""Write what docs/disaggregation.md shows of roles: `python -m tests.routing.role_flips TRACE.json PLOT.png`.

A load of prompts that becomes one of answers, on a modelled cluster (`role_simulation.py`) with roles that change and
with roles that stay.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

from tests.routing.role_simulation import Phase, RoleSimulation, kept
from tests.routing.test_role_simulation import simulated

matplotlib.use("Agg")
SHIFT = (Phase(60.0, 6.0, 6000, 30), Phase(90.0, 28.0, 300, 600))  # of prompts, then of answers


def told(simulation: RoleSimulation) -> dict[str, Any]:
    """Of one run, as JSON."""
    shift_s = SHIFT[0].seconds
    return {"kept_of_prompts": round(kept(time for time in simulation.times if time[0] < shift_s), 4),
            "kept_of_answers": round(kept(time for time in simulation.times if time[0] >= shift_s), 4),
            "num_requests": len(simulation.times),
            "reasons": dict(simulation.reasons),
            "flips": [{"at_s": round(at_s, 3), **asdict(flip)} for at_s, flip in simulation.flips],
            "looks": [asdict(look) for look in simulation.looks if look.now_s <= SHIFT[0].seconds + SHIFT[1].seconds]}


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """The numbers of instances, the shortest queue and the time between tokens, one below the other."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(8, 7), layout="constrained")
    turned, still = runs["roles that change"]["looks"], runs["roles that stay"]["looks"]
    now_s = [look["now_s"] for look in turned]
    axes[0].step(now_s, [look["num_prefill"] for look in turned], where="post", label="prefill instances")
    axes[0].step(now_s, [look["num_decode"] for look in turned], where="post", label="decode instances")
    for looks, name in ((turned, "roles that change"), (still, "roles that stay")):
        axes[1].plot(now_s, [look["queue_s"] for look in looks], label=name)
        axes[2].plot(now_s, [1000 * look["next_token_s"] for look in looks], label=name)
    axes[2].axhline(50, color="grey", linewidth=0.8, linestyle="--", label="target")
    for axis, what in zip(axes, ("instances", "shortest queue of prompts, s", "between tokens, ms"), strict=True):
        axis.axvline(SHIFT[0].seconds, color="grey", linewidth=0.8)
        axis.set_ylabel(what)
        axis.legend(loc="upper right")
    axes[2].set_xlabel("seconds; at the line, prompts of 6000 tokens become answers of 600")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    results = {name: told(simulated(SHIFT, is_dynamic=name == "roles that change"))
               for name in ("roles that change", "roles that stay")}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")
    plot(results, Path(sys.argv[2]))
    for name, result in results.items():
        print(f"{name}: both targets kept by {result['kept_of_prompts']:.1%} before the shift and "
              f"{result['kept_of_answers']:.1%} after it, of {result['num_requests']}; {len(result['flips'])} flips")
