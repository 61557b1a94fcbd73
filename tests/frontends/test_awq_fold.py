"""awq-fold on transformers' own models: which channels can be scaled, and that folding leaves what the model
computes.

`--slow` takes every supported architecture of docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.frontends.awq_tables import random_table
from tests.frontends.test_models import CASES, REFUSED
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.passes._scale_groups import scale_groups
from tyir.pipeline import run_pipeline
from tyir.printer import print_op

IDS = np.random.default_rng(0).integers(3, 96, (1, 12))
SETTINGS = AwqSettings(group_size=16)
# (kind, producer within its layer, number of reading modules) of layer 1, one or two models of each structure
GROUPS = {
    "Qwen2": [  # grouped heads, biases, a tied head
        ("norm", "input_layernorm", 3),
        ("attention", "self_attn.v_proj", 1),
        ("norm", "post_attention_layernorm", 2),
        ("gated", "mlp.up_proj", 1),
    ],
    "Phi-3": [  # packed projections
        ("norm", "input_layernorm", 1),
        ("attention", "self_attn.qkv_proj", 1),
        ("norm", "post_attention_layernorm", 1),
        ("gated", "mlp.gate_up_proj", 1),
    ],
    "Gemma 3": [  # 1 + w, norms of heads, norms after
        ("norm", "input_layernorm", 3),
        ("attention", "self_attn.v_proj", 1),
        ("norm", "pre_feedforward_layernorm", 2),
        ("gated", "mlp.up_proj", 1),
    ],
    "GPT-NeoX": [  # rows of q, k and v by turns; GELU lets no scale through
        ("norm", "input_layernorm", 1),
        ("attention", "attention.query_key_value", 1),
        ("norm", "post_attention_layernorm", 1),
    ],
    "Cohere": [  # one norm for attention and MLP, q and k turned
        ("norm", "input_layernorm", 5),
        ("attention", "self_attn.v_proj", 1),
        ("gated", "mlp.up_proj", 1),
    ],
    "OPT": [  # ReLU lets scales through
        ("norm", "self_attn_layer_norm", 3),
        ("attention", "self_attn.v_proj", 1),
        ("norm", "final_layer_norm", 1),
        ("linear", "fc1", 1),
    ],
    "OLMo 2": [("attention", "self_attn.v_proj", 1), ("gated", "mlp.up_proj", 1)],  # norms after linears only
    "GPT-2": [  # weights stored by input channels
        ("norm", "ln_1", 1),
        ("attention", "attn.c_attn", 1),
        ("norm", "ln_2", 1),
    ],
}
QUICK = ("Phi-3", "Gemma 3")


def opened(folder: Path, dtype: str = "f16") -> Module:
    module = import_model(folder, dtype=dtype, positions=IDS.shape[1])
    run_pipeline(module, "to-ty")
    return module


def logits(module: Module, folder: Path) -> npt.NDArray[np.float32]:
    (out,) = run_function(module, "main", (IDS, np.arange(IDS.shape[1])[None]), CheckpointReader(folder))
    return out.astype(np.float32)


def folded(module: Module, table: AwqTable, folder: Path) -> Module:
    path = folder / "awq.safetensors"
    table.save(path)
    copy = module.clone()
    run_pipeline(copy, f"awq-fold{{table={path}}}")
    return copy


def relative(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


LIMITS = {"f32": 1e-5, "f16": 4e-3}


def cases() -> list[Any]:
    """All models in both types; the quick ones in f32, where nothing but the folding differs."""
    quick = {(name, "f32") for name in QUICK}
    every = [(name, dtype) for name in CASES if name not in REFUSED for dtype in LIMITS]
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("name", "dtype"), cases())
def test_folding_changes_nothing(
    save_model: Callable[..., Path], tmp_path: Path, name: str, dtype: str
) -> None:
    """Scales of 1/4 to 4 on all groups: exact but for rounding, in f32 and in f16."""
    model_type, config = CASES[name]
    folder = save_model(model_type, dtype="float32", **config)
    module = opened(folder, dtype)
    groups = scale_groups(module)
    found = [(g.kind, g.producer.split(".1.")[-1], len(g.readers)) for g in groups if g.layer == 1]
    assert found and found == GROUPS.get(name, found)
    after = folded(module, random_table(module, SETTINGS), tmp_path)
    assert print_op(after) != print_op(module)
    assert relative(logits(after, folder), logits(module, folder)) < LIMITS[dtype]


@pytest.fixture(scope="module")
def llama16(save_model: Callable[..., Path]) -> tuple[Path, Module]:
    """A Llama stored in f32, and its module, which is not to be changed."""
    folder = save_model("llama", dtype="float32")
    return folder, opened(folder)


def test_what_the_table_names_is_folded(llama16: tuple[Path, Module], tmp_path: Path) -> None:
    folder, module = llama16
    once = folded(module, random_table(module, SETTINGS), tmp_path)
    (tmp_path / "second").mkdir()
    table = AwqTable(SETTINGS, {"model.layers.0.input_layernorm": np.full(64, 2, np.float32)})
    only = folded(module, table, tmp_path / "second")
    text = print_op(only)
    assert text.count("ty.divide_channels") == 1 and text.count("ty.multiply_channels") == 3
    assert relative(logits(only, folder), logits(module, folder)) < 4e-3
    assert print_op(once).count("ty.divide_channels") == 8  # 2 layers of 4 producers


def test_ranges_clamp_after_scaling(llama16: tuple[Path, Module], tmp_path: Path) -> None:
    folder, module = llama16
    path = "model.layers.0.mlp.down_proj"
    scale = np.linspace(0.5, 2, 112, dtype=np.float32)
    bounds = np.stack([np.full((64, 7), -0.01), np.full((64, 7), 0.02)]).astype(np.float32)
    table = AwqTable(SETTINGS, {"model.layers.0.mlp.up_proj": scale}, {path: bounds})
    after = folded(module, table, tmp_path)
    weight = np.asarray(stored(folder, f"{path}.weight"))
    wanted = np.clip(weight * scale, -0.01, 0.02).astype(np.float16)
    assert np.array_equal(operand_of(after, path, folder), wanted)
    assert (wanted == np.float16(0.02)).any() and (wanted == np.float16(-0.01)).any()


def stored(folder: Path, name: str) -> npt.NDArray[np.float32]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")[name]


def operand_of(module: Module, path: str, folder: Path) -> npt.NDArray[np.float16]:
    """The weight of a linear as the interpreter computes it."""
    from tyir.dialects.ty import Linear
    from tyir.layers import path_of

    linear = next(op for op in module.walk_type(Linear) if path_of(op) == path)
    seen = {}

    def probe(stack: object, op: object, results: tuple[npt.NDArray[np.float16], ...]) -> None:
        if op is linear.weight.op:
            seen[path] = results[0]

    args = (IDS, np.arange(IDS.shape[1])[None])
    run_function(module, "main", args, CheckpointReader(folder), probe=probe)
    return seen[path]


# ------------------------------------------------------------------------------------------------- refusals

NORM, UP = "model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"
ONES = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("table", "message", "cure"),
    [
        (
            AwqTable(SETTINGS, {"model.layers.0.input_layernorn": ONES}),
            "'model.layers.0.input_layernorn.scale' belongs to 'model.layers.0.input_layernorn', which the"
            " model does not have",
            "did you mean 'model.layers.0.input_layernorm'",
        ),
        (
            AwqTable(SETTINGS, {"model.layers.0.mlp.gate_proj": np.ones(112, np.float32)}),
            "whose channels cannot be scaled: something else than linears reads them",
            "",
        ),
        (AwqTable(SETTINGS, {NORM: np.ones(63, np.float32)}), "has 63 scales", "of this model"),
        (
            AwqTable(SETTINGS, {}, {NORM: np.zeros((2, 64, 4), np.float32)}),
            "which is not a linear",
            "ranges are for linears",
        ),
        (
            AwqTable(SETTINGS, {}, {UP: np.zeros((2, 112, 5), np.float32)}),
            "has shape [2, 112, 5], the 112x64 weight of model.layers.0.mlp.up_proj in groups of 16 needs"
            " [2, 112, 4]",
            "of this model",
        ),
        (
            AwqTable(AwqSettings(model_type="qwen2"), {NORM: ONES}),
            "was made for a model of type 'qwen2', this one is 'llama'",
            "of this model",
        ),
    ],
)
def test_a_table_that_does_not_fit(
    llama16: tuple[Path, Module], tmp_path: Path, table: AwqTable, message: str, cure: str
) -> None:
    _, module = llama16
    with pytest.raises(TyirError) as caught:
        folded(module, table, tmp_path)
    assert message in str(caught.value) and cure in str(caught.value)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("awq-fold{table=TABLE}", "has an AWQ table folded in already"),
        ("quantize-weights{group-size=16}", "quantised already"),
    ],
)
def test_a_table_is_folded_in_once_and_first(
    llama16: tuple[Path, Module], tmp_path: Path, before: str, message: str
) -> None:
    module = llama16[1].clone()
    path = tmp_path / "awq.safetensors"
    AwqTable(SETTINGS, {NORM: ONES}).save(path)
    with pytest.raises(TyirError, match=message):
        run_pipeline(module, f"{before.replace('TABLE', str(path))},awq-fold{{table={path}}}")


def test_a_table_by_another_name_and_none(llama16: tuple[Path, Module], tmp_path: Path) -> None:
    module = llama16[1].clone()
    with pytest.raises(TyirError, match=r"does not end in \.safetensors"):
        run_pipeline(module, f"awq-fold{{table={tmp_path / 'awq.bin'}}}")
    with pytest.raises(TyirError, match="needs a table"):
        run_pipeline(module, "awq-fold")
    with pytest.raises(TyirError, match="cannot read the AWQ table"):
        run_pipeline(module, f"awq-fold{{table={tmp_path / 'awq.safetensors'}}}")
