"""LLaVA's own checkpoints (haotian-liu/LLaVA, llava/model/llava_arch.py) as transformers' LLaVA has them.

config.json is a Llama's with mm_* keys, the projector is `model.mm_projector`, and the tower is a CLIP
checkpoint of its own, in a second folder.  Here config and names are translated; all that follows knows one
LLaVA.  A delta (lmsys and LLaVAR publish these) is added to the Llama of a third folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.frontends.checkpoint import CONFIG_FILE, Checkpoint, StoredTensor
from tyir.frontends.weights import with_base
from tyir.text.json_files import read_json_object
from tyir.vision.settings import FILES

__all__ = [
    "in_own_format",
    "is_llava",
    "llava_side_files",
    "not_in_own_format",
    "picture_folder",
    "translated",
    "translated_config",
]

_LLAMA: Final = "LlavaLlamaForCausalLM"
_CONVERT: Final = "take a model that transformers has in its own form (llava-hf/...)"
_RESTORE: Final = "restore config.json of the original model"
# Keys of config.json that say nothing of the language model.
_NOT_LLAMA: Final = re.compile(
    r"(un)?(tune|freeze)_.*|use_mm_.*|mm_.*|image_.*|s2.*|vision_.*|architectures|model_type|auto_map"
    r"|_name_or_path|transformers_version|pad_token_id|tokenizer_.*"
)
_TOWERS: Final = re.compile(r"siglip|eva|dino|convnext|internvit", re.I)
_SIZES: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_PROJECTORS: Final = {None: "linear", "linear": "linear", "mlp2x_gelu": "gelu"}
# Stored names and the model's; what no rule matches keeps its name.
_NAMES: Final = (
    (r"model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1."),
    (r"model\.mm_projector\.(0\.)?(weight|bias)", r"model.multi_modal_projector.linear_1.\2"),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
)
_TOWER: Final = "model.vision_tower."
_CLIP: Final = re.compile(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..*)")
# Which of the tower's rows are a picture's, transformers' name by LLaVA's: "full" has the class token's
# before those of the patches.
_STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}
_FOLLOWS: Final = re.compile(r".*(position_ids|rotary_emb\.inv_freq)")


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of LLaVA's own code; its model_type may be transformers' as well."""
    return "mm_vision_tower" in config or _architecture(config).startswith("LlavaLlama")


def in_own_format(folder: Path) -> bool:
    """Whether a folder holds such a config.json."""
    try:
        return is_llava(read_json_object(folder / CONFIG_FILE, _RESTORE))
    except TyirError:
        return False


def not_in_own_format(folder: Path) -> Diagnostic:
    """What is said of a tower given for another model."""
    return Diagnostic(
        f"{folder} is not in LLaVA's own format, of which alone the tower is a folder of its own",
        help="leave --vision-tower out",
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


# ------------------------------------------------------------------------------------------------ config.json


def translated_config(raw: Mapping[str, Any], folder: Path, tower: Path | None) -> dict[str, Any]:
    """config.json of transformers' LLaVA; `tower` is the folder of the CLIP model.

    `TyirError` lists what is missing, contradicts itself or is not built here.
    """
    if tower is None:
        raise TyirError(_no_tower(raw, folder))
    clip = _clip_config(tower, raw)
    problems = [
        Diagnostic(message, where=str(folder / CONFIG_FILE), help=help)
        for message, help in _contradictions(raw, clip, tower)
    ]
    tokens = {} if problems else _tokens(folder)
    marks: dict[str, int] = {}
    if not problems:
        try:
            marks = _marks(raw, folder, tokens)
        except TyirError as error:
            problems.extend(error.diagnostics)
    if problems:
        raise TyirError(problems)
    text = {key: value for key, value in raw.items() if not _NOT_LLAMA.fullmatch(key)}
    layer, activation = raw["mm_vision_select_layer"], _PROJECTORS[raw.get("mm_projector_type")]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {**clip, "model_type": "clip_vision_model"},
        **marks,
        "projector_hidden_act": activation,
        **({"mm_projector_type": "linear"} if activation == "linear" else {}),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": _STRATEGIES[raw.get("mm_vision_select_feature", "patch")],
        "tie_word_embeddings": raw.get("tie_word_embeddings") is True,
        **{key: raw[key] for key in ("image_aspect_ratio",) if raw.get(key) is not None},
    }


def _no_tower(raw: Mapping[str, Any], folder: Path) -> Diagnostic:
    if (other := _other_model(raw)) is not None:
        return Diagnostic(other[0], where=str(folder / CONFIG_FILE), help=other[1])
    name = str(raw.get("mm_vision_tower") or "a CLIP model")[:100]
    return Diagnostic(
        f"{_architecture(raw)[:100]} is LLaVA's own format, whose folder lacks its vision tower: {name}",
        where=str(folder / CONFIG_FILE),
        help=f"give the folder of {name} with --vision-tower (tyir-import, tyir-compile, tyir-verify), or"
        " take a model that has its tower inside (llava-hf/...)",
    )


def _other_model(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is said of a model that is not built here, and what to do: its config.json alone tells."""
    name, tower = _architecture(raw), str(raw.get("mm_vision_tower"))
    if name != _LLAMA:
        return f"{name[:100]} is LLaVA's own format with another language model than Llama", _CONVERT
    if _TOWERS.search(tower):
        return f"the tower of this LLaVA is {tower[:100]}, which is no CLIP model", _CONVERT
    merge, aspect = raw.get("mm_patch_merge_type"), raw.get("image_aspect_ratio")
    if merge not in (None, "flat") or str(aspect).startswith("anyres") or raw.get("s2") is True:
        said = (
            f"mm_patch_merge_type {str(merge)[:40]!r}" if merge not in (None, "flat")
            else f"image_aspect_ratio {str(aspect)[:40]!r}" if str(aspect).startswith("anyres")
            else "s2 true"
        )  # fmt: skip
        return f"config.json has {said}: pictures are cut into tiles (LLaVA-NeXT), which is not built here", (
            "use a model of one tile: LLaVA-1.5 or earlier"
        )
    return None


def _clip_config(tower: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config of a CLIP checkpoint, whole or its tower alone."""
    name = str(raw.get("mm_vision_tower") or "CLIP")[:100]
    help = f"give the folder of {name} with --vision-tower"
    whole = read_json_object(tower / CONFIG_FILE, help)
    inner = whole.get("vision_config") if whole.get("model_type") == "clip" else whole
    if whole.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(inner, dict):
        kind = str(whole.get("model_type"))[:40]
        raise TyirError(f"--vision-tower {tower} is a model of type {kind!r}, not a CLIP model", help=help)
    if missing := [key for key in _SIZES if type(inner.get(key)) is not int]:
        raise TyirError(
            f"{tower / CONFIG_FILE} does not say {', '.join(missing)} of the tower",
            help="restore the file: another model's sizes would be taken",
        )
    left_out = ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return {key: value for key, value in inner.items() if key not in left_out}


def _contradictions(
    raw: Mapping[str, Any], clip: Mapping[str, Any], tower: Path
) -> Iterator[tuple[str, str]]:
    """What cannot be, or is not built here, each with what to do."""
    if (other := _other_model(raw)) is not None:
        yield other
    if raw.get("quantization_config"):
        yield "config.json says that the weights of this LLaVA are quantised", _CONVERT
    wide = raw.get("mm_hidden_size", clip["hidden_size"])
    if wide != clip["hidden_size"]:
        yield (
            f"mm_hidden_size is {wide}, the tower in {tower} has hidden_size {clip['hidden_size']}",
            f"give the folder of {str(raw.get('mm_vision_tower'))[:100]} with --vision-tower",
        )
    kind = raw.get("mm_projector_type")
    if kind is not None and (not isinstance(kind, str) or kind not in _PROJECTORS):
        yield (
            f"mm_projector_type is {str(kind)[:40]!r}, which is not one of linear, mlp2x_gelu",
            "write a class of transformers' form, and give it with --model-plugin (docs/model-plugin.md)",
        )
    if raw.get("mm_resampler_type") is not None:
        yield (
            f"mm_resampler_type is {str(raw['mm_resampler_type'])[:40]!r}, which is not built here",
            _CONVERT,
        )
    layer, depth = raw.get("mm_vision_select_layer"), clip["num_hidden_layers"]
    if type(layer) is not int or not -depth - 1 <= layer <= depth:
        yield (
            f"mm_vision_select_layer is {str(layer)[:40]}; the tower's states are numbered from -{depth + 1}"
            f" to {depth}",
            _RESTORE,
        )
    if str(feature := raw.get("mm_vision_select_feature", "patch")) not in _STRATEGIES:
        yield (
            f"mm_vision_select_feature is {str(feature)[:40]!r}, which is neither patch nor cls_patch",
            _RESTORE,
        )


# ------------------------------------------------------------------------------------------------- tokens


def _tokens(folder: Path) -> dict[str, int]:
    """Numbers of tokens by their text, as far as the folder's JSON files say."""

    def read(name: str) -> dict[str, Any]:
        return read_json_object(folder / name, "restore the file") if (folder / name).is_file() else {}

    whole, settings = read("tokenizer.json"), read("tokenizer_config.json")
    model, entries = whole.get("model"), whole.get("added_tokens")
    decoder = settings.get("added_tokens_decoder")
    pairs: list[tuple[Any, Any]] = [("<unk>", 0)] if (folder / "tokenizer.model").is_file() else []  # Llama's
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        pairs = list(model["vocab"].items())
    for entry in entries if isinstance(entries, list) else ():
        pairs += [(entry.get("content"), entry.get("id"))] if isinstance(entry, dict) else []
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and number.isdecimal():
            pairs.append((entry.get("content"), int(number)))
    pairs += read("added_tokens.json").items()
    return {text: number for text, number in pairs if isinstance(text, str) and type(number) is int}


def _marks(raw: Mapping[str, Any], folder: Path, tokens: Mapping[str, int]) -> dict[str, int]:
    """The tokens of places for pictures, by transformers' keys.

    LLaVA's code cuts the text at `<image>`, which is no token of most folders.  A row of a picture takes the
    place of `<im_patch>` where there is one, else of `<unk>`, which no text becomes.
    """
    vocabulary = raw.get("vocab_size")
    image = next((name for name in ("<im_patch>", "<image>", "<unk>") if name in tokens), None)
    if image is None:
        raise TyirError(
            f"{folder} holds no tokenizer that knows <im_patch>, <image> or <unk>: nothing can stand for"
            " pictures",
            help="copy the tokenizer of the original model there",
        )
    found = {"image_token_index": image}
    if raw.get("mm_use_im_start_end") is True:
        found |= {"vision_start_token_id": "<im_start>", "vision_end_token_id": "<im_end>"}
    if missing := [name for name in found.values() if name not in tokens]:
        raise TyirError(
            f"config.json has mm_use_im_start_end, the tokenizer in {folder} lacks {' and '.join(missing)}",
            help="copy added_tokens.json of the original model there",
        )
    for name in found.values():
        if isinstance(vocabulary, int) and not 0 <= tokens[name] < vocabulary:
            raise TyirError(
                f"{name} is token {tokens[name]}, the embedding has {vocabulary} rows",
                help="the tokenizer and config.json are of different models: restore them",
            )
    return {key: tokens[name] for key, name in found.items()}


# ------------------------------------------------------------------------------------------------ the weights


def translated(
    checkpoint: Checkpoint,
    tower: Checkpoint | None,
    base: Checkpoint | None,
    problems: list[Diagnostic],
) -> Checkpoint | None:
    """The checkpoint in transformers' form, with the tensors of its `tower` beside its own; with a `base` it
    is a delta, whose language model is added to that.  None (and problems) when that cannot be.
    """
    try:
        config = translated_config(
            checkpoint.config, checkpoint.folder, None if tower is None else tower.folder
        )
    except TyirError as error:
        problems.extend(error.diagnostics)
        return None
    assert tower is not None  # said above
    found = {_name(key): stored for key, stored in checkpoint.tensors.items()}
    own = any(name.startswith(_TOWER) for name in found)  # trained with the rest
    if checkpoint.config.get("unfreeze_mm_vision_tower") is True and not own and checkpoint.whole:
        problems.append(
            Diagnostic(
                "config.json has unfreeze_mm_vision_tower: the tower was trained with the rest, and the"
                " folder lacks it",
                where=str(checkpoint.folder),
                help="download the missing files: the tower that mm_vision_tower names is another one",
            )
        )
    found.update({} if own else _tower_tensors(tower))
    stamps = {str(tower.folder / name): stamp for name, stamp in tower.stamps.items()}
    made = replace(
        checkpoint,
        config=config,
        tensors=found,
        stamps={**checkpoint.stamps, **stamps},
        unreadable=frozenset(map(_name, checkpoint.unreadable)),
        whole=checkpoint.whole and tower.whole and not tower.unreadable,
        pictures=picture_folder(checkpoint.folder, tower.folder),
    )
    return made if base is None else _with_llama(made, base, problems)


def _name(stored: str) -> str:
    for pattern, replacement in _NAMES:
        new = re.sub(f"^{pattern}", replacement, stored)
        if new != stored:
            return new
    return stored


def _tower_tensors(tower: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a CLIP's tower under the model's names, in files named by whole paths."""
    for key, stored in tower.tensors.items():
        match = _CLIP.fullmatch(key)
        if match is not None and not _FOLLOWS.fullmatch(key):
            yield _TOWER + match[1], replace(stored, file=str(tower.folder / stored.file))


def _with_llama(delta: Checkpoint, base: Checkpoint, problems: list[Diagnostic]) -> Checkpoint | None:
    """The delta with the tensors that it is added to."""
    if any(stored.converted for stored in base.tensors.values()):
        problems.append(
            Diagnostic(
                f"the base in {base.folder} is a GGUF file, whose values are not those that the delta is to",
                help="give a folder of the Llama's *.safetensors or pytorch_model*.bin files with --base",
            )
        )
        return None
    beside = {_name(key): stored for key, stored in base.tensors.items() if not _FOLLOWS.fullmatch(key)}
    text = {
        name
        for name in delta.tensors
        if not name.startswith((_TOWER, "model.multi_modal_projector.")) and not _FOLLOWS.fullmatch(name)
    }
    if other := sorted(text ^ beside.keys()):
        problems.append(
            Diagnostic(
                f"{delta.folder} is no delta to {base.folder}: {len(other)} tensors of the language model are"
                f" in one of them alone (first '{other[0]}')",
                where=str(base.folder),
                help="give the Llama that the delta was made of with --base, or leave --base out: the folder"
                " may hold the whole model",
            )
        )
        return None
    return with_base(delta, replace(base, tensors=beside))


# ------------------------------------------------------------------------------------------------ other files


def picture_folder(folder: Path, tower: Path) -> Path:
    """Where it is said how pictures are prepared: LLaVA's code asks the tower, and a file beside the model
    says it before.
    """
    return folder if any((folder / name).is_file() for name in FILES) else tower


def llava_side_files(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """config.json in transformers' form, and what says how pictures are prepared, for the artifacts of a
    model whose weights are in files `names`: those with whole paths are of other folders.
    """
    towers = {path.parent for name in names if (path := Path(name)).is_absolute()}
    for tower in sorted(towers):
        raw = read_json_object(tower / CONFIG_FILE, "restore the file")
        if str(raw.get("model_type")).startswith("clip"):
            said = read_json_object(folder / CONFIG_FILE, _RESTORE)
            config = translated_config(said, folder, tower)
            pictures = picture_folder(folder, tower)
            beside = {name: pictures / name for name in FILES if (pictures / name).is_file()}
            return {
                CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
                **{name: path.read_bytes() for name, path in beside.items()},
            }
    return {}
