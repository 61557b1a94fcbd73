"""Dies in several processes: where they go, what passes between them, what is looked at before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.execution.lockstep import Layout, Meet, Meeting, Recv, Send
from tyir.process.memory import available_memory
from tyir.runtime_sim.processes.gloo import Gloo, GlooLinks, LinksBroken, listen_for_store
from tyir.runtime_sim.processes.hosts import KEY, RankServer, connect, parse_host
from tyir.runtime_sim.processes.placement import Cores, Places, place, share_cores
from tyir.runtime_sim.processes.rehearsal import Event, Part, played
from tyir.targets.cluster import Cluster, Link

HOST = "127.0.0.1"


@pytest.mark.parametrize(
    ("dies", "stages", "processes", "places"),
    [
        (4, 1, 1, [[0, 1, 2, 3]]),
        (4, 1, 2, [[0, 1], [2, 3]]),
        (7, 1, 2, [[0, 1, 2, 3], [4, 5, 6]]),
        (4, 1, 3, [[0, 1], [2], [3]]),
        (4, 2, 2, [[0, 1], [2, 3]]),
        (6, 3, 2, [[0, 1, 2, 3], [4, 5]]),  # a stage stays whole
        (4, 2, 3, [[0], [1], [2, 3]]),
        (6, 2, 4, [[0, 1], [2], [3, 4], [5]]),
    ],
)
def test_dies_go_to_processes_in_whole_stages(
    dies: int, stages: int, processes: int, places: list[list[int]]
) -> None:
    assert [list(p) for p in place(dies, stages, processes)] == places


def test_each_process_has_a_die() -> None:
    with pytest.raises(TyirError, match="3 processes cannot share 2 dies"):
        place(2, 1, 3)


@pytest.mark.parametrize(
    ("places", "stages", "cores", "wanted"),
    [
        (((0,), (1,)), 1, [4, 7], ((4,), (7,))),
        (((0, 1), (2,)), 1, [0, 1], ((0,), (1,))),
        (((0, 1), (2,), (3,)), 1, [0, 1], ((0,), (1,), (1,))),  # as many dies on each
        (((0, 1), (2, 3)), 2, [0, 1], ((0, 1), (0, 1))),  # stages take turns
        (((0, 1), (2, 3)), 1, list(range(8)), ((0, 1, 2, 3), (4, 5, 6, 7))),
        (((0, 1), (2,)), 1, [0, 1, 2, 3], ((0, 1), (2, 3))),
        (((0,), (1,)), 1, [3], ((3,), (3,))),
        (((0, 1), (2,), (3,), (4,)), 1, list(range(8)), ((0, 1, 2), (3,), (4, 5), (6, 7))),
    ],
)
def test_processes_of_a_machine_have_cores_of_their_own(
    places: Places, stages: int, cores: list[int], wanted: Cores
) -> None:
    assert share_cores(places, stages, cores) == wanted


# ------------------------------------------------------------------------------------- what passes between


class Processes:
    """The links of as many processes, all of them in this one: gloo does not care."""

    def __init__(self, places: tuple[tuple[int, ...], ...]) -> None:
        self.gloos = [Gloo(HOST) for _ in places]
        addresses = [g.address for g in self.gloos]
        store, listener = listen_for_store(HOST)

        def join(rank: int) -> None:
            self.gloos[rank].join(rank, addresses, store, None if rank else listener)

        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(join, range(len(places))))
        self.links = [GlooLinks(places, rank, g) for rank, g in enumerate(self.gloos)]

    def run(self, dies: dict[int, Any]) -> dict[int, Any]:
        """What each die's function of `ask` returns, or raises."""
        meetings = [Meeting(links) for links in self.links]
        found: dict[int, Any] = {}

        def one(die: int) -> None:
            meeting = next(m for m in meetings if die in m.links.dies)
            try:
                found[die] = dies[die](lambda request: meeting.ask(die, request))
            except TyirError as error:
                found[die] = error
            meeting.leave(found[die] if isinstance(found[die], TyirError) else None)

        threads = [threading.Thread(target=one, args=(die,), daemon=True) for die in dies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found


@pytest.fixture(scope="module")
def three() -> Iterator[Processes]:
    """Dies 0 and 1, 2, and 3, in a process each."""
    made = Processes(((0, 1), (2,), (3,)))
    yield made
    for gloo in made.gloos:
        gloo.abort()


def gather(value: Any, *dies: int, size: int = 1) -> Meet:
    def given(number: int) -> Layout:
        return Layout((size,), np.dtype(np.float16))

    def combine(parts: Any) -> Any:
        return np.concatenate([np.full(1, -1) if p is None else p for p in parts])

    return Meet(
        "gather", dies, None if value is None else np.full(size, value, np.float16), combine, given, "g"
    )


def test_every_die_gets_what_all_give_in_their_order(three: Processes) -> None:
    def die(number: int) -> Any:
        return lambda ask: [ask(gather(10 * turn + number)).tolist() for turn in range(20)]

    wanted = [[10 * turn + d for d in range(4)] for turn in range(20)]
    assert three.run({d: die(d) for d in range(4)}) == dict.fromkeys(range(4), wanted)


def test_messages_of_all_sizes_come_in_turn(three: Processes) -> None:
    """Those that are asked for ahead and those that are too large for it, of the same dies."""
    sizes = [1, 40_000, 3, 32_736, 32_737, 70_000, 1, 1, 50_000, 32_000]

    def die(number: int) -> Any:
        return lambda ask: [ask(gather(turn + number / 4, size=n)) for turn, n in enumerate(sizes)]

    found = three.run({d: die(d) for d in range(4)})
    for turn, size in enumerate(sizes):
        wanted = np.repeat(np.array([turn + d / 4 for d in range(4)], np.float16), size)
        assert all(np.array_equal(found[d][turn], wanted) for d in range(4))


def test_groups_meet_in_any_order_and_who_gives_nothing_takes_part(three: Processes) -> None:
    """Two collectives of dies of the same processes, each begun first by another."""

    def first(ask: Any) -> Any:
        return ask(gather(0, 0, 2)).tolist()

    def third(ask: Any) -> Any:
        return ask(gather(None, 0, 2)).tolist()

    both = three.run({0: first, 1: lambda ask: ask(gather(1, 1, 3)).tolist(), 2: third, 3: lambda ask: ask(gather(3, 1, 3)).tolist()})  # noqa: E501 # fmt: skip
    assert both == {0: [0, -1], 2: [0, -1], 1: [1, 3], 3: [1, 3]}


def test_a_send_does_not_wait_and_each_target_gets_it(three: Processes) -> None:
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    layout = Layout((2, 3), data.dtype)

    def source(ask: Any) -> Any:
        ask(Send((0, 1, 3), 5, data, "send"))
        return ask(gather(2)).tolist()

    def target(number: int) -> Any:
        def run(ask: Any) -> Any:
            met = ask(gather(number)).tolist()  # before it takes what was sent before
            return met, ask(Recv(2, 5, lambda: layout, "recv")).tolist()

        return run

    found = three.run({0: target(0), 1: target(1), 2: source, 3: target(3)})
    assert found[2] == [0, 1, 2, 3]
    assert [found[d] for d in (0, 1, 3)] == [([0, 1, 2, 3], data.tolist())] * 3


def test_a_die_that_fails_wakes_those_that_wait_in_other_processes() -> None:
    two = Processes(((0,), (1,)))

    def fails(ask: Any) -> Any:
        raise TyirError("broken")

    found = two.run({0: fails, 1: lambda ask: ask(gather(1))})
    assert str(found[0]) == "error: broken" and isinstance(found[1], LinksBroken)


# ---------------------------------------------------------------------------------------- what is looked at


def test_memory_is_the_least_that_machine_and_groups_allow(tmp_path: Path) -> None:
    system = tmp_path / "meminfo"
    system.write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    for name, value in (("memory.max", 300_000), ("memory.current", 250_000)):
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 40000\n")
    assert available_memory(system, []) == 500 * 1024
    assert available_memory(system, [tmp_path]) == 300_000 - 250_000 + 40_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(system, [tmp_path]) == 500 * 1024
    assert available_memory(tmp_path / "nothing", []) is None


def test_what_names_a_machine() -> None:
    assert parse_host("b") == ("b", 29400) and parse_host("10.0.0.2:5") == ("10.0.0.2", 5)
    assert parse_host("[::1]:5") == ("::1", 5) and parse_host("::1") == ("::1", 29400)
    with pytest.raises(TyirError, match="'b:x' does not name a machine"):
        parse_host("b:x")


def test_a_machine_that_does_not_answer_or_has_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "one")
    server = RankServer(HOST, 0, [tmp_path])
    waiting = threading.Thread(target=server.serve_one, daemon=True)
    waiting.start()
    monkeypatch.setenv(KEY, "other")
    with pytest.raises(TyirError, match="has another key"):
        connect(*server.address)
    with pytest.raises(TyirError, match=r"127\.0\.0\.1:1 cannot be reached: Connection refused"):
        connect(HOST, 1)
    monkeypatch.delenv(KEY)
    with pytest.raises(TyirError, match=r"whoever reaches 10\.0\.0\.1 could have programs run"):
        connect("10.0.0.1", 1)


# ------------------------------------------------------------------------- how long it takes, without a group

LINK = Cluster("by hand", Link(hop_us=100, bandwidth_gbps=1, exchange_us=50), {})


def part(*events: tuple[Any, ...]) -> Part:
    """Of one core, milliseconds in each event."""
    return Part(1.0, tuple(Event(kind, ms * 1e-3, *more) for kind, ms, *more in events))


def test_processes_that_meet_wait_for_the_last_and_its_message() -> None:
    """Both begin at 0.1 ms, when the second has been told; it comes at 2.1, the first hears of it at 2.2 and
    has 0.05 + 0.5 to do.
    """
    two = [part(("meet", 1), ("end", 0.5)), part(("meet", 2), ("end", 1))]
    assert played(two, LINK, None) == pytest.approx(2.75e-3)


def test_processes_of_one_machine_share_its_cores() -> None:
    """Both at half speed from 0.1 to 2.1 ms, the second alone until 3.1; the first has 0.5 to do from 3.25,
    the other 1 from 3.15.
    """
    two = [part(("meet", 1), ("end", 0.5)), part(("meet", 2), ("end", 1))]
    assert played(two, LINK, [[0], [0]]) == pytest.approx(4.25e-3)
    assert played(two, LINK, [[0, 1], [0, 1]]) == played(two, LINK, None)
    assert played(two, LINK, [[0], [1]]) == played(two, LINK, None)


def test_stages_work_one_after_the_other() -> None:
    """After 0.1 ms for telling, 1, 2 and 0.5; a kilobyte takes 0.101 each way, and half an exchange at both
    ends; sharing a core costs nothing.
    """
    there, back = (0, 1, 5), (1, 0, 6)
    first = part(("send", 1, 1000, there), ("recv", 0, 0, back), ("end", 0.5))
    second = part(("recv", 0, 0, there), ("send", 2, 1000, back), ("end", 0))
    assert played([first, second], LINK, [[0], [0]]) == pytest.approx(3.902e-3)
