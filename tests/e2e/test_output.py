"""Artifacts that return tokens instead of logits: the same tokens, on every engine, and clear errors for what
needs logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.artifacts.schema import sha256_of
from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.execution.entry_points import result
from tyir.manifest import MANIFEST, BuildOptions
from tyir.parser import parse_module
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.serving.choosing import Sampling
from tyir.runtime_sim.session.sampling import check_sampling, logsumexp, make_sampler
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_verify import main

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]
K = 8


@pytest.fixture(scope="module")
def top(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model over 3 dies, returning the 8 best tokens."""
    options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=128, output=f"topk={K}")
    return compile_path(imported, tmp_path_factory.mktemp("top"), options)


@pytest.fixture(scope="module")
def best(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_path(
        imported,
        tmp_path_factory.mktemp("best"),
        BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, output="argmax"),
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_tokens_are_those_of_the_logits(artifacts: Artifacts, top: Path, engine: EngineName) -> None:
    """11 tokens as 8 + 3 padded, then one more."""
    whole, session = Session(artifacts(3, "fp16"), engine), Session(top, engine)
    for ids in (IDS, [7]):
        logits = whole.feed(ids)
        found = session.next_tokens(ids)
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :K]
        np.testing.assert_array_equal(found.ids, order)
        np.testing.assert_array_equal(found.values, np.take_along_axis(logits, order, axis=-1))
        assert found.logsumexp is not None
        np.testing.assert_allclose(found.logsumexp, logsumexp(logits), rtol=0, atol=1e-5)


def test_greedy_generation_is_that_of_the_logits(artifacts: Artifacts, best: Path, top: Path) -> None:
    wanted = list(Session(artifacts(2, "fp16")).generate(IDS, 20))
    assert list(Session(best).generate(IDS, 20)) == wanted
    assert list(Session(best, "edge10").generate(IDS, 4)) == wanted[:4]
    assert list(Session(top).generate(IDS, 20)) == list(Session(artifacts(3, "fp16")).generate(IDS, 20))


def test_sampling_among_the_best_is_top_k_sampling(artifacts: Artifacts, top: Path) -> None:
    whole = list(Session(artifacts(3, "fp16")).generate(IDS, 20, sampler=make_sampler(0.8, top_k=K, seed=3)))
    assert list(Session(top).generate(IDS, 20, sampler=make_sampler(0.8, seed=3))) == whole
    assert list(Session(top).generate(IDS, 20, sampler=make_sampler(0.8, top_k=K, seed=3))) == whole


def test_a_program_with_logits_names_its_best_token(artifacts: Artifacts) -> None:
    session = Session(artifacts(2, "fp16"))
    found = session.next_tokens(IDS)
    assert session.choices is None and found.ids.shape == (len(IDS), 1)
    session.reset()
    logits = session.feed(IDS)
    np.testing.assert_array_equal(found.ids[:, 0], logits.argmax(axis=-1))
    np.testing.assert_allclose(found.logsumexp, logsumexp(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.1, 0.3])
def test_a_nucleus_of_all_tokens_is_that_of_the_logits_or_an_error(
    artifacts: Artifacts, top: Path, top_p: float
) -> None:
    """Without --top-k the nucleus is of the whole vocabulary: the same tokens for the same seed, as far as
    the 8 best hold it.
    """
    whole, best = Session(artifacts(3, "fp16")), Session(top)
    lengths = []
    for seed in range(6):
        whole.reset(), best.reset()
        wanted = list(whole.generate(IDS, 12, sampler=make_sampler(1.0, top_p=top_p, seed=seed)))
        made: list[int] = []
        try:
            made.extend(best.generate(IDS, 12, sampler=make_sampler(1.0, top_p=top_p, seed=seed)))
        except TyirError as error:
            assert "may leave in more than the 8 best tokens" in str(error)
        lengths.append(len(made))
        assert made == wanted[: len(made)]
    assert max(lengths) > 2, "nothing was compared"


def test_artifacts_of_an_older_version_say_what_they_lack(imported: Path, tmp_path: Path) -> None:
    """As they were made before: the best tokens and nothing of the others."""
    module = parse_module(imported.read_text())
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=64, output="topk=4")
    run_pipeline(module, "to-ty,kv-materialize{max-kv=64},select-output{kind=topk k=4}")
    (main,) = (f for f in module.walk_type(Func) if f.res_attr(2) == result("logsumexp"))
    kept = [i for i in range(len(main.body.terminator.operands)) if i != 2]
    attrs = [main.res_attr(i) for i in kept]
    main.body.terminator.operands = [main.body.terminator.operands[i] for i in kept]
    main.refresh_type()
    main.set_res_attrs(attrs)
    (tmp_path / "old.ir").write_text(print_op(module))
    old = compile_path(tmp_path / "old.ir", tmp_path, options)
    session = Session(old)
    assert not session.manifest.has_logsumexp and session.next_tokens(IDS).logsumexp is None
    assert len(list(session.generate([7], 3, sampler=make_sampler(0.8, top_k=4, top_p=0.5, seed=1)))) == 3
    with pytest.raises(TyirError, match=r"of an older version(.|\n)*compile the model again"):
        list(session.generate([7], 3, sampler=make_sampler(0.8, top_p=0.5)))
    for asked, logprobs, what in (
        (Sampling(), 1, "logprobs"),
        (Sampling(temperature=1, top_p=0.5), None, "top_p without top_k"),
        (Sampling(temperature=1, min_p=0.5), None, "min_p without top_k"),
    ):
        with pytest.raises(TyirError, match=rf"{what}: these artifacts(.|\n)*compile the model again"):
            asked.check(4096, session.choices, session.manifest.has_logsumexp, logprobs=logprobs)
        asked.check(4096, session.choices, True, logprobs=logprobs)


def test_what_needs_logits_says_so(best: Path, top: Path) -> None:
    with pytest.raises(
        TyirError, match=r"return the best token of each position and no logits(.|\n)*--output logits"
    ):
        Session(best).feed(IDS)
    with pytest.raises(TyirError, match="return the 8 best tokens"):
        Session(top).feed(IDS)
    with pytest.raises(TyirError, match=r"most likely token only(.|\n)*--temperature 0"):
        check_sampling(1, 0.7, 0)
    with pytest.raises(TyirError, match=r"--top-k 9(.|\n)*use --top-k 8"):
        check_sampling(8, 0.7, 9)
    check_sampling(None, 0.7, 50)


@pytest.mark.parametrize(("fixture", "returned"), [("best", "1 token"), ("top", "8 tokens")])
def test_verification_compares_what_is_returned(
    request: pytest.FixtureRequest,
    model: Path,
    fixture: str,
    returned: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    assert main([str(folder), "--against", str(model), "--prompts", "2", "--tokens", "16"]) == 0
    out, err = capsys.readouterr()
    assert "OK: host engine" in out
    assert f"return {returned} of each position" in err and "--output logits" in err


def test_the_outputs_are_in_the_buffer_config(top: Path) -> None:
    config = json.loads((top / "buffer_config.json").read_text())
    assert config["dies"]["0"]["outputs"]["8"] == {
        "logsumexp": {"dtype": "f32", "shape": [1, 8]},
        "top_ids": {"dtype": "i32", "shape": [1, 8, K]},
        "top_values": {"dtype": "f32", "shape": [1, 8, K]},
    }


def test_a_manifest_whose_logsumexp_is_another_is_refused(top: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(top, tmp_path / "other"))
    manifest = json.loads((folder / MANIFEST).read_text())
    (output,) = (t for t in manifest["programs"][0]["outputs"] if t["name"] == "logsumexp")
    output["dtype"] = "f16"
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": sha256_of(manifest)}))
    with pytest.raises(TyirError, match=r"logsumexp: 1x\dxf16 where the options say logsumexp: 1x\dxf32"):
        Session(folder)
