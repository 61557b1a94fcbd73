"""Checkpoints in LLaVA's own format are the models that transformers has: same programs, same weights."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends.llava_folders import (
    END,
    PATCH,
    START,
    Folders,
    in_own_layout,
    save_random_llava,
    tensors_of,
)
from tests.frontends.pictures import LLAVA, MODELS, drawn_patches, reference, tower_outputs
from tyir.artifacts.json_attributes import to_json
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.execution.artifacts import Artifacts
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import dense_state
from tyir.frontends.huggingface import import_model, open_model
from tyir.frontends.plugin import ModelPlugin
from tyir.interpreter import run_function
from tyir.manifest import BuildOptions
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.runtime_sim.vision.session import VisionSession
from tyir.tools.api import build_and_compile_vlm
from tyir.tools.estimate.plan import make_plan
from tyir.tools.run.turns import Turns
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.tyir_compile import main as compile_main
from tyir.tools.tyir_import import main as import_main
from tyir.tools.tyir_verify import main as verify_main
from tyir.tools.verify.pictures import drawn_picture
from tyir.vision.graphs import graphs_of
from tyir.vision.sizes import SquareGeometry

SIDE = 56


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`make(projector, marks)`: a random model in both layouts."""

    @cache
    def made(projector: str, marks: bool = False, whole_clip: bool = False, rows: str = "default") -> Folders:
        changes = {"vision_feature_select_strategy": rows}
        hf = save_random_llava(tmp_path_factory.mktemp("hf"), projector, marks, **changes)
        return in_own_layout(hf, tmp_path_factory.mktemp("own"), whole_clip=whole_clip)

    return made


def own_module(folders: Folders, side: int = SIDE, **options: Any) -> Module:
    plugin = ModelPlugin(vision_tower=folders.tower)
    return import_model(folders.own, dtype="f32", images=[(side, side)], plugin=plugin, **options)


def state_of(folders: Folders, base: Path | None = None) -> dict[str, Any]:
    return dict(dense_state(folders.own, ModelPlugin(vision_tower=folders.tower), base))


@pytest.mark.parametrize(
    ("projector", "marks", "whole", "strategy"),
    [("gelu", False, True, "default"), ("linear", True, False, "default"), ("gelu", False, False, "full")],
    ids=["1.5", "v1 with marks", "with the class token"],
)
def test_it_computes_what_transformers_does(
    projector: str, marks: bool, whole: bool, strategy: str, make: Any
) -> None:
    import torch

    folders = make(projector, marks, whole, strategy)
    module = own_module(folders)
    run_pipeline(module, "to-ty")
    reader, (rows, columns) = CheckpointReader(folders.own), (4, 4)
    patches = drawn_patches(folders.hf, (rows, columns))
    (wanted,) = tower_outputs(folders.hf, patches, (rows, columns))
    (found,) = run_function(module, f"visual_{SIDE}x{SIDE}", [patches], reader)
    assert len(wanted) == 16 + (strategy == "full")
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)
    ids = np.arange(2, 19)[None]
    (logits,) = run_function(module, "main", [ids, np.arange(ids.size)[None]], reader)
    with torch.no_grad():
        plain = reference(folders.hf)(input_ids=torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, plain, atol=3e-5 * np.abs(plain).max(), rtol=0)
    said = to_json(module.attributes["tyir.vision"])["ids"]
    assert said["image"] == (PATCH if marks else 0)
    assert (said.get("start"), said.get("end")) == ((START, END) if marks else (None, None))


def test_the_trained_model_is_the_same_module(tmp_path: Path) -> None:
    """The same functions of the same weights, as transformers' layout of tiny-llava gives them."""
    folders = in_own_layout(LLAVA, tmp_path)
    mine = own_module(folders, 126)
    theirs = import_model(LLAVA, dtype="f32", images=[(126, 126)])
    assert {print_op(f) for f in graphs_of(mine).values()} == {
        print_op(f) for f in graphs_of(theirs).values()
    }
    assert to_json(mine.attributes["tyir.vision"]) == to_json(theirs.attributes["tyir.vision"])
    wanted = dict(dense_state(LLAVA))
    found = state_of(folders)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_tower_of_pytorch_files_and_weights_trained_with_the_rest(make: Any, tmp_path: Path) -> None:
    """The hub has CLIP as pytorch_model.bin; a tower inside the folder is the one that was trained."""
    import torch
    from safetensors.torch import save_file

    folders = make("gelu")
    wanted = state_of(folders)
    tower = tmp_path / "clip"
    shutil.copytree(folders.tower, tower)
    tensors = tensors_of(tower)
    (tower / "model.safetensors").unlink()
    torch.save(tensors, tower / "pytorch_model.bin")
    found = state_of(Folders(folders.own, tower, folders.hf))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    own = tmp_path / "llava"
    shutil.copytree(folders.own, own)
    trained = {f"model.vision_tower.vision_tower.{name}": 2 * t for name, t in tensors.items()}
    save_file({**tensors_of(own), **trained}, own / "model.safetensors")
    found = state_of(Folders(own, tower, folders.hf))
    for name, array in wanted.items():
        assert np.array_equal(found[name], array * (2 if "vision_tower" in name else 1)), name


# ---------------------------------------------------------------------------------------------------- deltas


def split_into_delta(folders: Folders, out: Path, rows: int) -> tuple[Folders, Path]:
    """The model as a delta and its base: a Llama whose vocabulary lacks the last `rows` tokens."""
    import torch
    from safetensors.torch import save_file

    base, own = out / "llama", out / "llava-delta"
    shutil.copytree(folders.own, own)
    base.mkdir()
    torch.manual_seed(1)
    config = json.loads((own / "config.json").read_text())
    delta, llama = {}, {}
    for name, tensor in tensors_of(folders.own).items():
        if "mm_projector" in name:
            delta[name] = tensor
            continue
        fewer = len(tensor) - rows * name.endswith(("embed_tokens.weight", "lm_head.weight"))
        llama[name] = torch.randn_like(tensor[:fewer])
        delta[name] = tensor.clone()
        delta[name][:fewer] -= llama[name]
    save_file(delta, own / "model.safetensors", metadata={"format": "pt"})
    save_file(llama, base / "model.safetensors", metadata={"format": "pt"})
    text = {k: v for k, v in config.items() if not k.startswith(("mm_", "tune_", "freeze_", "use_mm"))}
    text |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (base / "config.json").write_text(json.dumps({**text, "vocab_size": config["vocab_size"] - rows}))
    return Folders(own, folders.tower, folders.hf), base


def test_a_delta_is_added_to_its_base(make: Any, tmp_path: Path) -> None:
    """As apply_delta.py adds it: the first rows of a vocabulary that has grown, the projector not at all."""
    folders = make("linear", True)
    delta, base = split_into_delta(folders, tmp_path, 3)
    stored, llama = tensors_of(delta.own), tensors_of(base)
    found, plain = state_of(delta, base), state_of(folders)
    assert found.keys() == plain.keys()
    for name, array in found.items():
        old = name.replace("model.language_model.", "model.")
        if old not in llama:
            assert np.array_equal(array, plain[name]), name
            continue
        wanted = stored[old].float().numpy()
        wanted[: len(llama[old])] += llama[old].float().numpy()
        assert np.array_equal(array, wanted), name
    patches = drawn_patches(folders.hf, (4, 4))
    module, whole = own_module(delta, base=base), own_module(folders)
    ids, positions = np.arange(290, 308)[None], np.arange(18)[None]
    logits = []
    for each, folder in ((module, delta.own), (whole, folders.own)):
        run_pipeline(each, "to-ty")
        reader = CheckpointReader(folder)
        logits.append(run_function(each, "main", [ids, positions], reader)[0])
        logits.append(run_function(each, f"visual_{SIDE}x{SIDE}", [patches], reader)[0])
    # the delta is rounded to f16, as published ones are
    np.testing.assert_allclose(logits[0], logits[2], atol=2e-2 * np.abs(logits[2]).max(), rtol=0)
    assert np.array_equal(logits[1], logits[3])
    options = BuildOptions(dies=1, seqlens=(1,), max_kv=64)
    plans = [
        make_plan(f.own, options, images=[(SIDE, SIDE)], base=b, vision_tower=f.tower)
        for f, b in ((delta, base), (folders, None))
    ]
    assert plans[0].dies == plans[1].dies


def test_bases_that_are_not_a_deltas(make: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    delta, base = split_into_delta(make("linear", True), tmp_path, 3)
    tensors = tensors_of(base)
    fewer = {name: t for name, t in tensors.items() if "layers.1.mlp" not in name}
    save_file(fewer, base / "model.safetensors")
    assert "3 tensors of the language model are in one of them alone" in refusal(delta, base=base)
    wider = {name: t.repeat(2, *[1] * (t.dim() - 1)) for name, t in tensors.items()}
    save_file(wider, base / "model.safetensors")
    assert "'base.model.language_model.embed_tokens.weight' has shape [634, 96]" in refusal(delta, base=base)


# ------------------------------------------------------------------------------------------------- refusals


def refusal(folders: Folders, tower: bool = True, **options: Any) -> str:
    with pytest.raises(TyirError) as raised:
        open_model(
            folders.own, "f16", plugin=ModelPlugin(vision_tower=folders.tower if tower else None), **options
        )
    return str(raised.value)


OWN: dict[str, tuple[dict[str, Any], str]] = {
    "siglip": ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "which is no CLIP model"),
    "merge": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type 'spatial_unpad': pictures are"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres': pictures are cut into tiles"),
    "language": ({"architectures": ["LlavaMptForCausalLM"]}, "another language model than Llama"),
    "wide": ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, the tower in .* has hidden_size 64"),
    "projector": ({"mm_projector_type": "ldpnet"}, "mm_projector_type is 'ldpnet'"),
    "no name": ({"mm_projector_type": ["linear"]}, r"mm_projector_type is \"\['linear'\]\""),
    "resampler": ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
    "trained tower": ({"unfreeze_mm_vision_tower": True}, "trained with the rest, and the folder lacks it"),
    "rows of the tower": (
        {"mm_vision_select_feature": "cls"},
        "is 'cls', which is neither patch nor cls_patch",
    ),
    "no layer": ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None"),
    "layer": ({"mm_vision_select_layer": -9}, "mm_vision_select_layer is -9"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "weights of this LLaVA are quantised"),
    "marks": ({"mm_use_im_start_end": True}, "the tokenizer in .* lacks <im_start> and <im_end>"),
    "rows": ({"vocab_size": 0}, "<unk> is token 0, the embedding has 0 rows"),
}


@pytest.mark.parametrize("what", OWN)
def test_what_is_not_built_here(what: str, make: Any, tmp_path: Path) -> None:
    changes, wanted = OWN[what]
    folders = in_own_layout(make("gelu").hf, tmp_path, **changes)
    said = refusal(folders)
    assert re.search(wanted, said)
    assert "help: " in said
    if what in ("siglip", "merge", "tiles", "language"):  # nobody looks for a tower in vain
        assert re.search(wanted, refusal(folders, tower=False))


def test_towers_that_are_not_there_or_not_the_models(make: Any, tmp_path: Path) -> None:
    folders = in_own_layout(make("gelu").hf, tmp_path)
    said = refusal(folders, tower=False)
    assert "lacks its vision tower: openai/clip-vit-large-patch14-336" in said and "--vision-tower" in said
    said = refusal(Folders(folders.own, MODELS / "tiny-qwen2", folders.hf))
    assert "a model of type 'qwen2', not a CLIP model" in said
    with pytest.raises(TyirError, match="is not in LLaVA's own format"):
        open_model(LLAVA, "f16", plugin=ModelPlugin(vision_tower=folders.tower))
    with pytest.raises(TyirError, match="is not in LLaVA's own format"):
        make_plan(LLAVA, BuildOptions(), vision_tower=folders.tower)
    (folders.tower / "preprocessor_config.json").unlink()
    with pytest.raises(TyirError, match=r"clip does not say how its pictures are prepared"):
        own_module(folders)
    config = json.loads((folders.tower / "config.json").read_text())
    del config["patch_size"]
    (folders.tower / "config.json").write_text(json.dumps(config))
    assert "does not say patch_size of the tower" in refusal(folders)
    (folders.own / "tokenizer.json").unlink()
    (folders.tower / "config.json").write_text(json.dumps({**config, "patch_size": 14}))
    assert "holds no tokenizer that knows <im_patch>, <image> or <unk>" in refusal(folders)


def test_an_adapter_of_such_a_model_is_refused(make: Any, tmp_path: Path) -> None:
    """Over the Llama that its config names it would be a model of text, without a word."""
    folders = make("gelu")
    (tmp_path / "config.json").write_bytes((folders.own / "config.json").read_bytes())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    (tmp_path / "adapter_model.safetensors").write_bytes((folders.own / "model.safetensors").read_bytes())
    adapter = Folders(tmp_path, folders.tower, folders.hf)
    assert "adapter is of a LLaVA in its own format" in refusal(
        adapter, tower=False, base=MODELS / "tiny-qwen2"
    )


# --------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize("projector", ["gelu", "linear"])
def test_a_plan_counts_the_parameters_that_are_kept(projector: str, make: Any) -> None:
    folders = make(projector, projector == "linear")
    plan = make_plan(
        folders.own,
        BuildOptions(dies=1, seqlens=(1,), max_kv=64),
        images=[(SIDE, SIDE)],
        vision_tower=folders.tower,
    )
    assert plan.tower is not None
    state = state_of(folders)
    kept = {n: w for n, w in state.items() if "vision_tower" in n or "projector" in n}
    unused = ("encoder.layers.2.", "post_layernorm")  # behind the state that is used
    assert plan.tower.parameters == sum(w.size for n, w in kept.items() if not any(u in n for u in unused))
    assert [p.size.tokens for p in plan.pictures] == [16]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifacts of tiny-llava in LLaVA's layout are, byte by byte, those of transformers' layout."""
    folders = in_own_layout(LLAVA, tmp_path, image_aspect_ratio="square")
    options = ["--dies", "1", "--seqlens", "1,16", "--max-kv", "192", "--image", "126x126", "-q"]
    tower = ["--vision-tower", str(folders.tower)]
    assert compile_main([str(folders.own), "-o", str(tmp_path / "a"), *options, *tower]) == 0
    assert compile_main([str(LLAVA), "-o", str(tmp_path / "b"), *options]) == 0
    mine, theirs = (tmp_path / name / "1die" for name in "ab")
    said = {"config.json", "manifest.json", "processor_config.json", "preprocessor_config.json"}
    names = {f.relative_to(theirs) for f in theirs.rglob("*") if f.is_file()}
    for name in names:
        if name.name not in said:
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name
    file = str(tmp_path / "llava.ir")
    assert import_main([str(folders.own), "-o", file, "--image", "126x126", *tower]) == 0
    assert compile_main([file, "-o", str(tmp_path / "c"), *options[:-3], "-q"]) == 0
    for name in {f.relative_to(mine) for f in mine.rglob("*") if f.is_file()}:
        assert (tmp_path / "c" / "1die" / name).read_bytes() == (mine / name).read_bytes(), name
    assert compile_main([file, "-o", str(tmp_path / "c"), *options[:-3], *tower]) == 1
    amount = ["--prompts", "1", "--tokens", "4"]
    assert verify_main([str(mine), "--against", str(folders.own), *tower, *amount]) == 0
    capsys.readouterr()
    assert verify_main([str(mine), "--against", str(folders.own), *amount]) == 1
    assert "with --vision-tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("projector", "rows"), [("gelu", "default"), ("linear", "default"), ("gelu", "full")]
)
def test_a_question_about_a_picture(projector: str, rows: str, make: Any, tmp_path: Path) -> None:
    """Its rows, one for each patch and one for a class token that config.json asks for, take the place of
    <unk>, or of <im_patch> between the marks of its begin and end; pictures are padded where config.json says
    so; what comes out is what transformers computes.
    """
    marks, count = projector == "linear", 16 + (rows == "full")
    hf = make(projector, marks, rows=rows).hf
    folders = in_own_layout(hf, tmp_path, image_aspect_ratio="pad")
    out = build_and_compile_vlm(
        folders.own, tmp_path / "out", 448, [16], 1, [(SIDE, SIDE)], vision_tower=folders.tower
    )
    artifacts = Artifacts.open(out)
    turns = Turns(VisionSession(artifacts), load_tokenizer(artifacts))
    assert turns.preprocessor is not None
    geometry = turns.preprocessor.image_settings.geometry
    assert isinstance(geometry, SquareGeometry) and geometry.pad
    request = turns.ask("the old house", shown=[drawn_picture(40, 90)]).given
    assert isinstance(request, VisionRequest)
    row = [PATCH if marks else 0] * count
    text = turns.tokenizer.decode(request.ids).replace(" ", "")
    place = "<im_start>" + "<im_patch>" * count + "<im_end>" if marks else "<unk>" * count
    assert f"USER:{place}\nthe" in text and text.endswith("house" + "ASSISTANT:")
    start = request.ids.index(row[0])
    assert list(request.ids[start : start + count]) == row
    if marks:
        assert (request.ids[start - 1], request.ids[start + count]) == (START, END)
    against = ["--against", str(folders.own), "--vision-tower", str(folders.tower), "--tokens", "3"]
    assert verify_main([str(out), *against]) == 0
