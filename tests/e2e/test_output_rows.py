"""Programs that return a step's last row alone generate what those do that return all rows: on every engine,
for prompts around the borders of lengths, batches, dies, pipeline stages and pictures; who needs all rows
gets them row by row, or is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.serving import serving
from tests.vision.folders import MODELS
from tests.vision.scenes import SIZES, draw
from tyir.artifacts.schema import sha256_of
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.execution.artifacts import Artifacts as Opened
from tyir.ir import Op
from tyir.layers import path_in_calls
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.execution.command_trace import Access
from tyir.runtime_sim.processes.group import DieGroup
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.edge10_engine import Edge10Engine
from tyir.runtime_sim.session.host_engine import HostEngine
from tyir.runtime_sim.session.program_engine import ProgramEngine
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.engine import simulate_chunks
from tyir.runtime_sim.timing.predictor import Predictor
from tyir.runtime_sim.timing.program import load_programs
from tyir.runtime_sim.timing.unroll import Command
from tyir.runtime_sim.vision.session import VisionSession
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.tools.quantize.perplexity import artifact_perplexity
from tyir.tools.run.turns import Turns
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.tyir_verify import main as verify
from tyir.tools.verify.locate import locate

TOKENS = [(37 * i * i + 11 * i + 5) % 4096 for i in range(60)]
AROUND = (1, 2, 7, 8, 9, 15, 16, 17, 25)
BOARDS = {  # of dies: stages, and what a step returns
    1: (1, "logits"),
    2: (1, "topk=4"),
    3: (3, "argmax"),
    4: (2, "logits"),
}
Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A folder for each combination of options."""
    done: dict[BuildOptions, Path] = {}

    def make(rows: str, **options: object) -> Path:
        fixed: dict[str, object] = {"seqlens": (1, 8), "max_kv": 64, "output_rows": rows, **options}
        chosen = BuildOptions(**fixed)  # type: ignore[arg-type]
        if chosen not in done:
            done[chosen] = compile_path(imported, tmp_path_factory.mktemp(rows), chosen)
        return done[chosen]

    return make


def both(compiled: Compile, engine: EngineName, **options: object) -> tuple[Session, Session]:
    every, last = (Session(compiled(rows, **options), engine) for rows in ("all", "last"))
    assert not every.manifest.one_row and last.manifest.one_row
    return every, last


@pytest.mark.parametrize("dies", BOARDS)
def test_the_same_tokens_and_rows(compiled: Compile, dies: int) -> None:
    """On the host to the last bit: a row's sums do not depend on how many rows there are."""
    stages, output = BOARDS[dies]
    every, last = both(compiled, "host", dies=dies, pp=stages, output=output)
    for count in AROUND:
        prompt = TOKENS[:count]
        every.reset(), last.reset()
        assert list(last.generate(prompt, 6)) == list(every.generate(prompt, 6))
        assert last.tokens == every.tokens
        if output == "logits":
            every.reset(), last.reset()
            np.testing.assert_array_equal(last.prefill(prompt), every.prefill(prompt))
        for name, cache in every.engine.caches().items():
            held = slice(0, len(every.tokens))
            np.testing.assert_array_equal(last.engine.caches()[name][:, :, held], cache[:, :, held])


@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
@pytest.mark.parametrize("dies", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_other_engines(compiled: Compile, dies: int, engine: EngineName) -> None:
    """numpy sums one row in another order than several, by the last bits."""
    every, last = both(compiled, engine, dies=dies, pp=BOARDS[dies][0])
    for count in (2, 8, 11):
        every.reset(), last.reset()
        np.testing.assert_allclose(last.prefill(TOKENS[:count]), every.prefill(TOKENS[:count]), atol=1e-3)
        assert list(last.generate(TOKENS[:count], 3)) == list(every.generate(TOKENS[:count], 3))


def test_all_rows_one_by_one(compiled: Compile) -> None:
    """`feed` and `next_tokens` give a row for each token; caches and tokens are those of one run."""
    every, last = both(compiled, "host", dies=1)
    for part in (TOKENS[:11], TOKENS[11:12], TOKENS[12:20]):
        np.testing.assert_array_equal(last.feed(part), every.feed(part))
        assert last.tokens == every.tokens
    every, last = both(compiled, "host", dies=2, output="topk=4")
    mine, theirs = (session.next_tokens(TOKENS[:13]) for session in (last, every))
    np.testing.assert_array_equal(mine.ids, theirs.ids)
    np.testing.assert_array_equal(mine.values, theirs.values)


@pytest.mark.parametrize(
    "engine", ["host", *(pytest.param(e, marks=pytest.mark.slow) for e in ENGINES if e != "host")]
)
def test_batches(compiled: Compile, engine: EngineName) -> None:
    """Each sequence has its own last row, one that waits none."""
    every, last = (
        BatchSession(compiled(rows, dies=2, batch=3, weights="int4"), engine) for rows in ("all", "last")
    )
    prompts = [TOKENS[:11], TOKENS[20:23], TOKENS[30:46]]
    assert last.generate(prompts, 4) == every.generate(prompts, 4)
    for session in (every, last):
        session.reset()
    atol = 0 if engine == "host" else 1e-3
    feeds: list[Sequence[int]] = [TOKENS[:5], [], TOKENS[40:50]]
    for mine, theirs in zip(last.feed(feeds), every.feed(feeds), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=atol)
    assert last.tokens == every.tokens
    (first, none, other) = last.step([TOKENS[5:9], [], [7]], 8)
    assert [own["logits"].shape[0] for own in (first, none, other)] == [1, 0, 1]


def test_one_sequence_of_a_batch(compiled: Compile) -> None:
    folders = [compiled(rows, dies=2, batch=3, weights="int4") for rows in ("all", "last")]
    for sequence in (0, 2):
        every, last = (Session(folder, sequence=sequence) for folder in folders)
        np.testing.assert_array_equal(last.feed(TOKENS[:9]), every.feed(TOKENS[:9]))
        np.testing.assert_array_equal(last.prefill(TOKENS[:19]), every.prefill(TOKENS[:19]))


def test_with_other_inputs_and_caches(compiled: Compile) -> None:
    """Embeddings in the place of tokens, caches of 8 bits with the heads of a token together."""
    options = {"dies": 3, "embedding_as_input": True, "kv_dtype": "int8", "kv_layout": "NHD"}
    every, last = both(compiled, "host", **options)
    for count in (7, 8, 18):
        every.reset(), last.reset()
        np.testing.assert_array_equal(last.prefill(TOKENS[:count]), every.prefill(TOKENS[:count]))
        assert list(last.generate(TOKENS[:count], 4)) == list(every.generate(TOKENS[:count], 4))


def test_only_long_steps(compiled: Compile) -> None:
    """Without a length of one token every step selects, and is fed padding behind its row."""
    every, last = both(compiled, "host", dies=1, seqlens=(8,))
    assert list(last.generate(TOKENS[:11], 5)) == list(every.generate(TOKENS[:11], 5))


def test_a_cache_goes_from_one_to_the_other(compiled: Compile, tmp_path: Path) -> None:
    """What layers compute is the same, and so are their caches."""
    every, last = both(compiled, "host", dies=1)
    every.prefill(TOKENS[:11])
    every.save(tmp_path / "cache")
    last.restore(tmp_path / "cache")
    assert list(last.generate(TOKENS[:14], 4)) == list(every.generate(TOKENS[:14], 4))


def test_what_a_step_takes_and_returns(compiled: Compile) -> None:
    manifest = Manifest.load(compiled("last", dies=4, pp=2))
    for program in manifest.programs:
        taken = {t.name: (t.shape, t.dtype) for t in program.inputs}
        assert taken.get("row") == (((1,), "i32") if program.seqlen == 8 else None)
        (made,) = [t for t in program.outputs if t.alias is None]
        assert made.shape == (1, 1, 4096)
    other = Manifest.load(compiled("all", dies=4, pp=2))
    for mine, theirs in zip(manifest.programs, other.programs, strict=True):
        if mine.seqlen == 1:
            assert mine == theirs


def test_no_command_reads_what_is_not_there(compiled: Compile) -> None:
    for options in ({"dies": 4, "pp": 2}, {"dies": 2, "batch": 3, "weights": "int4"}):
        folder = compiled("last", **options)
        for seqlen in (1, 8):
            programs = load_programs(Opened.open(folder), seqlen)
            check_programs(programs, load_machine("edge10"), (0, 50))


def test_a_manifest_that_says_otherwise(compiled: Compile, tmp_path: Path) -> None:
    """The options, the inputs and the outputs must agree."""
    text = (compiled("last", dies=1) / "manifest.json").read_text()
    content = json.loads(text)
    del content["sha256"]
    content["options"]["output_rows"] = "all"
    whole = json.dumps({**content, "sha256": sha256_of(content)}).encode()
    with pytest.raises(TyirError) as caught:
        Manifest.parse(whole, tmp_path / "manifest.json")
    said = str(caught.value)
    assert "takes row, which no step gives" in said and "logits: 1x8x4096xf32" in said
    before = json.loads((compiled("all", dies=1) / "manifest.json").read_text())
    del before["sha256"], before["options"]["output_rows"]  # as manifests were written before
    whole = json.dumps({**before, "sha256": sha256_of(before)}).encode()
    assert Manifest.parse(whole, tmp_path / "manifest.json").options.output_rows == "all"


@pytest.mark.parametrize("dies", [1, 4])
def test_verified_against_hugging_face(
    compiled: Compile, model: Path, dies: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every position, by the programs that generation runs: the same figures as with all rows."""
    found = []
    for rows in ("all", "last"):
        folder = str(compiled(rows, dies=dies, pp=BOARDS[dies][0]))
        asked = [folder, "--against", str(model), "--prompts", "2", "--tokens", "6", "--json"]
        assert verify(asked) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and len(found[0]["prompts"]) == 2


def test_no_divergence_is_found_behind_the_selection(compiled: Compile, model: Path) -> None:
    assert locate(compiled("last", dies=2, output="topk=4"), model, TOKENS[:11]) is None
    assert locate(compiled("last", dies=1), model, TOKENS[:11]) is None


def test_who_needs_all_rows_is_refused(compiled: Compile) -> None:
    import torch

    folder = compiled("last", dies=1)
    with pytest.raises(TyirError, match="perplexity needs logits of all tokens") as caught:
        artifact_perplexity(folder, torch.tensor([TOKENS[:16]]))
    assert "compile with --output-rows all" in str(caught.value)
    with serving(folder) as served:
        asked = {"prompt": TOKENS[:9], "max_tokens": 2, "temperature": 0, "logprobs": 1}
        status, said = served.ask("POST", "/v1/completions", {**asked, "echo": True})
        assert status == 400 and "--output-rows all" in json.dumps(said)
        status, said = served.ask("POST", "/v1/completions", asked)
        assert status == 200 and len(said["choices"][0]["logprobs"]["tokens"]) == 2
    with serving(compiled("all", dies=1)) as served:
        assert served.ask("POST", "/v1/completions", asked)[1]["choices"] == said["choices"]


def test_steps_of_one_token_alone_return_all_rows(compiled: Compile) -> None:
    """There `last` is all that there is, and nobody is refused."""
    session = Session(compiled("last", dies=1, seqlens=(1,)))
    assert not session.manifest.one_row
    session.manifest.need_every_row("a perplexity")
    np.testing.assert_array_equal(session.feed(TOKENS[:5]), Session(compiled("all", dies=1)).feed(TOKENS[:5]))


def test_dies_in_several_processes(compiled: Compile) -> None:
    folder = compiled("last", dies=4, pp=2)
    wanted = list(Session(folder).generate(TOKENS[:11], 4))
    with DieGroup.start(Opened.open(folder), processes=2, say=lambda text: None) as group:
        assert list(Session(group.artifacts, group=group).generate(TOKENS[:11], 4)) == wanted


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    """Embeddings, rotary tables of three axes and a row: the answer of all rows."""
    answers = []
    picture = draw(1000, SIZES[0]).save(tmp_path / "scene.png")
    for rows in ("all", "last"):
        options = BuildOptions(dies=2, seqlens=(1, 16), max_kv=256, output_rows=rows)
        folder = compile_path(MODELS / "tiny-qwen2.5-vl", tmp_path / rows, options, images=SIZES[:1])
        session = VisionSession(folder)
        turns = Turns(session, load_tokenizer(session.artifacts))
        prompt = turns.ask("Describe the picture.", (picture,))
        answers.append(list(session.generate(prompt.given, 24)))
    assert answers[0] == answers[1] and len(answers[0]) == 24


def seen_command(ran: list[str], die: int, command: Command, accesses: Sequence[Access]) -> None:
    ran.append(command.path)


def seen_op(
    ran: list[str], chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[object, ...]
) -> None:
    ran.append(path_in_calls(op, stack) or "")


@pytest.mark.parametrize("dies", [1, 4])
def test_steps_of_which_no_row_is_wanted_leave_the_head_out(compiled: Compile, dies: int) -> None:
    """All chunks of a prompt but the last: they cache the same, and nothing behind the layers runs."""
    folder = compiled("last", dies=dies, pp=BOARDS[dies][0])
    inputs = {"ids": np.array([TOKENS[:8]], np.int32), "pos": np.zeros(1, np.int32)}
    chunk = Chunk(0, 8, 8)
    for engine in ENGINES:
        ran: list[str] = []
        session = Session(folder, engine)
        running = session.engine
        if isinstance(running, Edge10Engine):
            running.observer = partial(seen_command, ran)
        elif isinstance(running, ProgramEngine) and engine == "interpreter":
            running.probe = partial(seen_op, ran)
        caches = []
        for row in (7, -1):
            running.reset()
            ran.clear()
            running.step({**inputs, "row": np.array([row], np.int32)}, chunk)
            caches.append(running.caches())
            assert any(path.startswith("lm_head") for path in ran) == (row >= 0 and engine != "host")
            assert engine == "host" or any("layers.0" in path for path in ran)
        for name, cache in caches[0].items():
            np.testing.assert_array_equal(caches[1][name], cache)


def test_the_compiled_step_leaves_its_outputs_alone(compiled: Compile) -> None:
    session = Session(compiled("last", dies=1))
    session.prefill(TOKENS[:8])
    engine = session.engine
    assert isinstance(engine, HostEngine)
    _, steps = engine._loaded(8)
    caches = list(engine.caches().values())
    logits = np.full((1, 1, 4096), 7, np.float32)
    for row, same in ((-1, True), (7, False)):
        given = [np.array([TOKENS[:8]], np.int32), np.zeros(1, np.int32), *caches, np.array([row], np.int32)]
        steps.begin([[*given, logits]])()
        assert (logits == 7).all() == same


def test_simulated_stages_work_on_several_chunks(compiled: Compile) -> None:
    """A prompt takes what its chunks take when all are given to the dies at once, and less than one after the
    other.
    """
    options = {"dies": 4, "pp": 2, "embedding_as_input": True}
    opened = Opened.open(compiled("last", **options))
    loaded = {n: load_programs(opened, n) for n in (1, 8)}
    machine, ahead = load_machine("edge10"), opened.manifest.options.steps_ahead
    assert ahead == 2
    in_turn = Predictor(loaded.__getitem__, (1, 8), 64, machine).prefill_device_ns(48)
    overlapped = Predictor(loaded.__getitem__, (1, 8), 64, machine, stages=ahead).prefill_device_ns(48)
    at_once = simulate_chunks(loaded[8], machine, range(0, 48, 8), wanted=False)
    head = [simulate_chunks(loaded[8], machine, [40], wanted=wanted) for wanted in (True, False)]
    launches = 6 * machine.sync.launch_us * 1000
    assert overlapped == pytest.approx(at_once + head[0] - head[1] + launches, rel=0.02)
    assert overlapped < 0.75 * in_turn


def test_simulated_prompts_have_one_head(compiled: Compile) -> None:
    """Three steps of a prompt, the last of which is whole; with all rows each is."""
    machine = load_machine("edge10")
    times = {}
    for rows in ("all", "last"):
        loaded = {n: load_programs(Opened.open(compiled(rows, dies=1)), n) for n in (1, 8)}
        predictor = Predictor(loaded.__getitem__, (1, 8), 64, machine)
        whole = [predictor.step(8, pos).total_ns for pos in (0, 8, 16)]
        bare = [predictor.step(8, pos, wanted=False).total_ns for pos in (0, 8, 16)]
        times[rows] = whole, bare, predictor.prefill_device_ns(24)
    whole, bare, prefill = times["last"]
    assert prefill == bare[0] + bare[1] + whole[2]
    assert max(bare) < min(whole) - 1000
    whole, bare, prefill = times["all"]
    assert bare == whole and prefill == sum(whole)
