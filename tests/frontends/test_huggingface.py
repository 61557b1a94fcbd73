"""The imported module computes what the Hugging Face model computes, at stage aten and after raise-aten."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import Diagnostic
from tyir.dialects import aten, ty
from tyir.dialects.builtin import Module
from tyir.execution.weights import CheckpointReader, check_files
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.layers import layer_of, path_of
from tyir.location import FileLoc, NameLoc, module_path
from tyir.passes.raise_aten import raise_aten

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"
LENGTHS = (1, 7, 33)
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
}
FAMILY = ("llama", *MODELS)


@cache
def reference_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference(folder: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits [1, s, V] of the model in fp32, by transformers."""
    import torch

    with torch.no_grad():
        logits: npt.NDArray[np.float32] = reference_model(folder)(torch.tensor(ids)).logits.numpy()
    return logits


def logits_of(module: Module, folder: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    (logits,) = run_function(module, "main", (ids, np.arange(ids.shape[1])[None]), CheckpointReader(folder))
    return logits.astype(np.float32)


def error_of(
    module: Module, folder: Path, ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.float32]
) -> float:
    return float(np.linalg.norm(logits_of(module, folder, ids) - wanted) / np.linalg.norm(wanted))


def cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.fixture(scope="module")
def family(llama: Path, save_model: Any) -> dict[str, Path]:
    """One random folder per supported model type."""
    return {"llama": llama, **{name: save_model(name, **config) for name, config in MODELS.items()}}


@pytest.fixture(scope="module")
def tiny_f16() -> Module:
    return import_model(TINY)


def test_tiny_qwen2_in_f32() -> None:
    module = import_model(TINY, dtype="f32")
    cases = [np.random.default_rng(n).integers(0, 4096, (1, n)) for n in LENGTHS]
    wanted = [reference(TINY, ids) for ids in cases]
    for stage in ("aten", "ty"):
        if stage == "ty":
            raise_aten(module)
        assert module.attributes["tyir.stage"] is StringAttr(stage)
        for ids, logits in zip(cases, wanted):
            assert error_of(module, TINY, ids, logits) < 1e-5, (stage, ids.shape)


def test_tiny_qwen2_in_f16(tiny_f16: Module) -> None:
    raised = tiny_f16.clone()
    raise_aten(raised)
    ids = np.random.default_rng(0).integers(0, 4096, (1, 33))
    wanted = reference(TINY, ids)
    for module in (tiny_f16, raised):
        assert cosine(logits_of(module, TINY, ids), wanted) > 0.9999


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_model_family(family: dict[str, Path], name: str, dtype: str) -> None:
    """bf16 checkpoints, in one file or several; yarn and llama3 rope, q/k norms, sliding windows, tied
    embeddings.
    """
    folder = family[name]
    module = import_model(folder, dtype=dtype)
    cases = [
        np.random.default_rng(n).integers(0, 96, (1, n))
        for n in (LENGTHS if dtype == "f32" else LENGTHS[-1:])
    ]
    wanted = [reference(folder, ids) for ids in cases]
    for stage in ("aten", "ty"):
        if stage == "ty":
            raise_aten(module)
        for ids, logits in zip(cases, wanted):
            if dtype == "f32":
                assert error_of(module, folder, ids, logits) < 1e-5, (stage, ids.shape)
            else:
                assert cosine(logits_of(module, folder, ids), logits) > 0.9999, (stage, ids.shape)


def test_module_says_where_it_comes_from(tiny_f16: Module) -> None:
    model, files = tiny_f16.attributes["tyir.model"], tiny_f16.attributes["tyir.files"]
    assert isinstance(model, DictAttr) and isinstance(files, DictAttr)
    assert tiny_f16.attributes["tyir.checkpoint"] is StringAttr(str(TINY.absolute()))
    assert model["architecture"] is StringAttr("Qwen2ForCausalLM") and model["model_type"] is StringAttr(
        "qwen2"
    )
    assert [
        model[k].value for k in ("vocab_size", "max_position_embeddings", "num_hidden_layers", "head_dim")
    ] == [4096, 1024, 6, 32]
    size = files["model.safetensors"]["size"]
    assert isinstance(size, IntegerAttr) and size.value == (TINY / "model.safetensors").stat().st_size
    check_files(tiny_f16)


def test_every_op_has_the_place_of_its_source(tiny_f16: Module) -> None:
    main = tiny_f16.lookup("main")
    assert main is not None
    for op in main.body:
        if op.dialect == "aten":
            assert isinstance(op.loc, NameLoc) and isinstance(op.loc.child, FileLoc), op
            assert op.loc.child.file == "modeling_qwen2.py" and op.loc.child.line > 1
    gate = next(op for op in main.walk_type(aten.Linear) if path_of(op) == "model.layers.3.mlp.gate_proj")
    assert layer_of(gate) == 3 and module_path(gate.loc) == path_of(gate)


def test_tied_embeddings_are_one_global(tiny_f16: Module) -> None:
    names = [op.sym_name for op in tiny_f16.body if isinstance(op, ty.Global)]
    assert len(names) == 74 and "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    (read,) = [op for op in tiny_f16.walk_type(ty.GetGlobal) if op.symbol.leaf == "model.embed_tokens.weight"]
    assert len(read.result.users) == 2


def test_raised_model_is_small(tiny_f16: Module) -> None:
    raised = tiny_f16.clone()
    statistics: dict[str, int] = {}
    raise_aten(raised, statistics)
    counts = {
        name: sum(op.name == f"ty.{name}" for op in raised.walk())
        for name in ("attention", "rope", "rms_norm", "silu_mul", "linear", "rope_angles", "transpose")
    }
    assert counts == {
        "attention": 6,
        "rope": 12,
        "rms_norm": 13,
        "silu_mul": 6,
        "linear": 43,
        "rope_angles": 1,
        "transpose": 0,
    }
    assert statistics["rope"] == 12 and statistics["rms_norm"] == 13


def test_bf16_weights_are_cast_once(family: dict[str, Path]) -> None:
    module = import_model(family["qwen3"])
    assert sum(op.sym_name is not None for op in module.body if isinstance(op, ty.Global)) == sum(
        1 for _ in module.walk_type(ty.Cast)
    )


def test_stray_tensors_are_noted(llama: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copy(llama / "config.json", tmp_path)
    tensors = {k: v for file in sorted(llama.glob("*.safetensors")) for k, v in load_file(file).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    notes: list[Diagnostic] = []
    import_model(tmp_path, note=notes.append)
    assert [(n.severity, n.message) for n in notes] == [
        (
            "warning",
            "'model.layers.0.self_attn.rotary_emb.inv_freq' is not used: what follows from the config",
        )
    ]
