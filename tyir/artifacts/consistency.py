"""Whether the entries of a manifest fit each other: the programs' interfaces are what the options say.

A step of `seqlen` tokens of `batch` sequences takes the tokens, their positions and the caches of `max_kv`
positions, and returns the logits (or the best tokens) and the caches, updated in place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from tyir.artifacts.cache_layout import position_axis
from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.long_rope import LongRope
from tyir.artifacts.sparse_prefill import RECALL

if TYPE_CHECKING:
    from tyir.manifest import BuildOptions, DieProgram, Manifest, TensorInfo

__all__ = ["cache_inputs", "is_recall", "problems_of"]

_IDS, _EMBEDDINGS, _POS, _TEMPERATURE, _ROW = "ids", "embeddings", "pos", "temperature", "row"
_ROPE_ROWS: Final = "rope_rows"
# The caches' elements by number of axes, with the scales of 8-bit rows and of 4-bit groups beside them; keys
# that 4 bits do not hold have 8.
_CACHES: Final[dict[str, dict[int, tuple[str, ...]]]] = {
    "fp16": {4: ("f16",)},
    "int8": {4: ("i8",), 3: ("f16",)},
    "int4": {4: ("ui8", "ui16", "i8"), 3: ("f16",)},
}


def cache_inputs(program: DieProgram) -> set[int]:
    """The inputs that a step updates in place: state, which an engine keeps."""
    return {t.alias for t in program.outputs if t.alias is not None}


def problems_of(manifest: Manifest) -> Iterator[str]:
    """Everything in which a manifest contradicts itself."""
    options = manifest.options
    yield from _options(options)
    wanted = Counter((die, s) for s in options.seqlens for die in range(options.dies))
    found = Counter((p.die, p.seqlen) for p in manifest.programs)
    if wanted != found:
        (die, seqlen), _ = next(iter(((wanted - found) or (found - wanted)).items()))
        yield (
            f"{options.dies} dies and the lengths {', '.join(map(str, options.seqlens))} need a program each;"
            f" die {die} has {found[die, seqlen]} for length {seqlen}"
        )
        return
    for program in manifest.programs:
        who = f"the program of die {program.die} for length {program.seqlen}"
        yield from (f"{who} {problem}" for problem in _program(program, manifest))
    for die in range(options.dies):
        states = [_caches(p) for p in manifest.programs if p.die == die]
        if any(state != states[0] for state in states):
            yield f"the programs of die {die} have other caches for other lengths"
    yield from _vision(manifest)
    needed = {name for p in manifest.programs for name in p.files}
    if manifest.vision is not None:
        needed |= {name for p in manifest.vision.programs for name in p.files}
    needed |= {"embedding.params"} if options.embedding_as_input else set()
    needed |= {manifest.build["machine"]} if manifest.build["machine"].endswith(".toml") else set()
    if missing := sorted(needed - manifest.files.keys()):
        yield f"files lists no {', '.join(missing)}"
    layers = manifest.model.get("num_hidden_layers")
    counted = len(
        {
            name
            for p in manifest.programs
            for name, t in _caches(p).items()
            if len(t.shape) == 4 and t.dtype != "ui16"  # those are scales
        }
    )
    if layers is not None and 2 * layers != counted:
        yield f"model.num_hidden_layers is {layers}, the programs have {counted} caches of keys and values"


def _options(options: BuildOptions) -> Iterator[str]:
    lengths = ", ".join(map(str, options.seqlens))
    if list(options.seqlens) != sorted(set(options.seqlens)):
        yield f"options.seqlens {lengths} do not ascend"
    if max(options.seqlens) > options.max_kv:
        yield f"options.seqlens {lengths} are longer than options.max_kv {options.max_kv}"
    if options.dies % options.pp:
        yield f"options.pp {options.pp} does not divide options.dies {options.dies}"
    elif options.mesh and math.prod(options.mesh) != options.dies // options.pp:
        yield f"options.mesh {options.mesh} does not count the {options.dies // options.pp} dies of a stage"
    elif options.dies // options.pp % options.kv_parts:
        yield f"options.kv_parts {options.kv_parts} does not divide the dies of a stage"
    if (options.kv_parts > 1) != (options.kv_split == "tokens"):
        yield f"options.kv_parts {options.kv_parts} does not fit options.kv_split {options.kv_split}"
    if options.sparse_prefill:
        yield from _sparse(options)
    if options.die_map and len(set(options.die_map)) != options.dies:
        yield f"options.die_map {options.die_map} does not name {options.dies} different dies"


def _sparse(options: BuildOptions) -> Iterator[str]:
    choice = options.choice
    if choice is None or list(choice.problems()):
        yield f"options.sparse_prefill {options.sparse_prefill} are not keep, block, window and every"
        return
    if len(options.seqlens) < 2 or options.batch > 1 or options.kv_parts > 1 or options.kv_layout != "HND":
        yield "options.sparse_prefill needs two lengths, one sequence, and whole caches laid out as HND"


def _program(program: DieProgram, manifest: Manifest) -> Iterator[str]:
    options = manifest.options
    step = (options.batch, program.seqlen)
    for tensors in (program.inputs, program.outputs):
        names = Counter(t.name for t in tensors)
        yield from (f"has {count} tensors '{name}'" for name, count in names.items() if count > 1)
    for t in program.outputs:
        if t.alias is None:
            continue
        source = program.inputs[t.alias] if t.alias < len(program.inputs) else None
        if source is None or (t.name, t.shape, t.dtype) != (source.name, source.shape, source.dtype):
            yield f"has output {_shown(t)} in the place of input {t.alias}, {_shown(source)}"
    state = cache_inputs(program)
    aliased = [t for t in program.outputs if t.alias is not None]
    if len(state) != len(aliased):
        yield "updates one input by two outputs"
    if any(t.alias is not None for t in program.inputs):
        yield "has an input that is another input"
    given = {t.name: t for i, t in enumerate(program.inputs) if i not in state}
    yield from _tensor(given.pop(_POS, None), _POS, "i32", (options.batch,))
    if options.embedding_as_input:
        yield from _tensor(given.pop(_EMBEDDINGS, None), _EMBEDDINGS, "f16", (*step, None))
    else:
        yield from _tensor(given.pop(_IDS, None), _IDS, "i32", step)
    if DualChunk.used(manifest.model, options.max_kv) is not None:
        yield from _tensor(given.pop(_TEMPERATURE, None), _TEMPERATURE, "f32", (options.batch,))
    if LongRope.used(manifest.model, options.max_kv) is not None:
        yield from _tensor(given.pop(_ROPE_ROWS, None), _ROPE_ROWS, "i32", step)
    if options.takes_row(program.seqlen):
        yield from _tensor(given.pop(_ROW, None), _ROW, "i32", (options.batch,))
    yield from _of_pictures(given, manifest, step)
    if given:
        yield f"takes {', '.join(given)}, which no step gives and it does not update"
    for cache in (program.inputs[i] for i in sorted(state) if i < len(program.inputs)):
        yield from _recall(cache, options) if is_recall(cache.name, options) else _cache(cache, options)
    made = {t.name: t for t in program.outputs if t.alias is None}
    step = (options.batch, 1 if options.output_rows == "last" else program.seqlen)
    if options.output == "logits":
        vocabulary = manifest.model.get("vocab_size")
        yield from _tensor(made.pop("logits", None), "logits", "f32", (*step, vocabulary))
    else:
        best = 1 if options.output == "argmax" else int(options.output.removeprefix("topk="))
        yield from _tensor(made.pop("top_values", None), "top_values", "f32", (*step, best))
        yield from _tensor(made.pop("top_ids", None), "top_ids", "i32", (*step, best))
        if "logsumexp" in made:  # artifacts of older versions have none
            yield from _tensor(made.pop("logsumexp"), "logsumexp", "f32", step)
    if made:
        yield f"returns {', '.join(made)}, which options.output {options.output} does not say"


def _of_pictures(given: dict[str, TensorInfo], manifest: Manifest, step: tuple[int, int]) -> Iterator[str]:
    """Takes out of `given` what a vision-language model's step is given beside embeddings and position."""
    vision = manifest.vision
    if vision is None:
        return
    if vision.rope is not None:
        for name in ("rope_cos", "rope_sin"):
            shape = (manifest.options.max_kv, len(vision.rope.axes))
            yield from _tensor(given.pop(name, None), name, "f16", shape)
    for name in (f"deepstack{number}" for number in range(vision.deepstack)):
        yield from _tensor(given.pop(name, None), name, "f16", (*step, manifest.model.get("hidden_size")))


def _vision(manifest: Manifest) -> Iterator[str]:
    """What the tower's entries contradict each other in."""
    vision = manifest.vision
    if vision is None:
        return
    if not manifest.options.embedding_as_input:
        yield "options.embedding_as_input is false, but pictures enter a step as embeddings"
    if vision.rope is not None and len(vision.rope.axes) != len(vision.rope.inv_freq):
        yield f"vision.rope has {len(vision.rope.axes)} axes for {len(vision.rope.inv_freq)} frequencies"
    if vision.die_map and len(set(vision.die_map)) != vision.dies:
        yield f"vision.die_map {vision.die_map} does not name {vision.dies} different dies"
    if vision.rope is not None and vision.rope.program is not None:
        yield from _rope_program(vision.rope.program, len(vision.rope.axes), manifest.options.max_kv)
    hidden, pixels = manifest.model.get("hidden_size"), vision.pixels
    outputs = ("embeddings", *(f"deepstack{number}" for number in range(vision.deepstack)))
    for size in vision.sizes:
        image, who = size.image, f"the tower for {size.image.name}"
        groups = image.patches // pixels.merge**2
        if size.order and sorted(size.order) != list(range(groups)):
            yield f"{who} has an order that is not one of its {groups} groups of patches"
        if sorted(p.die for p in size.programs) != list(range(vision.dies)):
            yield f"{who} needs a program for each of {vision.dies} dies"
        for program in size.programs:
            if program.seqlen != image.patches:
                yield f"{who} has a program of {program.seqlen} patches, its grid has {image.patches}"
            (taken, *others), made = program.inputs, {t.name: t for t in program.outputs}
            for problem in _tensor(taken, "patches", "f16", (image.patches, pixels.columns)):
                yield f"{who} {problem}"
            if others or any(t.alias is not None for t in program.outputs) or tuple(made) != outputs:
                yield f"{who} takes or returns other tensors than patches and {', '.join(outputs)}"
                continue
            for name in outputs:
                yield from (f"{who} {p}" for p in _tensor(made[name], name, "f16", (image.tokens, hidden)))


def _rope_program(program: DieProgram, pairs: int, slots: int) -> Iterator[str]:
    """What the program of the rotary tables contradicts the language programs in."""
    who = "the program of vision.rope"
    if (program.die, program.seqlen) != (0, slots):
        yield f"{who} is of die {program.die} for {program.seqlen} slots, not of die 0 for max_kv = {slots}"
    taken = [(t.name, t.dtype, t.shape) for t in program.inputs]
    made = [(t.name, t.dtype, t.shape, t.alias) for t in program.outputs]
    tables = [(name, "f16", (slots, pairs), None) for name in ("rope_cos", "rope_sin")]
    if taken != [("positions", "i32", (3, slots))] or made != tables:
        yield (
            f"{who} takes or returns other tensors than positions i32 [3, {slots}], and rope_cos and rope_sin"
            f" f16 [{slots}, {pairs}]"
        )


def _cache(tensor: TensorInfo, options: BuildOptions) -> Iterator[str]:
    kinds = _CACHES[options.kv_dtype]
    wanted = kinds.get(len(tensor.shape), ())
    if not wanted:
        yield f"has {_shown(tensor)}, which is not a cache of {options.kv_dtype}"
    else:
        dtype = tensor.dtype if tensor.dtype in wanted else wanted[0]
        shape: list[int | None] = [None] * len(tensor.shape)
        shape[0], shape[position_axis(options.kv_layout)] = options.batch, options.cache_extent
        yield from _tensor(tensor, tensor.name, dtype, tuple(shape))


def is_recall(name: str, options: BuildOptions) -> bool:
    """Whether a state of this name says what sparse steps have seen, and is not a cache."""
    return options.choice is not None and name.startswith(RECALL)


def _recall(tensor: TensorInfo, options: BuildOptions) -> Iterator[str]:
    assert options.choice is not None
    samples = options.choice.samples(max(options.seqlens))
    yield from _tensor(tensor, tensor.name, "f32", (options.batch, samples, None))


def _tensor(found: TensorInfo | None, name: str, dtype: str, shape: tuple[int | None, ...]) -> Iterator[str]:
    """What is wrong with a tensor; None in `shape` stands for any extent."""
    fits = (
        found is not None
        and found.dtype == dtype
        and len(found.shape) == len(shape)
        and all(wanted in (None, extent) for wanted, extent in zip(shape, found.shape))
    )
    if not fits:
        wanted = "x".join("?" if extent is None else str(extent) for extent in shape)
        yield f"has {_shown(found)} where the options say {name}: {wanted}x{dtype}"


def _caches(program: DieProgram) -> dict[str, TensorInfo]:
    found = (program.inputs[i] for i in cache_inputs(program) if i < len(program.inputs))
    return {t.name: t for t in found}


def _shown(tensor: TensorInfo | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tensor.name}: {'x'.join(map(str, (*tensor.shape, tensor.dtype)))}"
