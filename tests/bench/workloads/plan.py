# SPDX-License-Identifier: Apache-2.0
"""What a careful programmer would copy, and when: a schedule of moves for a sequence of steps that is known.

Before a step the pieces it needs are brought in, while the step before it still runs (double buffering). What is
replaced is what is needed again last (Belady, "A study of replacement algorithms for a virtual-storage computer", IBM
Systems Journal 5(2), 1966), as far as the workload's foresight reaches, and what was used longest ago beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workloads.workload import READ, WRITE, Access, Spec, Step, Tile

ALIGN = 4096
NEVER = 1 << 60


class Move(NamedTuple):
    inwards: bool
    tile: Tile
    offset: int  # in the memory that is too small


class View(NamedTuple):
    tile: Tile
    offset: int


class Moves(NamedTuple):
    """early: while the step before still runs; late: after its end. fresh: what takes room without being copied in,
    because all of it is written. gone: what makes room, whether it is copied home or not; True: after the end."""

    early: list[Move]
    late: list[Move]
    fresh: list[Tile]
    views: list[View]
    gone: list[tuple[bool, Tile]]


@dataclass
class Slot:
    tile: Tile
    offset: int
    nbytes: int
    used: int  # the last step that did
    dirty: list[Tile] = field(default_factory=list)


class Plan:
    """Goes through the steps once. Not every capacity will do: one step's pieces must fit."""

    def __init__(
        self, steps: Sequence[Step], specs: Mapping[str, Spec], capacity: int, foresight: int | None = None
    ) -> None:
        self._steps, self._specs, self._capacity = steps, specs, capacity
        self._foresight = foresight if foresight is not None else NEVER
        self._slots: list[Slot] = []  # by offset
        self._uses: dict[str, list[tuple[int, Tile]]] = {}
        for number, step in enumerate(steps):
            for access in step.accesses:
                self._uses.setdefault(access.tile.array, []).append((number, access.tile))
        self._passed = dict.fromkeys(self._uses, 0)
        self.moves = [self._moves(number) for number in range(len(steps))]

    def flush(self) -> list[Move]:
        """What is left to be copied home after the last step."""
        return [Move(False, *self._place(slot, part)) for slot in self._slots for part in slot.dirty]

    def _place(self, slot: Slot, tile: Tile) -> tuple[Tile, int]:
        return tile, slot.offset + (tile.first - slot.tile.first) * self._specs[tile.array].row_bytes

    def _moves(self, now: int) -> Moves:
        moves = Moves([], [], [], [], [])
        slots = self._bring_all(now, moves)
        if slots is None:  # there is room, but in pieces: once more, from the start of empty memory
            for slot in list(self._slots):
                self._evict(slot, moves, moves.late)
            slots = self._bring_all(now, moves, late=True)
        if slots is None:
            raise ValueError(f"step {now} needs more than {self._capacity} bytes at once")
        for access, slot in zip(self._steps[now].accesses, slots, strict=True):
            if access.mode != READ:
                _add(slot.dirty, access.part or access.tile)
            moves.views.append(View(*self._place(slot, access.tile)))
        return moves

    def _bring_all(self, now: int, moves: Moves, late: bool = False) -> list[Slot] | None:
        """A slot for each access. Once one of them has to wait for the end of the step before, all others do."""
        slots = []
        for access in self._steps[now].accesses:
            slot = self._slot(access.tile)
            if slot is None:
                late = late or not self._can_be_early(access, now)
                slot = self._bring(access, now, moves, late)
                if slot is None and not late:
                    late = True
                    slot = self._bring(access, now, moves, late)
                if slot is None:
                    return None
            slot.used = now
            slots.append(slot)
        return slots

    def _slot(self, tile: Tile) -> Slot | None:
        return next((slot for slot in self._slots if slot.tile.contains(tile)), None)

    def _can_be_early(self, access: Access, now: int) -> bool:
        """Not if the step before still works on a part of it."""
        return not any(slot.used >= now - 1 and slot.tile.overlaps(access.tile) for slot in self._slots)

    def _bring(self, access: Access, now: int, moves: Moves, late: bool) -> Slot | None:
        queue = moves.late if late else moves.early
        for other in [slot for slot in self._slots if slot.tile.overlaps(access.tile)]:
            self._evict(other, moves, queue)
        slot = self._room(access.tile, now, now if late else now - 1, moves, queue)
        if slot and access.mode == WRITE:
            moves.fresh.append(access.tile)
        elif slot:
            queue.append(Move(True, *self._place(slot, access.content or access.tile)))
        return slot

    def _room(self, tile: Tile, now: int, kept_from: int, moves: Moves, queue: list[Move]) -> Slot | None:
        nbytes = -(-(tile.last - tile.first) * self._specs[tile.array].row_bytes // ALIGN) * ALIGN
        while (offset := self._gap(nbytes)) is None:
            victims = [slot for slot in self._slots if slot.used < kept_from]
            if not victims:
                return None
            victim = max(victims, key=lambda slot: (self._next_use(slot, now), -slot.used))
            self._evict(victim, moves, queue)
        slot = Slot(tile, offset, nbytes, now)
        self._slots.append(slot)
        self._slots.sort(key=lambda slot: slot.offset)
        return slot

    def _gap(self, nbytes: int) -> int | None:
        at = 0
        for slot in self._slots:
            if slot.offset - at >= nbytes:
                return at
            at = slot.offset + slot.nbytes
        return at if self._capacity - at >= nbytes else None

    def _evict(self, slot: Slot, moves: Moves, queue: list[Move]) -> None:
        moves.gone.append((queue is moves.late, slot.tile))
        queue.extend(Move(False, *self._place(slot, part)) for part in slot.dirty)
        self._slots.remove(slot)

    def _next_use(self, slot: Slot, now: int) -> int:
        uses, passed = self._uses[slot.tile.array], self._passed[slot.tile.array]
        while passed < len(uses) and uses[passed][0] < now:
            passed += 1
        self._passed[slot.tile.array] = passed
        for number, tile in uses[passed:]:
            if number > now + self._foresight:
                break
            if tile.overlaps(slot.tile):
                return number
        return NEVER


def _add(parts: list[Tile], part: Tile) -> None:
    """Keeps them apart, so that nothing is copied twice."""
    for other in [other for other in parts if other.overlaps(part) or part.first == other.last]:
        parts.remove(other)
        part = Tile(part.array, min(part.first, other.first), max(part.last, other.last))
    parts.append(part)
