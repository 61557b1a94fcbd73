"""Processes of a group that are killed, stopped or cut off: who is gone is named, and nothing is left."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Artifacts as Folders
from tests.e2e.processes import (
    PROMPT,
    Machine,
    Running,
    command,
    gone,
    kill,
    listening,
    machines,
    running,
)
from tyir.execution.artifacts import Artifacts
from tyir.manifest import BuildOptions
from tyir.runtime_sim.processes.group import DieGroup, GroupFailed
from tyir.runtime_sim.processes.hosts import KEY
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"
LIMIT = 10.0  # seconds in which who is gone must have been named
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=512)
    return compile_path(MODEL, tmp_path_factory.mktemp("three"), options)


def prefill(session: Session) -> None:
    while True:
        session.reset()
        session.feed([1] * 480)


def decode(session: Session) -> None:
    while True:
        session.reset()
        for _ in session.generate([1, 2, 3], 400):
            pass


@pytest.mark.parametrize("work", [prefill, decode, None], ids=["prefill", "decode", "at rest"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_gone_is_named(
    work: Callable[[Session], None] | None, how: signal.Signals, folder: Path
) -> None:
    before = set(listening([os.getpid()]))
    with DieGroup.start(Artifacts.open(folder), processes=3) as group:
        session, pids = Session(group.artifacts, group=group), dict(group.pids)
        session.feed([1, 2])
        heard: list[float] = []
        group.on_failure = lambda problem: heard.append(time.monotonic())
        strikes: list[float] = []

        def strike() -> None:
            strikes.append(time.monotonic())
            os.kill(pids[2], how)

        threading.Timer(1.0, strike).start()
        if work is None:
            until = time.monotonic() + LIMIT + 1
            while group.problem is None and time.monotonic() < until:
                time.sleep(0.05)
        else:
            with pytest.raises(GroupFailed):
                work(session)
        assert group.problem is not None
        (problem,) = group.problem.diagnostics
        assert problem.message.startswith("rank 2 (die 2) on this machine")
        assert ("SIGKILL" if how is signal.SIGKILL else "has said nothing for 8 s") in problem.message
        while not heard:  # it is told a moment after it is known
            time.sleep(0.01)
        assert heard[0] - strikes[0] <= LIMIT
        assert gone([pids[1]]), "the others end by themselves"
    assert gone(list(pids.values())) and not set(listening([os.getpid(), *pids.values()])) - before


@pytest.mark.parametrize("chat", [False, True], ids=["generating", "waiting for a line"])
def test_a_command_ends_with_the_name_of_who_is_gone(chat: bool, folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    words = (
        command("tyir_chat", folder, "--chat-template", template, "--processes", 3)
        if chat
        else command("tyir_run", folder, "--ids", "1,2,3", "--max-tokens", 500, "--processes", 3)
    )
    with running(words) as run:
        run.until("rank 2")
        first, second = run.pids()
        time.sleep(3)
        kill(second)
        run.process.wait(LIMIT)  # its input stays open
        code, _, said = run.end()
    assert (
        code == 1 and f"error: rank 2 (die 2) on this machine (process {second}) has ended: SIGKILL" in said
    )
    assert gone([first, second])


def test_who_was_told_ends_when_the_first_process_is_killed(folder: Path) -> None:
    with running(command("tyir_run", folder, "--ids", "1,2,3", "--max-tokens", 500, "--processes", 3)) as run:
        run.until("rank 2")
        pids = run.pids()
        time.sleep(2)
        kill(run.process.pid)
        assert len(pids) == 2 and gone(pids) and not listening(pids)


def test_ctrl_c_ends_all(folder: Path) -> None:
    with running(command("tyir_run", folder, "--ids", "1,2,3", "--max-tokens", 500, "--processes", 2)) as run:
        run.until("rank 1")
        time.sleep(2)
        run.process.send_signal(signal.SIGINT)
        code, _, said = run.end(LIMIT)
        assert code == 130 and "interrupted" in said and gone(run.pids())


# -------------------------------------------------------------------------------------------- two machines


@pytest.fixture
def two() -> Iterator[tuple[Machine, Machine]]:
    with machines() as both:
        yield both


def rank_at(machine: Machine, folder: Path, *more: object) -> list[str]:
    return command("tyir_rank", folder, "--host", machine.address, *more, inside=machine.inside)


def run_at(machine: Machine, folder: Path, hosts: str, *more: object) -> list[str]:
    words = (folder, "--ids", "1,2,3", "--hosts", hosts, "--max-tokens", 200, *more)
    return command("tyir_run", *words, inside=machine.inside)


def test_two_machines_compute_what_one_does(two: tuple[Machine, Machine], folder: Path) -> None:
    here, there = two
    wanted = ",".join(map(str, Session(folder).generate([1, 2, 3], 200)))
    with running(rank_at(there, folder.parent), **{KEY: "s"}) as rank:
        assert rank.process.stdout is not None
        assert rank.process.stdout.readline() == f"waiting at {there.address}:29400\n"
        with running(run_at(here, folder, f"{here.address},{there.address}"), **{KEY: "s"}) as run:
            code, out, said = run.end(120)
        assert (code, out.strip()) == (0, wanted), said
        assert "rank 1 (die 2), process" in said and f"on {there.address}, binds {there.address}:" in said
        assert rank.end(LIMIT)[0] == 0


def test_nobody_waits_on_the_other_machine(two: tuple[Machine, Machine], folder: Path) -> None:
    here, there = two
    for unplugged, why in ((False, "Connection refused"), (True, "")):
        if unplugged:
            there.unplug()
        with running(run_at(here, folder, f"{here.address},{there.address}"), **{KEY: "s"}) as run:
            code, _, said = run.end(60)
        assert code == 1
        meet = f"rank 0 (dies 0, 1) and rank 1 (die 2) cannot meet: {there.address}:29400 cannot be reached"
        assert meet in said and why in said


def test_an_address_that_the_other_machine_cannot_reach(two: tuple[Machine, Machine], folder: Path) -> None:
    here, there = two
    with running(rank_at(there, folder), **{KEY: "s"}) as rank:
        assert rank.process.stdout is not None and rank.process.stdout.readline()
        with running(run_at(here, folder, f"127.0.0.1,{there.address}"), **{KEY: "s"}) as run:
            code, _, said = run.end(60)
        assert code == 1 and "rank 1 (die 2) cannot reach rank 0 (dies 0, 1) at 127.0.0.1:" in said
        assert rank.end(LIMIT)[0] == 0


def test_other_artifacts_and_another_processor(
    two: tuple[Machine, Machine], folder: Path, artifacts: Folders, tmp_path: Path
) -> None:
    here, there = two
    other = artifacts(3, "fp16")
    cpuinfo = tmp_path / "cpuinfo"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpuinfo.write_text("\n".join(line.replace(" avx2", "") for line in lines))
    mount = f"mount --bind {cpuinfo} /proc/cpuinfo && exec "
    old = ["unshare", "-m", "sh", "-c", mount + '"$@"', "sh"]
    words = rank_at(there, folder)
    for rank_words, says in (
        (rank_at(there, other), rf"rank 1 (die 2) on {there.address}: no artifacts with manifest"),
        ([*there.inside, *old, *words[len(there.inside) :]], "which this one does not have"),
    ):
        with running(rank_words, **{KEY: "s"}) as rank:
            assert rank.process.stdout is not None and rank.process.stdout.readline()
            with running(run_at(here, folder, f"{here.address},{there.address}"), **{KEY: "s"}) as run:
                code, _, said = run.end(60)
            assert code == 1 and says in said and "rank 0" not in said
            assert rank.end(LIMIT)[0] == 0


def test_a_cable_that_is_pulled(two: tuple[Machine, Machine], folder: Path) -> None:
    here, there = two
    with running(rank_at(there, folder), **{KEY: "s"}) as rank:
        assert rank.process.stdout is not None and rank.process.stdout.readline()
        hosts = f"{here.address},{there.address}"
        with running(run_at(here, folder, hosts, "--max-tokens", 500), **{KEY: "s"}) as run:
            run.until("rank 1")
            time.sleep(2)
            there.unplug()
            code, _, said = run.end(LIMIT + 5)
        assert code == 1 and f"rank 1 (die 2) on {there.address} has said nothing for 8 s" in said
        code, _, said = rank.end(LIMIT)
        assert code == 1 and "rank 1 (die 2): the first process has said nothing for 8 s; ends" in said


# ------------------------------------------------------------------------------------------------- serving


KILLS = 20


def test_no_wrong_token_reaches_a_client_while_processes_are_killed(tmp_path: Path) -> None:
    """Twenty servers one after the other, each of which loses one of its processes at some time under load:
    who is gone is named, the server is unavailable and ends, and the next one answers as if nothing had been.
    """
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=256, batch=4)
    folder = compile_path(MODEL, tmp_path, options)
    from tyir.tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Artifacts.open(folder))
    prompts = [PROMPT[: 20 + 7 * n] for n in range(4)]
    wanted = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        wanted.append(tokenizer.decode([*ids, *Session(folder).generate(ids, 100)])[len(prompt) :])
    chance = random.Random(5)
    cut, refused, seconds = 0, 0, list[float]()
    for _ in range(KILLS):
        words = command("tyir_serve", folder, "--port", 0, "--processes", 3, "--json")
        with running(words) as server:
            server.until("may wait")
            port, pids = _port_of(server), server.pids()
            with ThreadPoolExecutor(len(prompts) + 1) as pool:
                answers = [pool.submit(_streamed, port, prompt) for prompt in prompts]
                assert _when_ready(port), "a new server answers after the last one was lost"
                health = pool.submit(_health, port)
                time.sleep(chance.uniform(0, 4))
                number = chance.randrange(2)
                struck = time.monotonic()
                kill(pids[number])
                code, _, said = server.end(LIMIT)
                seconds.append(time.monotonic() - struck)
                got = [answer.result(LIMIT) for answer in answers]
                seen = health.result(LIMIT)
        rank, pid = number + 1, pids[number]
        named = f"rank {rank} (die {rank}) on this machine (process {pid}) has ended: SIGKILL"
        assert code == 1 and named in said
        assert gone(pids, 0) and not listening([server.process.pid, *pids]) and not _answers_at(port)
        assert set(seen) <= {200, 503} and sorted(seen) == seen, "a server that has lost a process stays so"
        refused += 503 in seen
        for text, whole in zip(got, wanted):
            assert whole.startswith(text)
            cut += len(text) < len(whole)
    print(f"\n{cut} of {KILLS * len(prompts)} answers cut off, /health 503 seen {refused} times")
    usual = sorted(seconds)[len(seconds) // 2]
    print(f"named, and all ended, after {max(seconds):.1f} s at most, {usual:.1f} s as a rule")
    assert cut > KILLS, "most of the kills met answers on their way"
    assert refused, "/health was asked in time"


def _port_of(server: Running) -> int:
    """What a server says on standard output."""
    assert server.process.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        text += server.process.stdout.readline()
    return int(json.loads(text)["url"].rpartition(":")[2])


def _streamed(port: int, prompt: str) -> str:
    """What a client gets of a long answer before it is cut off."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": prompt, "max_tokens": 100, "temperature": 0, "stream": True}
    got = ""
    with closing(connection), suppress(OSError, http.client.HTTPException):  # what came before a cut counts
        _when_ready(port)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            for line in response:
                if line.startswith(b"data: {") and b'"choices"' in line:
                    choices = json.loads(line[6:])["choices"]
                    got += choices[0]["text"] if choices else ""
    return got


def _health(port: int) -> list[int]:
    """What /health answers until nobody does."""
    found = []
    while (status := _status(port)) is not None:
        found.append(status)
        time.sleep(0.01)
    return found


def _status(port: int) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _answers_at(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def _when_ready(port: int) -> bool:
    for _ in range(600):
        if (status := _status(port)) == 200:
            return True
        if status is None:
            return False
        time.sleep(0.05)
    return False
