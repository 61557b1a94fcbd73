"""Numbers beyond f16 end a run with their step, position, layer and op, on every engine; never silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.small_models import save_llama
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.serving.engine import Engine
from tyir.runtime_sim.serving.generation import Finish, Generation, Scored
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_run import main as run

# Each of these tokens is a direction of its own in the hidden state, to which one weight is blown up.
CAUSES = {
    10: "ty.silu_mul at model.layers.0.mlp ",
    11: "ty.silu_mul at model.layers.1.mlp ",
    12: "ty.linear at model.layers.1.self_attn.q_proj ",
    13: "ty.linear at model.layers.1.self_attn.k_proj ",
    14: "ty.linear at model.layers.0.mlp.gate_proj ",
}
HARMLESS = [20, 30, 40, 50, 60, 70, 80, 90, 100]


def blow_up(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
    table = model.model.embed_tokens.weight
    table[:, :8] = 0
    layers = model.model.layers
    for channel, token in enumerate(CAUSES):
        table[token] = torch.eye(64)[channel]
    for part in (layers[0].mlp.gate_proj, layers[0].mlp.up_proj):
        part.weight[:, 0] = 100.0  # 800 * 800 is beyond, each factor is not
    for part in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
        part.weight[:, 1] = 100.0
    layers[1].self_attn.q_proj.weight[:, 2] = 3e4
    layers[1].self_attn.k_proj.weight[:, 3] = 3e4
    layers[0].mlp.gate_proj.weight[:, 4] = 3e4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("beyond") / "model", blow_up)


@pytest.fixture(scope="module")
def one_die(checkpoint: Path) -> Path:
    return compile_path(
        checkpoint, checkpoint.parent / "one", BuildOptions(dies=1, seqlens=(1, 4), max_kv=32)
    )


def refusal(session: Session, ids: Sequence[int]) -> str:
    with pytest.raises(TyirError) as caught:
        list(session.generate(ids, 4))
    return str(caught.value)


@pytest.mark.parametrize("token", CAUSES)
def test_the_first_op_is_named(one_die: Path, token: int) -> None:
    session = Session(one_die)
    message = refusal(session, [*HARMLESS[:6], token, *HARMLESS[6:]])
    assert f"{CAUSES[token]}on die 0 (" in message
    assert "of step 2 are not finite" in message and "from position 6 on" in message and "65504" in message
    assert session.tokens == HARMLESS[:4], "what was computed before stays"
    assert list(session.generate(HARMLESS, 4)) == list(Session(one_die).generate(HARMLESS, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_says_it(one_die: Path, engine: EngineName) -> None:
    message = refusal(Session(one_die, engine), [20, 11])
    assert "from position 1 on" in message and f"first in layer 1: {CAUSES[11]}on die 0" in message


def test_padding_does_not_count(checkpoint: Path, one_die: Path) -> None:
    """Padding is token 0, which may be anything."""

    def edit(model: Any) -> None:
        blow_up(model)
        model.model.embed_tokens.weight[0] = model.model.embed_tokens.weight[10]

    padded = save_llama(checkpoint.parent / "padded", edit)
    folder = compile_path(padded, padded.parent / "pad", BuildOptions(dies=1, seqlens=(4,), max_kv=32))
    wanted = list(Session(one_die).generate(HARMLESS, 6))
    assert list(Session(folder).generate(HARMLESS, 6)) == wanted
    assert "from position 2 on" in refusal(Session(folder), [20, 30, 0])


@pytest.mark.parametrize("engine", ENGINES)
def test_of_one_row_the_position_is_the_token_s(checkpoint: Path, engine: EngineName) -> None:
    """Layers compute all rows, the last norm and the head the one that is returned.  What an earlier row of
    the last layer comes to nobody reads, and nobody is told.
    """

    def edit(model: Any) -> None:
        model.model.norm.weight[:] = 6e4

    options = BuildOptions(dies=1, seqlens=(4,), max_kv=32, output_rows="last")
    folder = compile_path(checkpoint, checkpoint.parent / f"last-{engine}", options)
    for token, after in ((10, HARMLESS[6:]), (12, [])):
        message = refusal(Session(folder, engine), [*HARMLESS[:5], token, *after])
        assert "of step 2 are not finite" in message and "from position 5 on" in message
        assert f"{CAUSES[token]}on die 0" in message
    unread = [*HARMLESS[:5], 12, *HARMLESS[6:]]
    assert list(Session(folder, engine).generate(unread, 1))
    normed = save_llama(checkpoint.parent / f"normed-{engine}", edit)
    folder = compile_path(normed, normed.parent / f"norm-{engine}", options)
    message = refusal(Session(folder, engine), HARMLESS[:7])  # the first step computes no last norm
    assert "of step 2 are not finite" in message and "from position 6 on" in message
    assert "first in ty.rms_norm at model.norm on die 0" in message


@pytest.mark.slow
def test_dies_batches_and_best_tokens(checkpoint: Path) -> None:
    """`argmax` returns no logits: that none of them is a number is seen by its value."""
    options = BuildOptions(dies=2, seqlens=(1, 4), max_kv=32, output="argmax", batch=2)
    folder = compile_path(checkpoint, checkpoint.parent / "two", options)
    for token in (10, 12):
        with pytest.raises(TyirError) as caught:
            BatchSession(folder).generate([HARMLESS[:3], [20, token]], 4)
        assert "from position 1 of sequence 1 on" in str(caught.value)
        assert CAUSES[token] in str(caught.value)
    message = refusal(Session(folder, sequence=1), [20, 30, 13])
    assert (
        "best logits of step 1" in message
        and "from position 2 of sequence 1 on" in message
        and CAUSES[13] in message
    )


class Heard:
    """What a request of the engine came to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None

    def prompt(self, scored: Sequence[Scored]) -> None: ...

    def token(self, scored: Scored, finish: Finish | None) -> Finish | None:
        self.tokens.append(scored.token)
        return finish

    def ended(self, finish: Finish) -> None:
        self.finish = finish


@pytest.mark.slow
def test_a_request_of_a_server_ends_alone(checkpoint: Path) -> None:
    """The one whose numbers leave f16 ends with the op; its neighbour and its successor do not notice."""
    options = BuildOptions(dies=2, seqlens=(1, 4), max_kv=32, output="topk=4", batch=2)
    folder = compile_path(checkpoint, checkpoint.parent / "served", options)
    alone = list(Session(folder).generate(HARMLESS, 6))
    engine = Engine(BatchSession(folder))

    def ask(ids: list[int]) -> Heard:
        heard = Heard()
        engine.add(Generation(ids, heard, 6))
        return heard

    good, bad = ask(HARMLESS), ask([20, 30, 10])
    while engine.step():
        pass
    assert (good.tokens, good.finish) == (alone, Finish("length"))
    assert bad.tokens == [] and bad.finish is not None and bad.finish.reason == "error"
    assert CAUSES[10] in bad.finish.message and "of sequence 1" in bad.finish.message
    after = [ask(HARMLESS), ask([20, 30])]
    while engine.step():
        pass
    assert after[0].tokens == alone and len(after[1].tokens) == 6 and engine.failed is None


def test_a_damaged_weight_is_named(one_die: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(one_die, tmp_path / "damaged"))
    manifest = Manifest.load(folder)
    params = folder / manifest.programs[0].params
    data = bytearray(params.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for offset in range(start, len(data), 2):
        data[offset : offset + 2] = np.float16(np.nan).tobytes()
    params.write_bytes(data)
    message = refusal(Session(folder, check=False), HARMLESS)
    assert "weight @" in message and "NaN" in message and "compile the model again" in message


@pytest.mark.parametrize("options", [[], ["--temperature", "0.8", "--seed", "1"], ["--engine", "edge10"]])
def test_tyir_run_says_it(one_die: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "abc" + chr(10 - 3)  # token 10
    assert run([str(one_die), "--prompt", prompt, "--max-tokens", "4", *options]) == 1
    out, errors = capsys.readouterr()
    assert out == "" and "from position 3 on" in errors and "model.layers.0.mlp" in errors
    assert "internal" not in errors and "Warning" not in errors
