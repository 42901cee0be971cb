# SPDX-License-Identifier: Apache-2.0
"""What a program that ran on managed memory used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gmemd.control import Control
from gmemd.sizes import format_size


@dataclass
class Statistics:
    """What gmemd counted. Tiers are empty when the program has ended, so they are looked at while it runs."""

    limit_bytes: int
    wall_s: float = 0.0
    status: int = 0
    _last: dict[str, Any] = field(default_factory=dict)
    _fullest: dict[str, dict[str, int]] = field(default_factory=dict)

    def sample(self, control: Control) -> None:
        self._last = control.request("stats")
        for hnode in self._last["hnodes"]:
            before = self._fullest.get(hnode["name"], {"stored_page_bytes": 0})
            if hnode["stored_page_bytes"] > before["stored_page_bytes"]:
                self._fullest[hnode["name"]] = hnode

    def as_json(self) -> dict[str, Any]:
        counters, hnodes = self._last["stats"], self._last["hnodes"]
        tiers = []
        for hnode in hnodes[1:]:
            fullest = self._fullest.get(hnode["name"], {"stored_page_bytes": 0, "stored_bytes": 0})
            pages, stored = fullest["stored_page_bytes"], fullest["stored_bytes"]
            tiers.append({
                "name": hnode["name"], "driver": hnode["driver"], "in_bytes": hnode["in_bytes"],
                "out_bytes": hnode["out_bytes"], "peak_bytes": hnode["peak_bytes"], "sampled_page_bytes": pages,
                "sampled_stored_bytes": stored, "compression_ratio": round(pages / stored, 3) if stored else None,
            })  # fmt: skip
        host = hnodes[0]
        return {
            "status": self.status, "wall_s": round(self.wall_s, 3), "limit_bytes": self.limit_bytes,
            "host_peak_bytes": host["peak_bytes"], "host_capacity_bytes": host["capacity_bytes"],
            "faults": counters["host_faults"], "first_touches": counters["first_touches"],
            "to_tiers_bytes": host["out_bytes"], "from_tiers_bytes": host["in_bytes"],
            "evictions": counters["evictions"], "evicted_clean": counters["evicted_clean"],
            "lost_pages": counters["poisoned_pages"], "tiers": tiers,
        }  # fmt: skip

    def as_text(self) -> list[str]:
        made = self.as_json()
        limit = f" of {format_size(made['limit_bytes'])}" if made["limit_bytes"] else ""
        lines = [
            f"gmem: host memory {format_size(made['host_peak_bytes'])} at most{limit}, {made['faults']:,} faults, "
            f"{format_size(made['to_tiers_bytes'])} to tiers, {format_size(made['from_tiers_bytes'])} back"
        ]
        for tier in made["tiers"]:
            if tier["compression_ratio"]:
                lines.append(f"gmem: {tier['name']}: {format_size(tier['sampled_page_bytes'])} in "
                             f"{format_size(tier['sampled_stored_bytes'])} when it was fullest "
                             f"({tier['compression_ratio']:.1f}:1)")  # fmt: skip
        if made["lost_pages"]:
            lines.append(f"gmem: {made['lost_pages']:,} pages could be kept nowhere (SIGBUS): the tiers were full")
        return lines
