"""Written checkpoints: read by unpackers made from the formats' descriptions
(`tests/frontends/quantized.py`), imported again, compiled to the programs of the module itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from tests.frontends.awq_tables import random_table
from tests.frontends.quantized import unpack_awq, unpack_compressed, unpack_gptq
from tyir.attributes import DenseElementsAttr
from tyir.backends.checkpoint import formats
from tyir.backends.checkpoint.writer import write_checkpoint
from tyir.backends.edge10.compile import CompileContext, to_program
from tyir.backends.edge10.weight_windows import WindowReader
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.quant import AWQ_ORDER, Unpack, pack_words
from tyir.dialects.ty import Constant, Param, QuantizedLinear, QuantizeGroups, dequantize
from tyir.execution.awq_table import AwqSettings
from tyir.execution.weights import CheckpointReader, checkpoint_of
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.layers import path_of
from tyir.manifest import settled
from tyir.passes.pipelines import awq_pipeline
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.tools.api import compile_path

Array = npt.NDArray[Any]
FORMATS = ("awq", "gptq", "compressed-tensors")
IDS = np.random.default_rng(0).integers(3, 96, (1, 9))
UNPACKERS: dict[str, Callable[[dict[str, Array], int, int], Array]] = {
    "awq": unpack_awq,
    "gptq": lambda t, n, k: unpack_gptq(t, n, k, 2),
    "compressed-tensors": unpack_compressed,
}


# ------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(
    ("values", "order", "word"),
    [
        (range(8), AWQ_ORDER, 0x75316420),
        (range(8), tuple(range(8)), 0x76543210),
        ((0, 1, 8, 9, 10, 11, 12, 15), tuple(range(8)), 0xFCBA9810),  # -8 -7 0 1 2 3 4 7, 8 added
        ((15,) * 8, AWQ_ORDER, 0xFFFFFFFF),
    ],
)
def test_golden_words(values: Any, order: tuple[int, ...], word: int) -> None:
    packed = pack_words(np.array([list(values)], np.uint8), 1, order)
    assert packed.dtype == np.int32 and packed.tolist() == [[np.uint32(word).astype(np.int32)]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_are_those_of_its_own_compressor(symmetric: bool) -> None:
    """Names, shapes and bits; 0.20.1 and others that pack so."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    random = np.random.default_rng(2)
    q = random.integers(0, 16, (20, 64)).astype(np.uint8)
    zeros = np.full((20, 2), 8, np.uint8) if symmetric else random.integers(0, 16, (20, 2)).astype(np.uint8)
    scales = (random.random((20, 2)) * 0.1 + 0.01).astype(np.float16)
    dense = ((q.reshape(20, 2, 32).astype(np.float32) - zeros[..., None]) * scales[..., None]).reshape(20, 64)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    state = {
        "weight": torch.from_numpy(dense),
        "weight_scale": torch.from_numpy(scales).float(),
        "weight_zero_point": torch.from_numpy(zeros.astype(np.int8) - np.int8(8)),
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    ours = formats.FORMATS["compressed-tensors"].tensors(q, scales, zeros)
    assert set(theirs) == set(ours) - ({"weight_zero_point"} if symmetric else set())
    for name, tensor in theirs.items():
        mine = np.ascontiguousarray(ours[name])
        mine = mine.view(np.int32) if mine.dtype == np.uint32 else mine
        assert np.array_equal(tensor.numpy(), mine.astype(np.float32) if name == "weight_scale" else mine)


@pytest.mark.parametrize(("shape", "axis"), [((16, 3), 0), ((5, 24), 1), ((10, 7), 0), ((3, 9), 1)])
@pytest.mark.parametrize("order", [AWQ_ORDER, tuple(range(8))])
def test_packing_is_undone_by_unpack(shape: tuple[int, ...], axis: int, order: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    words = pack_words(values, axis, order)
    op = Unpack(Constant(value=DenseElementsAttr.from_numpy(words)).out, axis=axis, order=order)
    whole = op.evaluate(words)
    assert np.array_equal(np.take(whole, range(shape[axis]), axis=axis), values)


# ------------------------------------------------------------------------------------- whole checkpoints


def quantised(folder: Path, where: Path, settings: AwqSettings, clip: float | None = 0.1) -> Module:
    module = import_model(folder, positions=64)
    run_pipeline(module, "to-ty")
    table = where / "awq.safetensors"
    random_table(module, settings, clip=clip).save(table)
    run_pipeline(module, awq_pipeline(table))
    return module


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 in bf16 with grouped heads and a tied head, in several files."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "quant_config.json.bak").write_text("{}")
    (folder / "LICENSE").write_text("as you like")
    return folder


@pytest.fixture(scope="module")
def module(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Module:
    return quantised(bf16, tmp_path_factory.mktemp("table"), AwqSettings(group_size=16))


def program(module: Module) -> tuple[str, dict[str, bytes]]:
    """The dies' programs of a module, as artifacts have them, and the weights that they are given."""
    to_program(module, settled({"dies": 2, "seqlens": (1,), "max_kv": 32}, module), CompileContext())
    evaluator = WindowReader(CheckpointReader(checkpoint_of(module)))
    dies = [m for m in module.body if isinstance(m, Module)]
    weights = {
        f"{i}.{p.sym_name}": evaluator.evaluate(p).tobytes()
        for i, die in enumerate(dies)
        for p in die.body
        if isinstance(p, Param)
    }
    functions = [op for die in dies for op in die.body if not isinstance(op, Param)]
    return "\n".join(print_op(op, locations=False) for op in functions), weights


@pytest.mark.parametrize("format", FORMATS)
def test_everybody_reads_what_is_written(module: Module, bf16: Path, tmp_path: Path, format: str) -> None:
    out = write_checkpoint(module, tmp_path / "out", format=format)
    assert sorted(p.name for p in out.iterdir()) == [
        "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    tensors = load_file(out / "model.safetensors")
    assert all(t.dtype in (np.float16, np.int32, np.int64) for t in tensors.values())
    reader = CheckpointReader(bf16)
    count = 0
    seen = quantised_weights(module, reader)
    for path, wanted in seen.items():
        parts = {k.removeprefix(f"{path}."): v for k, v in tensors.items() if k.startswith(f"{path}.")}
        assert np.array_equal(UNPACKERS[format](parts, *wanted.shape), wanted), path
        assert not any(k == "weight" for k in parts)
        count += 1
    assert count == 14
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16" and config["tie_word_embeddings"] is True
    assert config["quantization_config"]["quant_method"] == format


@pytest.mark.parametrize(
    "format", [f if f == "awq" else pytest.param(f, marks=pytest.mark.slow) for f in FORMATS]
)
def test_its_programs_are_those_of_the_module(module: Module, tmp_path: Path, format: str) -> None:
    """This project's own import of what was written, as far as artifacts hold it."""
    again = import_model(write_checkpoint(module, tmp_path / "out", format=format), positions=64)
    run_pipeline(again, "to-ty")
    with pytest.raises(TyirError, match="is quantised already"):
        write_checkpoint(again, tmp_path / "twice")
    text, weights = program(again)
    wanted_text, wanted_weights = program(module.clone())
    assert text == wanted_text
    assert weights == wanted_weights


def quantised_weights(module: Module, reader: CheckpointReader) -> dict[str, Array]:
    """f16((q - z) s) of every quantised linear as the interpreter has it."""
    seen: dict[str, Array] = {}
    users = {op.q.op: op for op in module.walk_type(QuantizedLinear)}

    def probe(stack: object, op: Any, results: tuple[Array, ...]) -> None:
        if isinstance(op, QuantizeGroups):
            seen[str(path_of(users[op]))] = dequantize(*results, op.group_size)

    run_function(module, "main", (IDS, np.arange(9)[None]), reader, probe=probe)
    return seen


def test_shards_and_their_index(module: Module, tmp_path: Path) -> None:
    whole = load_file(write_checkpoint(module, tmp_path / "one") / "model.safetensors")
    out = write_checkpoint(module, tmp_path / "many", max_shard=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    parts = {name: load_file(out / name) for name in names}
    assert {k: n for n in names for k in parts[n]} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for key, name in index["weight_map"].items():
        assert np.array_equal(parts[name][key], whole[key]), key


def test_weights_that_were_rounded_otherwise(module: Module, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), "model.layers.1.mlp.down_proj"
    q, zeros = (rng.integers(0, 16, (64, n)).astype(np.uint8) for n in (96, 6))
    scales = rng.uniform(0.01, 0.1, (64, 6)).astype(np.float16)
    out = write_checkpoint(module, tmp_path / "out", rounded={path: (q, scales, zeros)})
    stored = load_file(out / "model.safetensors")
    parts = {k.removeprefix(f"{path}."): v for k, v in stored.items() if k.startswith(f"{path}.")}
    assert np.array_equal(unpack_awq(parts, 64, 96), dequantize(q, scales, zeros, 16))
    with pytest.raises(TyirError, match="is not quantised in the module"):
        write_checkpoint(module, tmp_path / "no", rounded={"model.norm": (q, scales, zeros)})
    with pytest.raises(TyirError, match="in groups of 16"):
        write_checkpoint(module, tmp_path / "no", rounded={path: (q, scales[:, :3], zeros)})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e9])
def test_what_is_not_finite_is_not_written(bf16: Path, tmp_path: Path, factor: float) -> None:
    """A checkpoint's own NaN, and scales that leave f16: by the tensor's name, and nothing is written."""
    import shutil

    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    folder = tmp_path / "model"
    shutil.copytree(bf16, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        tensors = load(folder / index[name])
        tensors[name][..., 0] = torch.tensor(factor, dtype=torch.bfloat16)
        save(tensors, folder / index[name], {"format": "pt"})
    module = import_model(folder, positions=64)
    run_pipeline(module, "to-ty,quantize-weights{group-size=16}")
    with pytest.raises(TyirError) as caught:
        write_checkpoint(module, tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert f"tensor '{name}' holds" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tied_head_that_is_quantised_is_untied(bf16: Path, tmp_path: Path) -> None:
    module = quantised(bf16, tmp_path, AwqSettings(group_size=16, lm_head=True, zero_point=False), 0.05)
    out = write_checkpoint(module, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert tensors["lm_head.qweight"].shape == (64, 12) and "model.embed_tokens.weight" in tensors
    assert (tensors["lm_head.qzeros"] == np.uint32(0x88888888).astype(np.int32)).all()  # symmetric
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["lm_head"] is True
    again = import_model(out, positions=64)
    run_pipeline(again, "to-ty")
    args = (IDS, np.arange(9)[None])
    one = run_function(module, "main", args, CheckpointReader(bf16))[0]
    np.testing.assert_allclose(run_function(again, "main", args, CheckpointReader(out))[0], one, atol=2e-3)


@pytest.mark.slow
def test_modules_that_are_left_out_are_named(bf16: Path, tmp_path: Path) -> None:
    settings = AwqSettings(group_size=16, modules_to_not_convert=("layers.1", "down_proj"))
    module = quantised(bf16, tmp_path, settings)
    out = write_checkpoint(module, tmp_path / "out")
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert len(kept) == 8 and "model.layers.0.mlp.down_proj" in kept
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == np.float16
    assert "model.layers.0.mlp.up_proj.qweight" in tensors
    import_model(out, positions=64)


def test_what_cannot_be_written(module: Module, bf16: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    with pytest.raises(TyirError, match="was not written by"):
        write_checkpoint(module, tmp_path / "kept")
    plain = import_model(bf16, positions=64)
    run_pipeline(plain, "to-ty")
    with pytest.raises(TyirError, match="no linear of the module is quantised"):
        write_checkpoint(plain, tmp_path / "none")
    with pytest.raises(TyirError, match="one of awq, gptq, compressed-tensors"):
        write_checkpoint(module, tmp_path / "none", format="marlin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept"]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_compiling_either_gives_the_same_bytes(bf16: Path, tmp_path: Path, format: str) -> None:
    """tyir-compile of the original with the table, and of the written checkpoint."""
    options = {"dies": 2, "seqlens": (1, 4), "max_kv": 32}
    module = quantised(bf16, tmp_path, AwqSettings(group_size=16))
    written = write_checkpoint(module, tmp_path / "w", format=format)
    table = tmp_path / "awq.safetensors"
    one = compile_path(bf16, tmp_path / "1", options, awq_table=table)
    other = compile_path(written, tmp_path / "2", options)
    files = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    assert files == {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    differ = {f.name for f in files if (one / f).read_bytes() != (other / f).read_bytes()}
    assert differ == {"config.json", "manifest.json"}
    manifest = json.loads((one / "manifest.json").read_text())["options"]
    assert manifest["weights"] == "awq" and len(manifest["awq"]) == 64 and manifest["group_size"] == 16
