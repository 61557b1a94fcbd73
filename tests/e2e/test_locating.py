"""A deliberately broken pass is found: the layer and the op, on the right die."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tyir.dialects import kv, ty
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.layers import path_of
from tyir.manifest import BuildOptions
from tyir.parser import parse_file
from tyir.pipeline import Pass, PassContext, run_pipeline
from tyir.printer import print_op
from tyir.tools.api import compile_path
from tyir.tools.verify.locate import locate

IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900]


@dataclass(frozen=True)
class SwapMlp(Pass):
    """On die 1, layer 3: gate and up exchanged in the activation."""

    def run(self, op: Op, context: PassContext) -> None:
        (target,) = [s for s in die(op, 1).walk_type(ty.SiluMul) if path_of(s) == "model.layers.3.mlp"]
        target.operands = (target.up, target.gate)


@dataclass(frozen=True)
class WrongScale(Pass):
    """On every die, layer 2: attention scores scaled wrongly."""

    def run(self, op: Op, context: PassContext) -> None:
        for attention in op.walk_type(kv.CachedAttention):
            if path_of(attention) == "model.layers.2.self_attn":
                attention.scale = attention.scale * 4


@dataclass(frozen=True)
class WrongSlice(Pass):
    """On die 0, layer 1: the rows of the up projection cut one unit too late."""

    def run(self, op: Op, context: PassContext) -> None:
        for linear in die(op, 0).walk_type(ty.Linear):
            if path_of(linear) == "model.layers.1.mlp.up_proj":
                cut = linear.weight.op
                assert isinstance(cut, ty.Slice)
                cut.offset = cut.offset + 128


@dataclass(frozen=True)
class WrongEpsilon(Pass):
    """On every die, layer 0: the norm divides by more than it should, which turns none of its rows."""

    def run(self, op: Op, context: PassContext) -> None:
        for norm in op.walk_type(ty.RmsNorm):
            if path_of(norm) == "model.layers.0.input_layernorm":
                norm.eps = 1e-3


def die(module: Op, number: int) -> Module:
    assert isinstance(module, Module)
    found = module.lookup(f"die{number}")
    assert isinstance(found, Module)
    return found


@pytest.mark.parametrize(
    ("fault", "layer", "op", "path", "dies"),
    [
        (SwapMlp(), 3, "ty.silu_mul", "model.layers.3.mlp", (1,)),
        (WrongScale(), 2, "kv.attention", "model.layers.2.self_attn", (0, 1)),
        (WrongEpsilon(), 0, "ty.rms_norm", "model.layers.0.input_layernorm", (0, 1)),
        (WrongSlice(), 1, "ty.linear", "model.layers.1.mlp.up_proj", (0,)),
    ],
)
def test_a_broken_pass_is_located(
    imported: Path,
    model: Path,
    tmp_path: Path,
    fault: Pass,
    layer: int,
    op: str,
    path: str,
    dies: tuple[int, ...],
) -> None:
    module = parse_file(imported)
    run_pipeline(module, "to-ty,kv-materialize{max-kv=32},partition-dies{dies=2}")
    fault.run(module, PassContext())
    (tmp_path / "broken.ir").write_text(print_op(module))
    folder = compile_path(
        tmp_path / "broken.ir", tmp_path / "out", BuildOptions(dies=2, seqlens=(1, 8), max_kv=32)
    )
    found = locate(folder, model, IDS)
    assert found is not None
    assert (found.layer, found.op, found.path, found.dies) == (layer, op, path, dies)
    assert "modeling_qwen2.py" in found.source or op == "ty.linear"


def test_a_correct_compile_has_no_divergence(imported: Path, model: Path, tmp_path: Path) -> None:
    folder = compile_path(
        imported, tmp_path / "out", BuildOptions(dies=3, seqlens=(1, 8), max_kv=32, weights="int4")
    )
    assert locate(folder, model, IDS) is None


@pytest.mark.parametrize("fault", [False, True])
def test_caches_that_are_cut_by_tokens(imported: Path, model: Path, tmp_path: Path, fault: bool) -> None:
    """What a die's own keys come to is nobody's result; what is merged is attention's."""
    module = parse_file(imported)
    cut = "partition-dies{dies=3 kv-split=tokens kv-block=16}"
    run_pipeline(module, f"to-ty,kv-materialize{{max-kv=64}},{cut}")
    if fault:
        WrongScale().run(module, PassContext())
    (tmp_path / "cut.ir").write_text(print_op(module))
    folder = compile_path(tmp_path / "cut.ir", tmp_path / "out", {"seqlens": (1, 8)})
    found = locate(folder, model, [*IDS, *IDS])
    assert (found is not None) == fault
    if found is not None:
        assert (found.layer, found.op, found.dies) == (2, "kv.merge_attention", (0, 1, 2))
