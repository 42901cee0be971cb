# SPDX-License-Identifier: Apache-2.0
"""What gmemctl prints for people: one table for each command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gmemd.sizes import format_size

Reply = dict[str, Any]
Namespace = argparse.Namespace


def _table(*columns: str, title: str | None = None) -> Table:
    """Columns whose name begins with < are text, the others are numbers."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for column in columns:
        text = column.startswith("<")
        table.add_column(column.lstrip("<"), justify="left" if text else "right", no_wrap=True)
    return table


def _count(value: int) -> str:
    return f"{value:,}"


def _plural(value: int, noun: str) -> str:
    return f"{_count(value)} {noun}" if value == 1 else f"{_count(value)} {noun}s"


def devices_table(hnodes: list[Reply]) -> Table:
    said = any(h["last_error"] for h in hnodes)
    table = _table(
        "hnid", "<name", "<driver", "used", "stored", "peak", "capacity", "pinned", "contexts", "faults", "in", "out",
        "evictions", "<policy", "errors", "<health", *(["<last error"] if said else []),
    )  # fmt: skip
    for h in hnodes:
        table.add_row(
            str(h["hnid"]), Text(h["name"]), Text(h["driver"]), format_size(h["used_bytes"]),
            format_size(h["stored_bytes"]) if h["stored_bytes"] else "",
            format_size(h["peak_bytes"]), format_size(h["capacity_bytes"]), format_size(h["pinned_bytes"]),
            _count(h["contexts"]), _count(h["faults"]), format_size(h["in_bytes"]), format_size(h["out_bytes"]),
            _count(h["evictions"]), h["policy"], _count(h["errors"]),
            "ok" if not h["health"] else f"errno {-h['health']}", *([Text(h["last_error"])] if said else []),
        )  # fmt: skip
    return table


def _of(quota: int) -> str:
    return f"/{format_size(quota)}" if quota else ""


def sessions_table(sessions: list[Reply], hnodes: list[Reply] | None = None) -> Table:
    names = {str(h["hnid"]): h["name"] for h in hnodes or []}
    table = _table(
        "session", "uid", "pid", "<name", "mapped", "regions", "contexts", "host faults", "device faults", "<resident"
    )
    for s in sessions:
        resident = "  ".join(
            f"{names.get(hnid, hnid)}:{format_size(size)}{_of(s['quota_bytes'].get(hnid, 0))}"
            for hnid, size in s["resident_bytes"].items()
            if size
        )
        table.add_row(
            str(s["session"]), str(s["uid"]), str(s["pid"]), Text(s["name"]), format_size(s["mapped_bytes"]),
            _count(s["regions"]), _count(s["contexts"]), _count(s["host_faults"]), _count(s["device_faults"]),
            Text(resident),
        )  # fmt: skip
    return table


def _resident(sizes: Reply, names: dict[str, str]) -> str:
    return "  ".join(f"{names.get(hnid, hnid)}:{format_size(size)}" for hnid, size in sizes.items() if size)


def pools_table(pools: list[Reply], hnodes: list[Reply] | None = None) -> Table:
    names = {str(h["hnid"]): h["name"] for h in hnodes or []}
    if pools and all("readers" not in p for p in pools):
        return _published_table(pools)
    table = _table("<name", "uid", "gid", "<mode", "size", "page", "<state", "writers", "readers", "<ends", "<resident")
    for p in pools:
        state = f"{p['remote']} v{p['version']}" if p["remote"] else "published" if p["sealed"] else "writable"
        ends = "unused" if p["remote"] else "persistent" if p["persistent"] else f"session {p['session']}"
        table.add_row(
            Text(p["name"]), str(p["uid"]), str(p["gid"]), f"{p['mode']:03o}", format_size(p["bytes"]),
            format_size(p["page_bytes"]), Text(state), _count(p["writers"]), _count(p["readers"]), ends,
            Text(_resident(p["resident_bytes"], names)),
        )  # fmt: skip
    return table


def _published_table(pools: list[Reply]) -> Table:
    table = _table("<name", "uid", "gid", "<mode", "size", "page", "<servers of", "version")
    for p in pools:
        table.add_row(
            Text(p["name"]), str(p["uid"]), str(p["gid"]), f"{p['mode']:03o}", format_size(p["bytes"]),
            format_size(p["page_bytes"]), Text(p["remote"]), str(p["version"]),
        )  # fmt: skip
    return table


def _amount(name: str, value: int) -> str:
    if name.endswith("_bytes"):
        return format_size(value)
    if name.endswith("_ns"):
        return f"{value / 1e9:.3f} s"
    return _count(value)


def stats_table(stats: Reply) -> Table:
    table = _table("<counter", "value")
    for name, value in stats.items():
        table.add_row(name.removesuffix("_ns").removesuffix("_bytes"), _amount(name, value))
    return table


def stuck_lines(stuck: list[Reply]) -> list[Text]:
    return [
        Text(f"stuck for {t['seconds']} s: thread {t['thread']}, {t['doing']}"
             f"{', waits for ' + t['waits_for'] if t['waits_for'] else ''}, session {t['session']}, "
             f"0x{t['va']:x}", "red")
        for t in stuck
    ]  # fmt: skip


def status_view(reply: Reply) -> Group:
    stats = reply["stats"]
    head = Text(
        f"gmemd {reply['version']}, pid {reply['pid']}: {_plural(stats['sessions'], 'session')}, "
        f"{_plural(stats['regions'], 'region')}, {_plural(stats['contexts'], 'context')}; "
        f"moved {format_size(stats['h2d_bytes'])} to devices, {format_size(stats['d2h_bytes'])} back, "
        f"{_plural(stats['evictions'], 'eviction')}"
    )
    parts: list[Any] = [head, "", devices_table(reply["hnodes"])]
    if reply["sessions"]:
        parts += ["", sessions_table(reply["sessions"], reply["hnodes"])]
    return Group(*parts)


def _map_table(reply: Reply, args: Namespace) -> None:
    table = _table("session", "<va", "bytes", "page", "<backing", "<fork")
    for r in reply["regions"]:
        table.add_row(
            str(r["session"]), f"0x{r['va']:012x}", format_size(r["bytes"]), format_size(r["page_bytes"]),
            "hugetlb" if r["huge"] else "shmem", r["fork"],
        )  # fmt: skip
    _print(table)
    hidden = reply["total"] - len(reply["regions"])
    if hidden > 0:
        _print(f"{hidden} more; see --limit")


def _drivers(reply: Reply, args: Namespace) -> None:
    table = _table("<driver", "<built in", "<origin")
    for d in reply["drivers"]:
        table.add_row(Text(d["name"]), "yes" if d["builtin"] else "no", Text(d["origin"]))
    _print(table)


def _print(what: Any) -> None:
    """As wide as the table when nobody looks: a line that wraps is of no use to a program that reads it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=400)
    console.print(what, soft_wrap=isinstance(what, str))


def recorded(made: Reply) -> None:
    lost = f"{_count(made['lost'])} lost: a larger --buffer keeps more" if made["lost"] else "none lost"
    _print(f"{made['file']}: {_count(made['records'])} records in {made['seconds']:.1f} s, "
           f"{format_size(made['bytes'])}; {lost}")  # fmt: skip
    if not made["complete"]:
        _print(f"not complete: {made['why']}")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def misses_table(results: list[Reply]) -> Table:
    table = _table(
        "capacity", "<policy", "misses", "miss ratio", "copied in", "copied out", "dropped", "of OPT", "of LRU"
    )
    last = None
    for r in results:
        size = format_size(r["capacity_bytes"])
        table.add_row(
            size if size != last else "", "OPT" if r["policy"] == "opt" else r["policy"], _count(r["misses"]),
            f"{r['miss_ratio']:.4f}", format_size(r["in_bytes"]), format_size(r["out_bytes"]),
            format_size(r["dropped_bytes"]), _times(r["of_opt"]), _times(r["of_lru"]),
        )  # fmt: skip
        last = size
    return table


def _hnode_head(hnode: Reply) -> Text:
    was = hnode["recorded"]
    peak = format_size(hnode["peak_bytes"])
    head = (f"{hnode['name']}: {_count(hnode['accesses'])} accesses to {_plural(hnode['pages'], 'page')}, "
            f"{peak} at most at a time; as it was: {_count(was['misses'])} misses")  # fmt: skip
    if was["policy"]:
        head += f" ({was['policy']}, {format_size(was['capacity_bytes'])})"
    return Text(head)


def replayed(made: Reply) -> None:
    parts: list[Any] = [
        Text(f"{made['file']}: {_count(made['records'])} records, {made['seconds']:.1f} s"
             f"{'' if made['complete'] else ', not complete'}"
             f"{', ' + _count(made['lost']) + ' accesses lost' if made['lost'] else ''}")
    ]  # fmt: skip
    parts += [
        Text(f"skipped {format_size(gap['bytes'])} at byte {gap['at']}: {gap['why']}", "red") for gap in made["skipped"]
    ]
    for hnode in made["hnodes"]:
        parts += ["", _hnode_head(hnode), "", misses_table(hnode["results"])]
    if not made["hnodes"]:
        parts.append("no accesses")
    _print(Group(*parts))


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.3g} MB/s"


def _storm_cells(storm: Reply) -> list[str]:
    drain = storm["drain_s"]
    return [f"{100 * storm['blocked_threads_ratio']:.1f} %", _count(round(storm["queued_requests"])),
            "never" if drain is None else f"{drain:.2f} s"]  # fmt: skip


def simulated(made: Reply) -> None:
    s, publish = made["scenario"], made["publish"]
    table = _table(
        "Zipf", "memory", "miss ratio", "± 95 %", "LRU, Che", "a machine", "its link", "a shard", "the busiest",
        "its link", "cold start", "blocked", "queued", "drained in",
    )  # fmt: skip
    for r in made["results"]:
        table.add_row(
            f"{r['exponent']:g}", format_size(r["memory_bytes"]), f"{r['miss_ratio']:.4f}",
            f"{r['miss_ratio_error']:.4f}" + ("" if r["sampling"]["settled"] else " ?"), f"{r['lru_by_che']:.4f}",
            _rate(r["machine_bytes_per_s"]), f"{100 * r['machine_load']:.0f} %", _rate(r["shard_bytes_per_s"]),
            _rate(r["busiest_shard_bytes_per_s"]), f"{100 * r['busiest_shard_load']:.0f} %",
            f"{r['cold_start_s']:.0f} s", *_storm_cells(r["storm"]),
        )  # fmt: skip
    head = (
        f"{_count(s['machines'])} machines read a pool of {format_size(s['pool_bytes'])} in pages of "
        f"{format_size(s['page_bytes'])}, {_count(round(s['touches_per_s']))} touches a second each; "
        f"policy {s['policy']}; {s['shards']} shards, {_count(publish['servers'])} servers with "
        f"{format_size(int(publish['stored_bytes_per_server']))} each; links of "
        f"{8 * s['link_bytes_per_s'] / 1e9:g} Gbit/s; fail-over of the busiest shard in {s['failover_s']:g} s"
    )
    sampled = max(r["sampling"]["one_in"] for r in made["results"])
    tail = f"One page stands for up to {_count(sampled)}." + (
        " ?: not settled" if not all(r["sampling"]["settled"] for r in made["results"]) else ""
    )
    _print(Group(Text(head), "", table, "", Text(tail)))


SHOW: dict[str, Callable[[Reply, Namespace], None]] = {
    "status": lambda reply, args: _print(status_view(reply)),
    "devices": lambda reply, args: _print(devices_table(reply["devices"])),
    "attach": lambda reply, args: _print(f"{args.name} is attached as hnode {reply['hnid']}"),
    "detach": lambda reply, args: _print(f"{args.name} is detached"),
    "limit": lambda reply, args: _print(f"{args.name}: at most {args.size}"),
    "quota": lambda reply, args: _print(f"{args.name}: {'no quota' if args.size == '0' else 'at most ' + args.size}"),
    "upgrade": lambda reply, args: _print(f"gmemd {reply['version']}, pid {reply['pid']}, has taken over"),
    "drivers": _drivers,
    "pools": lambda reply, args: _print(pools_table(reply["pools"], reply["hnodes"])) if "pools" in reply else None,
    "sessions": lambda reply, args: _print(sessions_table(reply["sessions"], reply["hnodes"])),
    "stats": lambda reply, args: _print(
        Group(stats_table(reply["stats"]), "", devices_table(reply["hnodes"]), *stuck_lines(reply["stuck"]))
    ),
    "map": _map_table,
}


@contextmanager
def screen(as_json: bool) -> Iterator[Callable[[Reply], None]]:
    """Where `top` draws: the terminal, refreshed in place; or a line of JSON, or a view, for each look."""
    if as_json:
        yield lambda reply: print(json.dumps(reply), flush=True)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        yield lambda reply: _print(status_view(reply))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda reply: live.update(status_view(reply), refresh=True)
