# SPDX-License-Identifier: Apache-2.0
"""Pointer chase: each place is known only when the one before has been read. Nothing can be fetched ahead, nothing is
hot."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from workloads import arena
from workloads.byhand import ByHand
from workloads.workload import READ, WRITE, Access, Array, Arrays, Spec, Step, Tile, Workload, whole

NODE = 64  # bytes; the first eight are the number of the next node
PAGE_NODES = 4096 // NODE

_slots: dict[str, list[int]] = {}  # in the process that runs kernels: where each page is, -1 for nowhere


def _words(nodes: Array) -> Any:
    return memoryview(nodes.reshape(-1))  # type: ignore[arg-type]


def chase(nodes: Array, out: Array, start: int, hops: int) -> None:
    """Plain Python: tens of nanoseconds a hop beside microseconds of a fault."""
    following, at, total = _words(nodes), start, 0
    for _ in range(hops):
        at = following[at * (NODE // 8)]
        total += at
    out[:] = at, total


def chase_asking(device: Array, nodes: int, start: int, hops: int, address: str) -> tuple[int, int]:
    """The same where the device holds some pages: the kernel keeps their table, and asks the host for the others."""
    following, at, total = _words(device), start, 0
    slots = _slots.setdefault(address, [-1] * (nodes // PAGE_NODES))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(address)
        for _ in range(hops):
            page, inside = divmod(at, PAGE_NODES)
            if slots[page] < 0:
                link.send(page.to_bytes(4, "little"))
                answer = link.recv(8)
                gone = int.from_bytes(answer[4:], "little")
                slots[page] = int.from_bytes(answer[:4], "little")
                if gone != page:
                    slots[gone] = -1
            at = following[(slots[page] * PAGE_NODES + inside) * (NODE // 8)]
            total += at
    return at, total


class Chase(Workload):
    name, kind, foresight, hints = "chase", "random", 0, False
    result = "out"

    def __init__(self, quick: bool = False) -> None:
        self.nodes, self.hops = (1 << 16, 1500) if quick else (1 << 20, 6000)
        order = np.random.default_rng(0).permutation(self.nodes)
        self.following = np.empty(self.nodes, np.int64)
        self.following[order] = np.roll(order, -1)  # one cycle through all
        self.order = np.roll(order, -int(np.flatnonzero(order == 0)[0]))

    @property
    def specs(self) -> dict[str, Spec]:
        return {
            "nodes": Spec((self.nodes, NODE // 8), np.int64, 4096, constant=True),
            "out": Spec((2,), np.int64, 4096),
        }

    def fill(self, arrays: Arrays) -> None:
        arrays["nodes"][:, 0] = self.following

    def steps(self, round: int) -> list[Step]:
        specs = self.specs
        accesses = (Access(whole("nodes", specs["nodes"]), READ), Access(whole("out", specs["out"]), WRITE))
        return [Step(chase, accesses, (self.start(round), self.hops))]

    def used(self, step: Step) -> Array:
        first = int(np.flatnonzero(self.order == step.args[0])[0])
        return self.order[(first + np.arange(self.hops)) % self.nodes]

    def start(self, round: int) -> int:
        """Each round goes on where the one before has ended: what it needs has not been seen lately."""
        return int(self.order[round * self.hops % self.nodes])

    def check(self, arrays: Arrays, round: int) -> str | None:
        """From the permutation that the cycle was made of."""
        visited = self.order[(round * self.hops + np.arange(1, self.hops + 1)) % self.nodes]
        have, want = arrays["out"].tolist(), [int(visited[-1]), int(visited.sum())]
        return None if have == want else f"arrived at {have}, not at {want}"

    def by_hand(self, hand: ByHand) -> Callable[[int], None]:
        """A kernel that keeps running and asks over a socket; the host copies pages, the oldest makes room."""
        slots = hand.capacity // 4096
        device = hand.device.array(0, (slots * PAGE_NODES, NODE // 8), np.int64)
        window = hand.device.window(0, device.shape, np.int64)
        kept: OrderedDict[int, int] = OrderedDict()  # page: slot
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(f"\0gmem-chase-{id(hand)}-{hand.device.path}")
        listener.listen(1)

        def serve(link: socket.socket) -> None:
            while request := link.recv(4):
                page = gone = int.from_bytes(request, "little")
                slot = kept.get(page)
                if slot is None:
                    slot = len(kept)
                    if slot == slots:
                        gone, slot = kept.popitem(last=False)
                    kept[page] = slot
                    at, to = page * PAGE_NODES, slot * PAGE_NODES
                    hand.bring(Tile("nodes", at, at + PAGE_NODES), device[to : to + PAGE_NODES])
                link.send(slot.to_bytes(4, "little") + gone.to_bytes(4, "little"))

        def one_round(number: int) -> None:
            arguments = (self.nodes, self.start(number), self.hops, listener.getsockname())
            fence = hand.launcher.launch(asking, window, arguments)
            link, _ = listener.accept()
            with link:
                serve(link)
            hand.arrays["out"][:] = fence.wait()

        return one_round


def asking(window: arena.Window, arguments: tuple[int, int, int, str]) -> tuple[int, int]:
    return chase_asking(window.open(), *arguments)
