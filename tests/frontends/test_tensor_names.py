"""Names that differ from the model's by a prefix: which rule is found, and that nothing else is renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.checkpoint import Checkpoint, StoredTensor
from tyir.frontends.dense_state import dense_state
from tyir.frontends.huggingface import open_model
from tyir.frontends.tensor_names import with_model_names
from tyir.types import TensorType, f16

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")
NAMES = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(12) for part in PARTS),
]


def aliases(tied: bool) -> dict[str, tuple[str, ...]]:
    """As the front end gives them: a parameter of the decoder may be stored without its beginning."""
    found = {n: (n, n.removeprefix("model.")) if n.startswith("model.") else (n,) for n in NAMES}
    if tied:
        both = (*found["model.embed_tokens.weight"], "lm_head.weight")
        found["model.embed_tokens.weight"] = found["lm_head.weight"] = both
    return found


def renamed(names: list[str], tied: bool = False) -> tuple[dict[str, str] | Diagnostic, list[str]]:
    """New name of each stored name (or the problem), and the warnings."""
    stored = {n: StoredTensor(n, "a", TensorType((1,), f16), 0, 2) for n in names}
    notes: list[Diagnostic] = []
    found = with_model_names(Checkpoint(Path("a"), {}, stored, {}), aliases(tied), notes.append)
    if isinstance(found, Diagnostic):
        return found, []
    assert len(found.tensors) == len(names)
    return {t.key: name for name, t in found.tensors.items()}, [n.message for n in notes]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: f"_orig_mod.{n}", "'_orig_mod.' at the beginning is left out"),
        (lambda n: f"module.{n}", "'module.' at the beginning is left out"),
        (lambda n: f"_orig_mod.module.{n}", "'_orig_mod.module.' at the beginning is left out"),
        (lambda n: f"base_model.model.{n}", "'base_model.model.' at the beginning is left out"),
        (lambda n: f"language_model.{n}", "'language_model.' at the beginning is left out"),
        (lambda n: n.replace("model.", "model.language_model.", 1), "'model.language_model.' at the"),
        (lambda n: n.replace("model.", "transformer.", 1), "'transformer.' at the beginning is left out"),
        (lambda n: n.replace(".self_attn", "._orig_mod.self_attn"), "'_orig_mod.' is left out"),
        (lambda n: n.replace("_proj.", "_proj.base_layer."), "'base_layer.' is left out"),
        (lambda n: n.replace("layers.", "layers._fsdp_wrapped_module."), "'_fsdp_wrapped_module.' is left"),
    ],
)
def test_one_rule(change: Callable[[str], str], words: str, tied: bool) -> None:
    names = [n for n in NAMES if not (tied and n == "lm_head.weight")]
    found, notes = renamed([change(n) for n in names], tied)
    assert isinstance(found, dict)
    assert {found[change(n)] for n in names} <= {a for group in aliases(tied).values() for a in group}
    assert all(found[change(n)].endswith(n.removeprefix("model.")) for n in names)
    assert words in notes[0] and len(notes) == 1


def test_names_that_fit_are_left_alone() -> None:
    for names in (NAMES, [n.removeprefix("model.") for n in NAMES], [*NAMES, "module.step", "ema.x.weight"]):
        found, notes = renamed(names)
        assert isinstance(found, dict) and all(a == b for a, b in found.items()) and not notes


def test_packed_tensors_and_two_rules() -> None:
    packed = [f"m.{n.removesuffix('weight')}{p}" for n in NAMES[3:] for p in ("qweight", "scales")]
    found, notes = renamed([*NAMES[:3], *packed])
    assert isinstance(found, dict) and all(found[p] == p.removeprefix("m.") for p in packed)
    both = ["module." + n.removeprefix("model.") for n in NAMES]
    found, notes = renamed(both)
    assert isinstance(found, dict) and found["module.lm_head.weight"] == "lm_head.weight"
    assert all(v in {a for group in aliases(False).values() for a in group} for v in found.values())
    assert notes


def test_wrappers_within_and_a_beginning() -> None:
    """What PEFT has put around some linears, of a model that it stands around: neither rule is enough."""
    names = [n.replace("q_proj.", "q_proj.base_layer.") for n in NAMES]
    found, notes = renamed([f"base_model.model.{n}" for n in names])
    assert isinstance(found, dict)
    assert all(
        found[f"base_model.model.{new}"].endswith(n.removeprefix("model.")) for n, new in zip(NAMES, names)
    )
    assert any("'base_layer.' is left out" in n for n in notes)


def test_tensors_stored_twice_are_not_chosen_among() -> None:
    found, _ = renamed([*(f"ema.{n}" for n in NAMES), *(f"student.{n}" for n in NAMES)])
    assert isinstance(found, Diagnostic)
    assert "stored more than once" in found.message
    assert "'ema.'" in found.message and "'student.'" in found.message
    assert found.help is not None and "rename=" in found.help and "--model-plugin" in found.help


def test_names_of_another_model_are_not_taken() -> None:
    """Neither a layer for another one, nor what has only its last part in common."""
    found, notes = renamed([f"h.{i}.attn.c_attn.weight" for i in range(4)])
    assert isinstance(found, dict) and all(a == b for a, b in found.items()) and not notes
    some = [n for n in NAMES if ".layers.3." not in n]
    found, notes = renamed([f"x.{n}" for n in some])
    assert isinstance(found, dict) and set(found.values()) == set(some)


def test_a_checkpoint_saved_from_a_wrapper(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """The whole way, with tensors that are missing as well: what is then wrong is said of the right names."""
    from safetensors.numpy import load_file, save_file

    plain = save_model("qwen2", dtype="float16", intermediate_size=128)
    wanted = dict(dense_state(plain))
    for kind in ("plain", "gptq"):
        folder = tmp_path / kind
        if kind == "plain":
            shutil.copytree(plain, folder)
        else:
            write_quantized(plain, folder, KINDS[kind])
        expected = dict(dense_state(folder))
        tensors = {f"_orig_mod.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors")
        found = dict(dense_state(folder))
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[n], expected[n]) for n in wanted)
    del tensors["_orig_mod.model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TyirError, match=r"lacks 1 of the model's 27 tensors: model\.norm\.weight") as caught:
        open_model(folder, "f16")
    assert "no place for" not in str(caught.value)


def test_verification_does_not_ask_transformers_for_names_it_does_not_know(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers would give renamed parameters random values: the reference is filled by us."""
    from safetensors.numpy import load_file, save_file

    from tyir.manifest import BuildOptions
    from tyir.tools.verify.compare import Reference

    plain = save_model("llama", dtype="float16")
    folder = Path(shutil.copytree(plain, tmp_path / "wrapped"))
    tensors = {f"module.{n}": t for n, t in load_file(plain / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    options = replace(BuildOptions(), max_kv=16, seqlens=(1,), dies=1)
    wanted, _ = Reference(plain, options).run([5, 6, 7])
    got, _ = Reference(folder, options).run([5, 6, 7])
    assert np.array_equal(got, wanted)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_an_adapter_that_is_not_merged(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """The state of a PEFT model holds no scale of its factors: said once, with what to do; never left out."""
    from safetensors.numpy import load_file, save_file

    plain = save_model("llama", dtype="float16")
    for kind in ("factors", "whole"):
        folder = Path(shutil.copytree(plain, tmp_path / kind))
        tensors = {f"base_model.model.{n}": t for n, t in load_file(plain / "model.safetensors").items()}
        if kind == "factors":
            for i in range(2):
                module = f"base_model.model.model.layers.{i}.self_attn.q_proj"
                weight = tensors.pop(f"{module}.weight")
                tensors[f"{module}.base_layer.weight"] = weight
                tensors[f"{module}.lora_A.default.weight"] = weight[:4].copy()
                tensors[f"{module}.lora_B.default.weight"] = weight[:, :4].copy()
        else:
            head = tensors.pop("base_model.model.lm_head.weight")
            tensors["base_model.model.lm_head.original_module.weight"] = head
            tensors["base_model.model.lm_head.modules_to_save.default.weight"] = head + 1
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(TyirError, match="tensors of an adapter that is not merged") as caught:
            open_model(folder, "f16")
        (only,) = caught.value.diagnostics
        assert only.help is not None and "merge_and_unload" in only.help
