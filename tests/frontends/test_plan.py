"""`--plan`: bytes equal to what a compile writes, nothing heavy imported, what does not fit named with what
does.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tests.frontends.test_gguf_and_torch import SMALL, write_gguf
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.execution.weights import read_safetensors
from tyir.manifest import BuildOptions
from tyir.parser import parse_file
from tyir.tools.api import compile_path
from tyir.tools.estimate.plan import make_plan
from tyir.tools.estimate.shape import FAMILIES, read_shape

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def compiled_bytes(folder: Path, die: int, seqlen: int) -> tuple[int, int, int]:
    """Weights, cache and logits of one die, as written."""
    files = (f"common_die{die}.params", f"seqlen_{seqlen}/llm_die{die}.params")
    weights = sum(a.nbytes for f in files for a in read_safetensors(folder / "batch_1" / f).values())
    program = parse_file(folder / "batch_1" / f"seqlen_{seqlen}" / f"llm_die{die}.edge10")
    sizes = {"kv": 0, "output": 0, "input": 0}
    for buffer in program.walk_type(edge10.Buffer):
        if buffer.kind in sizes:
            sizes[buffer.kind] += buffer.nbytes
    return weights, sizes["kv"], sizes["output"]


@pytest.mark.parametrize(
    ("dies", "weights", "cache", "stages"),
    [
        (3, "int4", "int8", 1),
        (2, "fp16", "int4", 1),
        pytest.param(4, "int4", "fp16", 2, marks=pytest.mark.slow),
        pytest.param(1, "fp16", "fp16", 1, marks=pytest.mark.slow),
        pytest.param(4, "fp16", "fp16", 1, marks=pytest.mark.slow),
    ],
)
def test_numbers_are_those_of_a_compile(
    tmp_path: Path, dies: int, weights: str, cache: str, stages: int
) -> None:
    options = BuildOptions(dies=dies, seqlens=(1, 8), max_kv=64, weights=weights, kv_dtype=cache, pp=stages)
    folder = compile_path(TINY, tmp_path, options)
    plan = make_plan(TINY, options)
    for die, need in enumerate(plan.dies):
        found, cached, output = compiled_bytes(folder, die, 8)
        assert (need.weights, need.kv_cache) == (found, cached)
        assert output <= need.activations
    disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert 0.5 < plan.host_disk / disk < 2


@pytest.mark.slow
def test_numbers_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    write_quantized(TINY, tmp_path / "awq", KINDS["awq"])
    options = BuildOptions(dies=3, seqlens=(1,), max_kv=64)
    folder = compile_path(tmp_path / "awq", tmp_path / "out", options)
    plan = make_plan(tmp_path / "awq", options)
    assert [n.weights for n in plan.dies] == [compiled_bytes(folder, d, 1)[0] for d in range(3)]


@pytest.mark.parametrize(
    "family", [f if f == "seed_oss" else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_numbers_of_every_family(save_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """A config with nothing but sizes: whatever else the model has comes from the family's defaults, as in
    transformers.
    """
    folder = save_model(family, dtype="float16", vocab_size=256, head_dim=16, num_hidden_layers=3)
    options = BuildOptions(dies=2, seqlens=(1,), max_kv=64)
    plan = make_plan(folder, options)
    compiled = compile_path(folder, tmp_path, options)
    assert [(n.weights, n.kv_cache) for n in plan.dies] == [
        compiled_bytes(compiled, d, 1)[:2] for d in range(2)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    shape, config = read_shape(tmp_path), AutoConfig.for_model(family, **sizes)
    assert shape.kv_heads == getattr(config, "num_key_value_heads", 32)
    assert shape.head_dim == (getattr(config, "head_dim", None) or 64)
    assert shape.tied == config.tie_word_embeddings
    assert shape.positions == config.max_position_embeddings


@pytest.mark.parametrize("kind", ["Q4_0", pytest.param("Q8_0", marks=pytest.mark.slow)])
def test_numbers_of_a_gguf_file(save_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Q4_0 stays 4-bit in groups of 32, the other formats become dense.

    Zero points that are all 8 are stored once, which the plan does not count on.
    """
    write_gguf(tmp_path / "model.gguf", save_model("llama", dtype="float16", **SMALL), kind)
    options = BuildOptions(dies=2, seqlens=(1,), max_kv=64)
    plan = make_plan(tmp_path / "model.gguf", options)
    assert plan.group == (32 if kind == "Q4_0" else None)
    compiled = compile_path(tmp_path / "model.gguf", tmp_path / "out", options)
    for die, need in enumerate(plan.dies):
        assert (
            0
            <= need.weights - compiled_bytes(compiled, die, 1)[0]
            <= (0.01 * need.weights if kind == "Q4_0" else 0)
        )


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}))
    return folder


def test_what_does_not_fit_names_what_does(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m")
    assert read_shape(folder).parameters == 8_030_261_248  # https://huggingface.co/meta-llama/Meta-Llama-3-8B
    options = BuildOptions(dies=2, max_kv=131072, weights="int4")
    (problem,) = make_plan(folder, options).problems
    assert "max-kv 131072 needs 8.00 GiB per die and" in problem.message
    assert problem.help is not None and problem.help.startswith("the cheapest that fit, per die: ")
    remedies = re.findall(r"(--[^(,]+?) \(([\d.]+) GiB\)", problem.help)
    assert len(remedies) == 3
    for words, figure in remedies:
        args = parser().parse_args(words.split())
        changed = BuildOptions(
            dies=args.dies or 2,
            max_kv=args.max_kv or 131072,
            weights="int4",
            kv_dtype=args.kv_dtype or "fp16",
        )
        plan = make_plan(folder, changed)
        assert not plan.problems, words
        assert f"{max(n.total for n in plan.dies) / 2**30:.2f}" == figure
    longest = next(int(w.split()[1]) for w, _ in remedies if w.startswith("--max-kv"))
    assert make_plan(folder, BuildOptions(dies=2, max_kv=longest + 512, weights="int4")).problems


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser()
    known.add_argument("--dies", type=int)
    known.add_argument("--max-kv", type=int)
    known.add_argument("--kv-dtype")
    return known


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    (problem,) = make_plan(write_config(tmp_path / "m"), BuildOptions(dies=1)).problems
    assert "the weights need 14.96 GiB per die, edge10 has 8.00 GiB" in problem.message
    assert problem.help is not None and "--weights int4 (" in problem.help and "--dies 2 (" in problem.help


def test_bad_configs(tmp_path: Path) -> None:
    for change, wanted in (
        ({"hidden_size": -1}, "'hidden_size' is -1"),
        ({"vocab_size": "x"}, "'vocab_size' is"),
        ({"model_type": "bloom"}, "'bloom'"),
        ({"num_key_value_heads": 5}, "not a multiple of 5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ):
        with pytest.raises(TyirError, match=wanted):
            make_plan(write_config(tmp_path / "m", **change), BuildOptions())


@pytest.mark.parametrize("tool", ["tyir_import", "tyir_compile"])
def test_tools_print_it_without_torch(tmp_path: Path, tool: str) -> None:
    folder = write_config(tmp_path / "m")
    code = (
        f"import sys; from tyir.tools.{tool} import main; c ="
        f" main({[str(folder), '--plan', '--dies', '4', '--weights', 'int4']!r}); assert 'torch' not in"
        " sys.modules; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "8.030 G parameters" in done.stdout and "tokens/s" in done.stdout
    code = code.replace("'--dies', '4', '--weights', 'int4'", "'--dies', '1'")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 1
        and "the weights need" in done.stderr
        and sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    )
