"""The instances of a cluster as a table in a terminal, from what `GET /cluster` says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

STYLES = {"active": "green", "connecting": "yellow", "loading": "yellow", "draining": "yellow", "lease lost": "yellow"}
COLUMNS = ("instance", "state", "open", "running", "waiting", "KV", "hits", "")


def cluster_head(shown: Mapping[str, Any]) -> Text:
    """One line: policy, how many take requests, what went on elsewhere. shown: the whole answer of `GET /cluster`."""
    totals, members = shown["totals"], shown["members"]
    num_active = sum(member["state"] == "active" for member in members)
    recovered = sum(totals["recovered"].values())
    return Text.assemble(
        ("cluster  ", "bold"), f"{num_active} of {len(members)} active  policy {shown['policy']}  "
        f"open {shown['open_requests']}  went on elsewhere {recovered}  given up {totals['given_up']}",
        overflow="ellipsis", no_wrap=True)


def cluster_table(members: Iterable[Mapping[str, Any]]) -> Table:
    """members: as `GET /cluster` has them; those without figures are not connected."""
    table = Table.grid(padding=(0, 2))
    for name in COLUMNS:  # where room is short, reasons give way
        table.add_column(justify="left" if name in ("instance", "state", "") else "right", no_wrap=name != "")
    table.add_row(*(Text(name, "dim") for name in COLUMNS))
    for member in members:
        state, reason = member["state"], member.get("reason") or ""
        figures = [""] * 5
        if "running" in member:
            hits = member["hit_rate"]
            figures = [str(member["sent"]), str(member["running"]), str(member["waiting"]),
                       f"{member['kv_usage']:.1%}", "-" if hits is None else f"{hits:.1%}"]
        table.add_row(Text(member["name"], "bold"), Text(state, STYLES.get(state, "red")), *figures,
                      Text(reason, "dim", overflow="ellipsis", no_wrap=True))
    return table
