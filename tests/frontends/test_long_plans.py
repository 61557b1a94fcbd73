"""Plans of long contexts: more dies never hold fewer tokens, stages are among what helps, and the models of a
million tokens fit the boards they must.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.frontends.test_plan import write_config
from tyir.manifest import BuildOptions, Manifest
from tyir.targets.machine import load_machine
from tyir.tools import tyir_compile
from tyir.tools.bench.long_context import CONFIGS
from tyir.tools.estimate.die_needs import DieNeeds
from tyir.tools.estimate.long_context import prompt_cost
from tyir.tools.estimate.model import ModelShape
from tyir.tools.estimate.plan import longest_caches, make_plan
from tyir.tools.estimate.shape import read_shape

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"


@pytest.fixture(params=["7b", "14b"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return tmp_path


def tokens(folder: Path, options: BuildOptions) -> int:
    """What fits on the dies of `options`, of the planner's table."""
    found = longest_caches(read_shape(folder), options, load_machine())
    return next(n.tokens for n in found if (n.dies, n.stages) == (options.dies, options.pp))


@pytest.mark.parametrize("cache", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_more_dies_never_hold_fewer_tokens(folder: Path, cache: str) -> None:
    before = 0
    for dies in (1, 3, 4, 5, 8, 16) if cache == "fp16" else range(1, 17):
        options = BuildOptions(dies=dies, seqlens=(1, 96), weights="int4", kv_dtype=cache)
        held = tokens(folder, options)
        assert held >= before, f"{dies} dies hold {held} tokens, fewer hold {before}"
        before = held


def test_a_million_tokens_of_the_14b_fit_sixteen_dies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["14b"]))
    options = BuildOptions(dies=16, seqlens=(1, 96), max_kv=1010000, weights="int4", kv_dtype="int8", pp=2)
    assert not make_plan(tmp_path, options).problems


def test_copies_of_a_head_can_be_avoided(tmp_path: Path) -> None:
    """32 layers of 8 heads on 16 dies: two dies share a head's cache, by its tokens or, if each shall have
    all of them, by stages that share the layers instead.
    """
    folder = write_config(tmp_path / "m")
    options = BuildOptions(dies=16, max_kv=1_500_000, weights="int4", kv_dtype="int8", kv_split="heads")
    (problem,) = make_plan(folder, options).problems
    assert problem.help is not None and "--pp 2 (" in problem.help and "--kv-split tokens (" in problem.help
    assert not make_plan(folder, replace(options, pp=2)).problems
    for split in ("tokens", "auto"):
        plan = make_plan(folder, replace(options, kv_split=split))
        assert not plan.problems and plan.kv_parts == 2
        assert "cut by tokens over each 2 dies" in plan.text()


def test_every_die_counts_for_every_length(folder: Path) -> None:
    """A million tokens on 16 dies in one stage take what they take in four, a fraction more of weights
    aside.
    """
    shape = read_shape(folder)
    most = {}
    for stages in (1, 4):
        options = BuildOptions(dies=16, pp=stages, seqlens=(1, 96), weights="int4")
        most[stages] = max(need.total for need in DieNeeds(shape, options).needs(16, 1_010_000))
    assert 1 <= most[1] / most[4] < 1.01
    by_heads = DieNeeds(shape, BuildOptions(dies=16, seqlens=(1, 96), weights="int4", kv_split="heads"))
    assert max(need.kv_cache for need in by_heads.needs(16, 1_010_000)) > 1.5 * most[1]
    longest, split = DieNeeds(shape, replace(options, pp=1)).longest(16, 8 << 30)
    assert split == "tokens" and longest > 1.9 * by_heads.longest(16, 8 << 30)[0]


def test_bytes_of_blocks_are_those_of_the_artifacts() -> None:
    """A cache of 300 tokens: two blocks of 256, one of them on each of two dies."""
    shape = ModelShape("small", 2, 64, 128, 4, 1, 16, 256, 1 << 20, False, True, False, False, False)
    options = BuildOptions(dies=2, seqlens=(1,), kv_split="tokens")
    needs = DieNeeds(shape, options)
    assert [need.kv_cache for need in needs.needs(2, 300)] == [2 * 2 * 256 * 16 * 2] * 2
    assert [need.kv_cache for need in needs.needs(2, 513)] == [2 * 2 * 512 * 16 * 2] * 2


def write_link(file: Path, hop_us: float, bandwidth_gbps: float) -> Path:
    """A cluster file."""
    values = {"hop_us": hop_us, "bandwidth_gbps": bandwidth_gbps, "exchange_us": 1}
    rows = [f"{n} = {{ value = {v}, label = 'fitted', source = 'test' }}" for n, v in values.items()]
    file.write_text("\n".join(["[link]", *rows]))
    return file


def test_cards_in_two_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a slow link each card holds the whole model, as no sum is worth its hops; stages pass five: the
    embedding's sum is two, a hand-over there and one back, and the logits.  A quick one is for one group.
    """
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "vocab_size": 4096}
    config = {**CONFIGS["7b"], **sizes, "num_key_value_heads": 2, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for number, (hop, rate) in enumerate(((5000, 10), (1, 10))):
        link = write_link(tmp_path / f"{number}.toml", hop, rate)
        words = ["--plan", "--dies", "4", "--seqlens", "1", "--max-kv", "256", "--weights", "int4"]
        assert tyir_compile.main([str(tmp_path), *words, "--cluster", str(link), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["on_cards"])
    for rows in found:
        assert [row["stages"] for row in rows] == [1, 2]
        assert all(0 <= row["links_s"] < row["token_s"] for row in rows)
    (slow, slow_stages), (quick, quick_stages) = found
    assert slow["largest_bytes"] > 3 * quick["largest_bytes"] and slow["links_s"] < 1e-4
    assert slow_stages["links_s"] == pytest.approx(25e-3, rel=0.01)
    assert quick["token_s"] < quick_stages["token_s"] < slow_stages["token_s"]
    assert tyir_compile.main([str(tmp_path), *words, "--cluster", str(link), "--cards", "3"]) == 1
    assert "4 dies are not shared evenly by 3 cards" in capsys.readouterr().err
    assert tyir_compile.main([str(tmp_path), *words, "--cards", "2"]) == 1
    assert "add --cluster FILE" in capsys.readouterr().err
    module = str(tmp_path / "module.ir")  # it says how many dies it is for only when it is read
    assert tyir_compile.main([module, "-o", str(tmp_path), "--cluster", str(link)]) == 1
    assert "repeat the --dies" in capsys.readouterr().err
    assert tyir_compile.main([module, "--plan", "--cluster", str(link)]) == 1
    assert "give the folder that it was imported from" in capsys.readouterr().err


def test_a_compile_takes_the_stages_that_are_quicker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hop of 20 us is too long for the sums of the embedded model's layers, and short enough that they are
    cut; --pp says otherwise.
    """
    words = ["--dies", "4", "--seqlens", "1", "--max-kv", "64"]
    words += ["--cluster", str(write_link(tmp_path / "link.toml", 20, 10))]
    for given, taken in (([], 2), (["--pp", "1"], 1)):
        assert tyir_compile.main([str(MODEL), *words, *given, "--plan", "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        quickest = min(plan["on_cards"], key=lambda row: row["token_s"])["stages"]
        assert (plan["options"]["pp"], quickest) == (taken, 2)
    assert tyir_compile.main([str(MODEL), *words, "-o", str(tmp_path / "out")]) == 0
    assert "pipeline stages: 2 (simulated, a token takes " in capsys.readouterr().err
    assert Manifest.load(tmp_path / "out" / "4die").options.pp == 2


SMALL = ModelShape("small", 8, 64, 128, 4, 2, 16, 256, 1 << 20, False, True, False, False, False)


def test_stages_that_overlap_take_a_stage_a_chunk() -> None:
    """Four stages of two layers: in turn a chunk takes all of them, overlapped about a quarter."""
    options = BuildOptions(dies=4, pp=4, seqlens=(1, 64), max_kv=3_000)
    cost = prompt_cost(SMALL, options, load_machine())
    in_turn = cost.prefill - cost.steps * load_machine().host.step_us * 1e-6
    assert cost.overlapped is not None and 0.2 < cost.overlapped / in_turn < 0.4
    assert (
        prompt_cost(SMALL, BuildOptions(dies=1, seqlens=(1,), max_kv=64), load_machine()).overlapped is None
    )


def test_only_the_last_step_of_a_prompt_has_the_head() -> None:
    """Where one row is returned: each step before saves the same, and the last the other rows' part of it."""
    times = []
    for tokens in (256, 512):  # of 4 and of 8 steps
        for rows in ("all", "last"):
            options = BuildOptions(dies=1, seqlens=(1, 64), max_kv=tokens, output="argmax", output_rows=rows)
            times.append(prompt_cost(SMALL, options, load_machine()).prefill)
    saved = [times[0] - times[1], times[2] - times[3]]
    a_step = (saved[1] - saved[0]) / 4
    assert a_step > 0
    assert 2.9 * a_step < saved[0] < 4 * a_step
