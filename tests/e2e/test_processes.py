"""Dies in several processes compute what they compute in one, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import Artifacts as Folders
from tests.e2e.processes import PROMPT, alive, command, gone, kill, running
from tyir.artifacts.schema import sha256_of
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.manifest import BuildOptions
from tyir.runtime_sim.processes.group import DieGroup, GroupFailed
from tyir.runtime_sim.processes.placement import Places
from tyir.runtime_sim.processes.rehearsal import Rehearsal
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.tools import tyir_run
from tyir.tools.api import compile_path

IDS = [5, 17, 99, 4, 23, 8, 1, 2, 3, 4, 77]
MODELS = Path(__file__).parents[1] / "models"


def test_a_group_computes_what_one_process_does_and_names_who_is_gone(
    artifacts: Folders, tmp_path: Path
) -> None:
    """All in one group, as processes take seconds to start."""
    folder = artifacts(3, "fp16")
    alone = Session(folder)
    wanted = list(alone.generate(IDS, 24))
    said: list[str] = []
    with DieGroup.start(Artifacts.open(folder), processes=2, say=said.append) as group:
        assert group.places == ((0, 1), (2,))
        assert group.cores is None or group.threads == tuple(map(len, group.cores)), (
            "no die has more than its cores"
        )
        assert said[0].startswith("rank 0 (dies 0, 1) binds 127.0.0.1:") and said[1].startswith(
            "rank 1 (die 2)"
        )
        session = Session(group.artifacts, group=group)
        assert list(session.generate(IDS, 24)) == wanted
        rehearsals = [Rehearsal(group.artifacts, dies, 1) for dies in group.places]
        for each in rehearsals:
            each.steps(4)
        kinds = [[event.kind for event in each.part.events] for each in rehearsals]
        met = group.links.met
        session.feed([1])
        alone.feed([1])
        assert kinds == [["meet"] * (group.links.met - met) + ["end"]] * 2, "what each does is known without"
        caches = alone.engine.caches()
        found = session.engine.caches()
        assert caches.keys() == found.keys() and all(np.array_equal(caches[n], found[n]) for n in caches)
        session.save(tmp_path / "saved")  # one process's caches are another's
        alone.reset()
        alone.restore(tmp_path / "saved")
        session.reset()
        session.restore(tmp_path / "saved")
        more = [3, 1]
        assert np.array_equal(alone.feed(more), session.feed(more))
        (pid,) = group.pids.values()
        maps = Path(f"/proc/{pid}/maps").read_text()
        mapped = {line.split("/")[-1] for line in maps.splitlines() if line.endswith(".params")}
        assert mapped and all("die2" in name for name in mapped), "a process maps the weights of its own dies"
        kill(pid)
        with pytest.raises(
            GroupFailed, match=rf"rank 1 \(die 2\) on this machine \(process {pid}\) has ended: SIGKILL"
        ):
            session.feed([1])
        with pytest.raises(GroupFailed, match="rank 1"):
            session.reset()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("stages", "processes", "places"), [(1, 3, ((0, 1), (2,), (3,))), (2, 2, ((0, 1), (2, 3)))]
)
def test_four_dies_meet_as_often_as_the_program_says(
    stages: int, processes: int, places: Places, artifacts: Folders, imported: Path, tmp_path: Path
) -> None:
    """The embedding, the logits, and two sums a layer where the dies of a layer are in several processes;
    a stage's sums stay within its process.
    """
    options = BuildOptions(dies=4, pp=stages, seqlens=(1,), max_kv=64)
    folder = artifacts(4, "fp16") if stages == 1 else compile_path(imported, tmp_path, options)
    layers = Artifacts.open(folder).manifest.model["num_hidden_layers"]
    with DieGroup.start(Artifacts.open(folder), processes=processes) as group:
        assert group.places == places
        session = Session(group.artifacts, group=group)
        session.feed(IDS[:1])
        met = group.links.met
        more = list(session.generate(IDS[1:2], 12))
        assert group.links.met - met == 12 * (2 + (2 * layers if stages == 1 else 0))
    alone = Session(folder)
    alone.feed(IDS[:1])
    assert list(alone.generate(IDS[1:2], 12)) == more


@pytest.mark.slow
def test_everything_that_is_missing_is_named_before_anything_starts(
    artifacts: Folders, tmp_path: Path
) -> None:
    folder = other_processor(artifacts(3, "fp16"), tmp_path / "other")
    with pytest.raises(TyirError) as caught:
        DieGroup.start(Artifacts.open(folder), processes=2)
    messages = [d.message for d in caught.value.diagnostics]
    assert [m.partition(":")[0] for m in messages] == [
        "rank 0 (dies 0, 1) on this machine",
        "rank 1 (die 2) on this machine",
    ]
    assert all("need avx99_imaginary, which this one does not have" in m for m in messages)


def other_processor(folder: Path, made: Path) -> Path:
    """The artifacts as if they were compiled for a processor that nobody has."""
    shutil.copytree(folder, made)
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    content["build"]["host"]["features"] = ["avx99_imaginary"]
    content["sha256"] = sha256_of(content)
    (made / "manifest.json").write_text(json.dumps(content))
    return made


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The text model for 512 positions."""
    out = tmp_path_factory.mktemp("long")

    def compiled(dies: int, pp: int = 1) -> Path:
        options = BuildOptions(dies=dies, seqlens=(1, 8), max_kv=512, pp=pp)
        return compile_path(MODELS / "tiny-qwen2", out / f"pp{pp}", options)

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "pp", "processes"),
    [
        *((2, 1, 2), (3, 1, 2), (3, 1, 3), (4, 1, 2), (4, 1, 3)),
        *((4, 2, 2), (4, 2, 3), (4, 4, 3)),
        *((5, 1, 2), (6, 1, 2), (7, 1, 2)),  # heads that do not divide
    ],
)
def test_two_hundred_tokens_are_those_of_one_process(
    dies: int, pp: int, processes: int, long: Callable[..., Path]
) -> None:
    folder = long(dies, pp)
    wanted = list(Session(folder).generate(IDS, 200))
    with DieGroup.start(Artifacts.open(folder), processes=processes) as group:
        session = Session(group.artifacts, group=group)
        assert list(session.generate(IDS, 200)) == wanted
        pids = list(group.pids.values())
    assert gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
def test_the_other_engines_too(engine: EngineName, artifacts: Folders) -> None:
    folder = artifacts(3, "int4")
    wanted = Session(folder, engine).feed(IDS)
    with DieGroup.start(Artifacts.open(folder), processes=2, engine=engine) as group:
        assert np.array_equal(Session(group.artifacts, group=group).feed(IDS), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "processes"), [(2, 2), (3, 2), (4, 2), (4, 3)])
def test_a_model_that_sees(dies: int, processes: int, tmp_path: Path) -> None:
    from tests.vision.scenes import draw

    picture = draw(3, (112, 112)).save(tmp_path / "scene.png")
    options = BuildOptions(dies=dies, seqlens=(1, 16), max_kv=512)
    folder = compile_path(MODELS / "tiny-qwen2.5-vl", tmp_path / "out", options, images=((112, 112),))
    words = [folder, "--image", picture, "--prompt", "Describe the picture.", "--max-tokens", 200, "--json"]
    answers = []
    for more in ([], ["--processes", processes]):
        with running(command("tyir_run", *words, *more)) as run:
            code, out, said = run.end(300)
            assert code == 0, said
            answers.append(json.loads(out)["prompts"][0]["tokens"])
    assert answers[0] == answers[1] and len(answers[0]) > 10


def _answers(folder: Path, answers: multiprocessing.Queue[list[int]]) -> None:
    with DieGroup.start(Artifacts.open(folder), processes=2) as group:
        answers.put(list(Session(group.artifacts, group=group).generate(IDS, 8)))


@pytest.mark.slow
def test_a_group_can_begin_in_a_forked_process(artifacts: Folders) -> None:
    """What is started is a fresh interpreter, whatever this one was made by."""
    import torch

    torch.zeros(4096).sum()  # a pool of threads, which a fork does not have
    folder = artifacts(3, "fp16")
    wanted = list(Session(folder).generate(IDS, 8))
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[list[int]] = context.Queue()
    child = context.Process(target=_answers, args=(folder, answers))
    child.start()
    assert answers.get() == wanted
    child.join()
    assert child.exitcode == 0


@pytest.mark.slow
def test_commands_say_the_same(artifacts: Folders) -> None:
    words = [artifacts(3, "fp16"), "--prompt", PROMPT, "--max-tokens", 12]
    outputs = []
    for more in ([], ["--processes", 2]):
        with running(command("tyir_run", *words, *more)) as run:
            code, out, said = run.end(120)
            assert code == 0, said
            outputs.append(out)
            pids = run.pids()
    assert outputs[0] == outputs[1] and gone(pids)


def test_what_cannot_be_shared_is_refused(artifacts: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(artifacts(3, "fp16"))
    assert tyir_run.main([folder, "--ids", "1", "--processes", "4"]) == 1
    assert "4 processes cannot share 3 dies" in capsys.readouterr().err
    assert tyir_run.main([folder, "--ids", "1", "--hosts", "127.0.0.1,127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "rank 0 (dies 0, 1) and rank 1 (die 2) cannot meet: 127.0.0.1:1 cannot be reached" in said
