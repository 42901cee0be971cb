# SPDX-License-Identifier: Apache-2.0
"""Pools that several machines share, with a gmemd that dies at each point of publishing, opening, taking over and
dropping one: whoever asked gets what he asked for from a successor, and nothing is left over."""

import pytest
from embedding import Table
from machines import Machine
from valkeys import Server, until

KIB = 1 << 10


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "server").ready()
    yield made
    made.kill()


@pytest.fixture
def machine(server, tmp_path):
    made = []

    def start(name, **options):
        made.append(Machine(tmp_path / name, server.endpoint, lease=1.5, timeout=30, **options))
        return made[-1]

    yield start
    for each in made:
        each.close()


class Fate:
    """Where the next gmemd of a machine is to die."""

    def __init__(self, path, machine):
        self.path, self.machine = path, machine

    def begins(self, points):
        """The life that is there knows the first of them already, and the next one will know the second."""
        self.lives = self.machine.lives()
        self.path.write_text(points[1])

    def goes_on(self, points):
        """One life after the other, each at the next of them, until there is one that is to live."""
        for point in [*points[2:], "", ""]:
            until(lambda: self.machine.lives() > self.lives, f"the one before {point or 'the last'} dies", 60)
            self.lives = self.machine.lives()
            self.path.write_text(point)


@pytest.fixture
def doomed(machine, tmp_path):
    """A machine whose first gmemd dies at that point, and whose later ones do at the next of Fate.is_to_die()."""

    def start(point):
        path = tmp_path / "fate"
        path.write_text(point)
        return Fate(path, machine("doomed", crash_file=path))

    return start


def keys(server, name):
    return sorted(key.decode() for key in server.client().scan_iter() if b"{p.%s" % name.encode() in key)


def only_the_last(server, table):
    """Pages and manifest of one version, and no writer."""
    pages = table.bytes // (64 * KIB)

    def look():
        found = keys(server, table.name)
        values = [key for key in found if "}:" in key and f"p.{table.name}:" in key]
        return len(values) == pages + 1 and not any(key.endswith((":lease", ":old")) for key in found)

    until(look, "what was left behind is dropped", 60)


def test_publishing(doomed, machine, server):
    """It is asked for again, takes over the lease that its predecessor had, and what that had written is dropped; once
    the head has been moved, it is another version of the same."""
    points = [f"FAR_{name}:1" for name in ("LEASED", "INTENDED", "SENT", "WRITTEN", "LISTED", "MOVED")]
    fate = doomed(points[0])
    table = Table("table", 1024 * KIB)
    writer = fate.machine.program()
    fate.begins(points)
    table.begin_publishing(writer, 1)
    fate.goes_on(points)
    versions = writer.end(60)
    assert versions[0] > len(points), "each attempt had a number of its own"
    reader = machine("other").program()
    assert table.open(reader) == versions[0] and table.compare(reader)
    only_the_last(server, table)


def test_opening(doomed, machine, server):
    points = [f"FAR_{name}:1" for name in ("MARKED", "FILLED", "MADE", "IMPORTED", "NOTED")]
    table = Table("table", 1024 * KIB)
    table.publish(machine("other").program())
    fate = doomed(points[0])
    reader, second = fate.machine.program(), fate.machine.program()
    fate.begins(points)
    table.begin_opening(reader)
    fate.goes_on(points)
    assert reader.end(60) == 1 and table.compare(reader)
    assert table.open(second) == 1 and table.compare(second)
    pools = fate.machine.pools()
    assert [(pool["name"], pool["readers"], pool["fetched_bytes"]) for pool in pools] == [("table", 2, table.bytes)]
    hosts = [row for row in fate.machine.ask("stats")["hnodes"] if row["name"] == "host"]
    assert hosts[0]["used_bytes"] == table.bytes, "what its predecessors had made is gone"
    members = server.client().zrange("gmem:default:{p.table}:readers", 0, -1)
    assert len(members) == 1, "one machine reads it"


def test_taking_over(doomed, machine):
    """Killed while it takes over what is imported, and then while it drops it."""
    table = Table("table", 1024 * KIB)
    writer = machine("other").program()
    table.publish(writer)
    fate = doomed("")
    reader = fate.machine.program()
    table.open(reader)
    table.begin_gather(reader, 1, 20)
    assert reader.end() is True
    fate.path.write_text("FAR_RECOVERED:1")
    fate.machine.kill()
    pids = set()  # of those that do not come far enough to say anything
    until(lambda: pids.update(fate.machine.daemons()) or len(pids) > 2, "it dies while it takes over", 60)
    fate.path.write_text("FAR_FORGOTTEN:1")
    assert table.compare(reader), "from the first that has come through"
    lives = fate.machine.lives()
    table.publish(writer)
    reader.close()  # nobody reads the first version any more
    until(lambda: fate.machine.lives() > lives, "it dies while it drops it", 60)
    fate.path.write_text("")
    late = fate.machine.program()
    until(lambda: table.open(late) == 2, "it is there again", 60)
    assert table.compare(late)
    assert [pool["version"] for pool in fate.machine.pools()] == [2]


def test_the_program_that_publishes_is_killed(machine, server):
    """Nobody waits for the answer: it may be published or not, and nothing else is left."""
    table = Table("table", 8 << 20, page_size="4K")
    one = machine("one")
    writer = one.program()
    table.begin_publishing(writer, 1)
    until(lambda: len(keys(server, "table")) > 20, "it is at work", 60)
    writer.close()
    other = machine("other").program()
    until(lambda: not server.client().exists("gmem:default:{p.table}:lease"), "its lease is over", 60)
    version = table.publish(other)
    assert table.open(other) == version and table.compare(other)
