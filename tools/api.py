"""The Python entry points: compile a checkpoint or a module in one call.

`build_and_compile_llm` has the signature and the defaults of TyLLM's function of that name, so that a TyLLM
script changes one import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.manifest import MANIFEST, BuildOptions, settled
from tyir.process.cores import usable_cores
from tyir.process.files import missing_hint
from tyir.process.stopwatch import Stopwatch
from tyir.tools.commands.build_arguments import AUTO

if TYPE_CHECKING:
    from tyir.artifacts.vision import VisionSplit
    from tyir.backends.workers import Workers
    from tyir.frontends.plugin import ModelPlugin
    from tyir.process.cache import Cache

__all__ = [
    "build_and_compile_llm",
    "build_and_compile_vlm",
    "check_options",
    "compile_path",
    "load_module",
    "quantize",
    "quantize_by_table",
]


_UNASKED: Final = (None, (), "cost")  # what a compile settles by itself
_PARTS: Final = (".safetensors", ".bin", ".pt", ".pth")  # of a checkpoint, which is the folder


def _silent(message: str) -> None:
    """The default for warnings of a library call."""


def build_and_compile_llm(
    model_path: str | Path,
    artifacts_path: str | Path | None = None,
    max_kv_cache_size: int = 4096,
    seq_len_list: Sequence[int] = (1, 8),
    dev_count: int = 1,
    embedding_as_input: bool = False,
    *,
    weights: str = "fp16",
) -> Path:
    """Compile the checkpoint folder `model_path`; returns the folder of the artifacts.

    That is `artifacts_path/{dev_count}die`.

    `artifacts_path` defaults to `{model_path}_tyir` beside the model.  `weights` ("fp16" or "int4") is ours.
    Raises `TyirError`.
    """
    model = Path(model_path)
    out = Path(artifacts_path) if artifacts_path is not None else model.with_name(model.name + "_tyir")
    options = BuildOptions(
        dies=dev_count,
        seqlens=tuple(seq_len_list),
        max_kv=max_kv_cache_size,
        embedding_as_input=embedding_as_input,
        weights=weights,
    )
    return compile_path(model, out, options)


def build_and_compile_vlm(
    model_path: str | Path,
    artifacts_path: str | Path | None = None,
    max_kv_cache_size: int = 4096,
    seq_len_list: Sequence[int] = (1, 96),
    dev_count: int = 1,
    image_sizes: Sequence[tuple[int, int]] = ((540, 960),),
    *,
    weights: str = "fp16",
    vision_dev_count: int | None = None,
    vision_die_map: Sequence[int] = (),
    die_map: Sequence[int] = (),
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
) -> Path:
    """Compile a vision-language model; returns the folder of the artifacts, `artifacts_path/{dev_count}die`.

    `image_sizes` are (height, width) in pixels, TyLLM's order; `--image` writes the width first.
    `vision_dev_count` dies run the tower (default: those of the language model); `die_map` and
    `vision_die_map` name the physical dies, the main one first.  Of LLaVA as its authors publish it,
    `vision_tower` is the folder of its CLIP model, and `base` the Llama that a delta is added to.  Raises
    `TyirError`.
    """
    from tyir.frontends.plugin import plugin_of

    model = Path(model_path)
    out = Path(artifacts_path) if artifacts_path is not None else model.with_name(model.name + "_tyir")
    options = BuildOptions(
        dies=dev_count,
        die_map=tuple(die_map),
        seqlens=tuple(seq_len_list),
        max_kv=max_kv_cache_size,
        embedding_as_input=True,
        weights=weights,
    )
    return compile_path(
        model,
        out,
        options,
        images=[(width, height) for height, width in image_sizes],
        plugin=plugin_of(None, None if vision_tower is None else Path(vision_tower)),
        base=None if base is None else Path(base),
        vision_dies=vision_dev_count,
        vision_die_map=tuple(vision_die_map),
    )


def compile_path(
    model: str | Path,
    out: str | Path,
    options: BuildOptions | Mapping[str, Any],
    *,
    watch: Stopwatch | None = None,
    progress: bool = False,
    mcpu: str | None = None,
    host_activations: str | None = None,
    warn: Callable[[str], None] = _silent,
    say: Callable[[str], None] = _silent,
    plugin: ModelPlugin | None = None,
    base: Path | None = None,
    awq_table: Path | None = None,
    calibration: Path | None = None,
    binary: bool = False,
    machine: str | Path | None = None,
    backend: str = "edge10",
    images: Sequence[tuple[int, int]] = (),
    vision_dies: int | None = None,
    vision_die_map: tuple[int, ...] = (),
    vision_exponent: int | None = None,
    jobs: int | None = None,
    cache: Cache | None = None,
    workers: Workers | None = None,
    vision_split: VisionSplit = "cost",
    tune: float | None = None,
) -> Path:
    """Compile a checkpoint folder or an `.ir` file into `out/{n}die`; returns that folder.

    Raises `TyirError` before any work for options that cannot be.

    Of a mapping what it names is asked for, of `BuildOptions` everything; what an `.ir` file was built with
    holds where nothing is asked for, and an `options` that contradicts it is an error.
    `plugin` says how a checkpoint of one's own is read (`frontends/plugin.py`), `base` where the base model
    of a LoRA adapter is.  Weights "awq" are made with the scales and ranges of the file `awq_table`, or, of a
    checkpoint folder, as `quantize` does it on the text `calibration`, in a folder that is gone afterwards;
    `host_activations`: what the host's code multiplies 4-bit weights with, "fp32", "int16" or "int8" (None:
    int16 where the processor multiplies bytes, else fp32).
    `binary` and `machine` are for the `CompileContext` of the back end, which `backend` names.  `images`: of
    a vision-language model the sizes (width, height) of pictures; `vision_dies`, `vision_die_map`: the dies
    of its tower, `vision_exponent`: by which power of two its residual stream is divided, so that f16 holds
    it, `vision_split`: how it is cut over the dies.  `jobs`: how many threads write weights (None: one for
    each processor); artifacts are the same for every number.  `cache`: where finished pieces are kept and
    looked for; a library call has none of its own.  `workers`: other processes that make pieces.  `tune`:
    seconds for which schedules of the host's code are tried on this processor; `say` is told what they found.
    """
    from tyir.backends.registry import find_backend
    from tyir.passes.annotate_sharding import check_dies
    from tyir.passes.scale_residual import check_exponent
    from tyir.targets.machine import load_machine
    from tyir.tools.estimate.group_size import settle_group_size

    model, out = Path(model), Path(out)
    chosen = find_backend(backend)
    further: dict[str, Any] = {
        "vision_dies": vision_dies,
        "vision_die_map": vision_die_map,
        "vision_exponent": vision_exponent,
        "vision_split": vision_split,
        "activations": host_activations,
        "tune": tune,
    }
    if vision_exponent is not None:
        check_exponent(vision_exponent)
    if vision_dies is not None or vision_die_map:
        count = len(vision_die_map) if vision_dies is None else vision_dies
        check_dies(count)
        if vision_die_map:
            _check_map("--vision-die-map", vision_die_map, count)
    if images and model.suffix == ".ir":
        raise TyirError(
            "--image is for checkpoint folders; a module has been imported already",
            help="give it to tyir-import",
        )
    if machine is not None:
        load_machine(machine)
    positions = None
    if model.is_dir() or model.suffix != ".ir":  # a module may have settled its options
        given = asdict(options) if isinstance(options, BuildOptions) else options
        if given is options and "group_size" in given and given.get("weights", "fp16") == "fp16":
            warn(f"the group size {given['group_size']} is not used: no weights are quantised")
        options = settle_group_size(model, given)
        wanted = BuildOptions(**{**options, "group_size": _number_of(options)})
        check_options(wanted)
        chosen.check_target(out / f"{wanted.dies}die")
        positions = wanted.max_kv
    watch, jobs = watch or Stopwatch(), usable_cores() if jobs is None else jobs
    said: list[str] = []
    whole = None
    # a key knows the checkpoint and tyir's own sources
    own = (
        backend == "edge10" and plugin is None and base is None and awq_table is None and calibration is None
    )
    if cache is not None and model.is_dir() and own:
        from tyir.backends.reuse import artifacts_key, keep_artifacts, take_artifacts

        asked = {**options, **further, "mcpu": mcpu, "binary": binary, "machine": machine, "images": images}  # type: ignore[dict-item]
        whole = artifacts_key(model, asked, machine)
        target = out / f"{wanted.dies}die"
        if whole is not None and take_artifacts(cache, whole, target, warn):
            return target
    if calibration is not None or _is_searched(model, options, awq_table):
        _check_search(model, options, awq_table, base is not None or plugin is not None)
        from tyir.tools.quantize.in_passing import quantized_beside

        assert not isinstance(options, BuildOptions)  # a folder's are a mapping by now
        size = _number_of(settle_group_size(model, {**options, "weights": "int4"}))
        with ExitStack() as stack:
            with watch.stage("quantize"):
                folder = stack.enter_context(
                    quantized_beside(model, out, size, calibration=calibration, progress=progress, warn=warn)
                )
            return compile_path(
                folder,
                out,
                {key: value for key, value in options.items() if key not in ("weights", "group_size")},
                watch=watch,
                progress=progress,
                mcpu=mcpu,
                host_activations=host_activations,
                warn=warn,
                say=say,
                binary=binary,
                machine=machine,
                backend=backend,
                images=images,
                vision_dies=vision_dies,
                vision_die_map=vision_die_map,
                vision_exponent=vision_exponent,
                jobs=jobs,
                cache=cache,
                workers=workers,
                vision_split=vision_split,
                tune=tune,
            )

    def warn_and_note(message: str) -> None:
        said.append(message)
        warn(message)

    with watch.stage("import"):
        module = load_module(
            model, plugin, warn_and_note, positions, base, progress, images, cache if own else None
        )
    if awq_table is not None:
        with watch.stage("awq"):
            options = quantize_by_table(module, awq_table, options)
    options = _with_group_size(options, module)
    wanted = settled(options, module)
    check_options(wanted)
    _check_choices(module, wanted)
    _warn_about_positions(module, wanted, warn_and_note)
    accepted = inspect.signature(chosen.CompileContext).parameters
    if "activations" in accepted and not _has_quantized(module, wanted):
        if host_activations not in (None, "fp32"):
            warn_and_note(f"--host-activations {host_activations} is not used: no weights have 4 bits")
        further["activations"] = "fp32"
    context = chosen.CompileContext(
        watch=watch,
        progress=progress,
        mcpu=mcpu,
        binary=binary,
        machine=machine,
        files=_side_files(module, warn_and_note),
        **_taken(further, accepted, backend),
        **_known({"jobs": jobs, "cache": cache, "workers": workers, "say": say}, accepted),
    )
    target = chosen.compile_module(module, out, options, context)
    if cache is not None and whole is not None and (target / MANIFEST).is_file():
        keep_artifacts(cache, whole, target, said)
    return target


def _known(asked: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """What a back end takes of what changes no artifact."""
    return {name: value for name, value in asked.items() if name in accepted}


def _taken(asked: Mapping[str, Any], accepted: Collection[str], backend: str) -> dict[str, Any]:
    """What a back end is told beside what all take; `TyirError` when it does not know what was asked for."""
    unknown = [name for name, value in asked.items() if name not in accepted and value not in _UNASKED]
    if unknown:
        raise TyirError(
            f"the back end '{backend}' does not know {', '.join(unknown)}",
            help=f"leave out --{unknown[0].replace('_', '-')}",
        )
    return _known(asked, accepted)


def _is_searched(model: Path, options: BuildOptions | Mapping[str, Any], table: Path | None) -> bool:
    """Whether weights "awq" are to be found for a checkpoint folder."""
    weights = options.weights if isinstance(options, BuildOptions) else options.get("weights")
    return weights == "awq" and table is None and model.is_dir()


def _check_search(
    model: Path, options: BuildOptions | Mapping[str, Any], table: Path | None, other: bool
) -> None:
    """`TyirError` for what a search of scales cannot be joined with."""
    if table is not None:
        raise TyirError("a table and a calibration text are given", help="give one of them")
    if not model.is_dir():
        raise TyirError(
            f"{model} is no checkpoint folder, and calibration looks at what a checkpoint computes",
            help="give the checkpoint, or make a table with tyir-quantize and give --awq-table",
        )
    if not _is_searched(model, options, None):
        raise TyirError("a calibration text is for weights awq", help="add --weights awq")
    if other:
        raise TyirError(
            "weights awq are searched for plain checkpoints, not for adapters or through a model plug-in",
            help="use --weights int4, or make a table and give --awq-table",
        )


def quantize(
    model_path: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    evaluate: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Path:
    """Quantise the checkpoint folder `model_path` into the checkpoint folder `out`, which is returned.

    `settings` are the fields of `tyir.tools.quantize.settings.QuantizeSettings`: method ("awq", "gptq",
    "awq+gptq", "rtn"), bits, group_size, zero_point, lm_head, ...; `calibration` is a file of text,
    `evaluate` a text whose perplexity is printed before and after.  Raises `TyirError`.
    """
    from tyir.tools.quantize.quantize import Text, quantize
    from tyir.tools.quantize.report import summary_lines
    from tyir.tools.quantize.settings import QuantizeSettings

    outcome = quantize(
        Path(model_path),
        Path(out),
        QuantizeSettings(**settings),
        calibration=None if calibration is None else Path(calibration),
        evaluate=None if evaluate is None else Text(Path(evaluate)),
        progress=progress,
    )
    if evaluate is not None:
        print(*summary_lines(outcome), sep="\n")
    return outcome.out


def quantize_by_table(
    module: Module, table: Path, options: BuildOptions | Mapping[str, Any]
) -> BuildOptions | Mapping[str, Any]:
    """Take a module of stage `aten` or `ty` to 4-bit weights with an AWQ table; returns the options to go on
    with, which then say so.

    `TyirError` for options that ask for other weights, and for a module that is further on.
    """
    from tyir.execution.awq_table import AwqTable
    from tyir.passes.pipelines import awq_pipeline
    from tyir.pipeline import run_pipeline
    from tyir.stages import stage_of

    asked = options.weights if isinstance(options, BuildOptions) else options.get("weights", "awq")
    if asked != "awq":
        raise TyirError(
            f"an AWQ table is given, and weights {asked} are asked for", help="use --weights awq with it"
        )
    if (stage := stage_of(module)) not in ("aten", "ty"):
        raise TyirError(
            f"the module is at stage {stage}; a table is folded in before the caches are made",
            help="start from the checkpoint, or from a module at stage aten or ty",
        )
    run_pipeline(module, ",".join([*["to-ty"][: stage == "aten"], awq_pipeline(table)]))
    if isinstance(options, BuildOptions):
        return replace(options, group_size=AwqTable.open(table).settings.group_size)
    return {**options, "weights": "awq"}


def _number_of(options: Mapping[str, Any]) -> int:
    """The group size, or a stand-in for `auto` where only the imported model can tell."""
    size = options.get("group_size", BuildOptions.group_size)
    return BuildOptions.group_size if size == AUTO else size


def _with_group_size(options: BuildOptions | Mapping[str, Any], module: Module) -> Any:
    """Options whose group size is a number, where `auto` stood that of the module's linears."""
    from tyir.dialects.ty import tensor_type
    from tyir.passes.quantize_weights import decoder_linears, largest_group_size

    if isinstance(options, BuildOptions) or options.get("group_size") != AUTO:
        return options
    found = {key: value for key, value in options.items() if key != "group_size"}
    channels = {tensor_type(linear.weight).static_shape[1] for linear in decoder_linears(module)}
    if channels and found.get("weights") == "int4":
        found["group_size"] = largest_group_size(channels, BuildOptions.group_size)
    return found


def load_module(
    model: Path,
    plugin: ModelPlugin | None = None,
    warn: Callable[[str], None] = _silent,
    positions: int | None = None,
    base: Path | None = None,
    progress: bool = False,
    images: Sequence[tuple[int, int]] = (),
    cache: Cache | None = None,
) -> Module:
    """The module of a checkpoint folder or of an `.ir` file.

    A checkpoint is imported for a cache of `positions` tokens, a file parsed and verified.  `cache`: where
    the module of a folder is looked for and kept.
    """
    if model.is_dir() or model.suffix == ".gguf" or (plugin is not None and model.suffix != ".ir"):
        from tyir.tools.commands.kept_imports import kept_import

        def imported(warn: Callable[[str], None]) -> Module:
            from tyir.frontends.huggingface import import_model

            return import_model(
                model,
                note=lambda d: warn(d.message),
                plugin=plugin,
                positions=positions,
                base=base,
                progress=progress,
                images=images,
            )

        asked = {"dtype": "f16", "images": tuple(images)}
        return kept_import(cache, model, positions, asked, imported, warn)
    if not model.exists():
        hub = "give a checkpoint folder from the hub, or a file written by tyir-import or tyir-opt"
        raise TyirError(f"{model} does not exist", help=missing_hint(model) or hub)
    if model.name == "config.json" or model.suffix in _PARTS:
        from tyir.frontends.checkpoint import no_checkpoint

        raise TyirError(no_checkpoint(model))
    if ".gguf" in model.name:
        from tyir.frontends.gguf.files import check_pieces

        check_pieces(model)
    from tyir.parser import parse_file
    from tyir.printer import has_elided_constants
    from tyir.verifier import verify

    module = parse_file(model)
    if has_elided_constants(module):
        raise TyirError(
            f"{model} was printed with --elide-large-constants: its constants are not in it",
            help="print it again without that flag",
        )
    verify(module)
    return module


def _side_files(module: Module, warn: Callable[[str], None]) -> dict[str, bytes]:
    """Config and tokenizer files that the checkpoint of a module holds in another form."""
    from tyir.attributes import DictAttr
    from tyir.execution.weights import checkpoint_of
    from tyir.frontends.side_files import side_files

    files = module.attributes.get("tyir.files")
    if "tyir.checkpoint" not in module.attributes:
        return {}
    names = [name for name, _ in files.items()] if isinstance(files, DictAttr) else []
    return side_files(checkpoint_of(module), names, lambda d: warn(f"{d.message}; {d.help}"))


def check_options(options: BuildOptions) -> None:
    """`TyirError` for die counts, lengths, cache sizes and outputs that no compile can have."""
    from tyir.dialects.kv import LAYOUTS
    from tyir.passes.annotate_sharding import check_dies, check_mesh, check_stages
    from tyir.passes.select_output import parse_output
    from tyir.passes.specialize_batch import check_batch
    from tyir.passes.specialize_seqlen import check_seqlens

    check_dies(options.dies)
    check_stages(options.dies, options.pp)
    if options.die_map:
        _check_map("--die-map", options.die_map, options.dies)
    check_mesh(options.mesh, options.dies // options.pp)
    if options.max_kv < 1:
        raise TyirError(
            f"a cache of {options.max_kv} tokens: it must hold at least 1", help="use --max-kv 1024"
        )
    check_seqlens(options.seqlens, options.max_kv)
    if options.group_size < 1:
        raise TyirError(f"a group of {options.group_size} input channels", help="use --group-size 128")
    if options.weights not in ("fp16", "int4", "awq", "checkpoint"):
        raise TyirError(f"weights '{options.weights}': one of fp16, int4, awq")
    check_batch(options.batch)
    if options.kv_dtype not in ("fp16", "int8", "int4"):
        raise TyirError(f"a cache of '{options.kv_dtype}': one of fp16, int8, int4")
    if options.kv_layout not in LAYOUTS:
        raise TyirError(f"a cache laid out as '{options.kv_layout}': one of {', '.join(LAYOUTS)}")
    if options.kv_split not in ("auto", "heads", "tokens"):
        raise TyirError(f"a cache cut by '{options.kv_split}': one of auto, heads, tokens")
    parse_output(options.output)
    if options.output_rows not in ("all", "last"):
        raise TyirError(f"rows '{options.output_rows}' of a step: one of all, last")


def _check_map(option: str, devices: tuple[int, ...], dies: int) -> None:
    """`TyirError` unless an option names as many different dies of a board."""
    from tyir.passes.annotate_sharding import MAX_DIES, check_remap

    check_remap(devices, dies, f"{option} ")
    if (last := max(devices)) >= MAX_DIES:
        raise TyirError(
            f"{option} {','.join(map(str, devices))}: no board has a die {last}, but 0 to {MAX_DIES - 1}",
            help=f"use {option} {','.join(map(str, range(dies)))}",
        )


def _check_choices(module: Module, options: BuildOptions) -> None:
    """`TyirError` for more of the best tokens than there are."""
    from tyir.attributes import DictAttr, IntegerAttr
    from tyir.passes.select_output import parse_output

    model = module.attributes.get("tyir.model")
    size = model.get("vocab_size") if isinstance(model, DictAttr) else None
    if isinstance(size, IntegerAttr) and parse_output(options.output) > size.value:
        raise TyirError(
            f"--output {options.output}: the vocabulary has {size.value} tokens",
            help=f"use --output topk={size.value}, or --output logits",
        )


def _has_quantized(module: Module, options: BuildOptions) -> bool:
    """Whether a compile has weights of 4 bits: quantises some, or gets them, which an import leaves as
    `ty.dequantize`.
    """
    from tyir.dialects.ty import Dequantize, QuantizedLinear

    given = (op for kind in (QuantizedLinear, Dequantize) for op in module.walk_type(kind))
    return options.weights in ("int4", "awq") or any(True for _ in given)


def _warn_about_positions(module: Module, options: BuildOptions, warn: Callable[[str], None]) -> None:
    from tyir.attributes import DictAttr, IntegerAttr

    model = module.attributes.get("tyir.model")
    limit = model.get("max_position_embeddings") if isinstance(model, DictAttr) else None
    if isinstance(limit, IntegerAttr) and options.max_kv > limit.value:
        warn(f"the cache holds {options.max_kv} tokens, the model was trained for {limit.value} positions")
