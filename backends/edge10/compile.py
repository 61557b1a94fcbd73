"""From a module at any stage to a folder of artifacts: the whole back end, readable top to bottom in
`compile_module`.

Everything is written into a folder beside the target, which takes its place when the manifest is written
(`tyir.backends.replacing`).  A failure or an interrupt leaves what was there before, and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyir.artifacts.json_attributes import to_json
from tyir.artifacts.vision import Vision, VisionSplit
from tyir.attributes import DictAttr
from tyir.backends import replacing
from tyir.backends.edge10.libraries import (
    HostFacts,
    LibrariesBeside,
    Part,
    functions_of,
    libraries_beside,
)
from tyir.backends.edge10.memory.check import check_memory
from tyir.backends.edge10.programs import Memory, ProgramFiles, ProgramWriter
from tyir.backends.edge10.towers import Towers, make_towers, split_towers
from tyir.backends.edge10.weight_files import Places, WeightFiles
from tyir.backends.workers import Workers
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import GetGlobal, Param
from tyir.execution.weights import CheckpointReader, check_files, checkpoint_of
from tyir.layers import location_by_path
from tyir.manifest import (
    MACHINE,
    MANIFEST,
    Build,
    BuildOptions,
    DieProgram,
    FileRecord,
    Manifest,
    file_record,
    recorded,
    settled,
)
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import PassContext, run_verified_once
from tyir.process.cache import Cache
from tyir.process.collector import collector_paused
from tyir.process.files import MAX_JSON, read_regular, stand_in
from tyir.process.progress import track
from tyir.process.stopwatch import Stopwatch
from tyir.stages import stage_of
from tyir.targets.machine import load_machine
from tyir.text.json_files import read_json_object, token_ids, utf8_text

if TYPE_CHECKING:
    from tyir.backends.host.kernels.tir import Schedule
    from tyir.backends.host.tvm_host import HostTarget

__all__ = ["CompileContext", "check_target", "compile_module", "to_program"]

EDGE10: Final = "edge10"
_BUFFER_CONFIG, _EMPTY, _EMBEDDING = "buffer_config.json", "empty.bin", "embedding.params"

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_TEXTS: Final = (".jinja", ".txt")


@dataclass
class CompileContext:
    """What a compile carries along: where it reports, whether it shows progress, and what it builds for.

    `activations`: what the host's code multiplies 4-bit weights with, "fp32", "int16" or "int8"; None: what
    the processor is fast with (`HostTarget.preferred`).
    `binary`: command programs as bytes (`.bin`) instead of text (`.edge10`).  `machine`: a known machine's
    name, or a machine file, which goes to the artifacts; None is the one a module was cut for, or edge10.
    `files`: what is to lie beside the artifacts, by name, where the checkpoint folder holds no such file.
    `vision_dies`, `vision_die_map`: the dies of the towers, those of the language model when None and ().
    `vision_exponent`: by which power of two a tower's residual stream is divided (`scale-residual`), None:
    `VISION_EXPONENT`.  `vision_split`: how a tower is cut over its dies, by heads or by rows of patches.
    `jobs`: how many threads write weights, beside the one that makes programs; artifacts are the same for
    every number.  `cache`: where finished pieces are kept, None: nowhere.  `workers`: other processes that
    compute weights and build host code, None: this one does.  `tune`: seconds for which schedules of host
    code are tried on this processor, `schedule` what they found; `say`: what is told about it.
    """

    watch: Stopwatch = field(default_factory=Stopwatch)
    progress: bool = False
    mcpu: str | None = None
    activations: str | None = None
    binary: bool = False
    machine: str | Path | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    passes: PassContext = field(default_factory=PassContext)
    vision_dies: int | None = None
    vision_die_map: tuple[int, ...] = ()
    vision_exponent: int | None = None
    jobs: int = 1
    cache: Cache | None = None
    workers: Workers | None = None
    vision_split: VisionSplit = "cost"
    tune: float | None = None
    schedule: Schedule | None = None
    say: Callable[[str], None] = lambda text: None

    def host_target(self) -> HostTarget:
        """The processor that host code is for, this one when none is asked for."""
        from tyir.backends.host.tvm_host import HostTarget

        target = HostTarget.preferred(self.mcpu)
        if self.activations is not None:
            target = replace(target, activations=self.activations)
        return target if self.schedule is None else replace(target, schedule=self.schedule)

    def tuned_for(self, die: Module, seqlen: int) -> CompileContext:
        """With the schedule that `tune` seconds find for the steps of a die."""
        if self.tune is None:
            return self
        from tyir.backends.host.tuning import tuned

        with self.watch.stage("tune"):
            return replace(
                self, schedule=tuned(functions_of(die, seqlen), self.host_target(), self.tune, self.say)
            )

    @property
    def chosen_machine(self) -> str | Path:
        """The machine, edge10 when none is asked for."""
        return EDGE10 if self.machine is None else self.machine

    def for_module(self, module: Module) -> CompileContext:
        """For the machine that the module was cut for, which what is asked for may not contradict."""
        cut_for = recorded(module).get("machine")
        if not isinstance(cut_for, str):
            return self
        asked = self.machine
        if asked is not None and str(asked) != cut_for and load_machine(asked) != load_machine(cut_for):
            raise TyirError(
                f"machine = {asked} is asked for, the module was cut for machine = {cut_for}",
                help="leave machine out, or start from a file that partition-dies has not been run on",
            )
        return replace(self, machine=cut_for)


def compile_module(
    module: Module,
    out: Path,
    options: BuildOptions | Mapping[str, Any],
    context: CompileContext | None = None,
) -> Path:
    """Compile a module into `out/{n}die` and return that folder.

    The module may stand at any stage; the passes it has not been through are run with `options` (of a mapping
    with what it names, of `BuildOptions` with all).  What has been done to the module already is read from
    its record, `tyir.build`, and may not contradict them.  Raises `TyirError` and leaves `out` as it was.
    """
    context = (context or CompileContext()).for_module(module)
    replacing.check_writable(out / MANIFEST)
    _check_model_files(checkpoint_of(module))
    with context.watch.stage("passes"):
        separate = split_towers(module)
    stage, source, asked = _stage(module), module.clone(), settled(options, module)
    if separate:  # pictures enter as embeddings
        asked = replace(asked, embedding_as_input=True)
        _check_for_pictures(asked)
    with context.watch.stage("passes"):
        options = to_program(module, asked, context)
        towers = _towers(separate, module, options, context)
    dies = [m for m in module.body if isinstance(m, Module)]
    wanted = replace(asked, seqlens=options.seqlens)
    check_memory(dies, wanted, source, stage, context.chosen_machine)
    context = context.tuned_for(dies[0], min(options.seqlens))
    target = out / f"{options.dies}die"
    with replacing.replacing(target, _writes(checkpoint_of(module))) as folder:
        weights = _weight_files(dies, folder, options, module, towers)
        parts = [] if towers is not None else _parts(dies, folder, options)  # their kernels are made here
        with (
            libraries_beside(parts, context) as beside,
            weights.running(
                context.jobs,
                context.cache,
                progress=context.progress,
                watch=context.watch,
                workers=context.workers,
            ),
        ):
            programs, memory, host = _write_programs(dies, folder, options, weights.places, context, beside)
            vision = towers.write(folder, weights.places, context) if towers is not None else None
        with context.watch.stage("manifest"):
            _copy_model_files(checkpoint_of(module), folder, context.files)
            machine = _copy_machine(folder, context)
            _write_buffer_config(folder, options, programs, memory)
            digests = weights.digests()
            _write_manifest(folder, module, options, programs, context, machine, vision, digests, host)
    if context.cache is not None:
        context.cache.trim()
    return target


def _check_for_pictures(options: BuildOptions) -> None:
    if options.batch > 1:
        raise TyirError(
            f"a batch of {options.batch} of a model that sees pictures: its rotary tables are one request's",
            help="leave --batch out",
        )


def _towers(
    separate: Mapping[str, Module], module: Module, options: BuildOptions, context: CompileContext
) -> Towers | None:
    """The towers as programs; None for a model of text alone."""
    if not separate:
        asked = (context.vision_dies, context.vision_die_map, context.vision_exponent, context.vision_split)
        if asked != (None, (), None, "cost"):
            raise TyirError(
                "something is asked for a vision tower, the module has none",
                help=(
                    "leave --vision-dies, --vision-die-map, --vision-exponent and --vision-split out, or"
                    " import with --image WIDTHxHEIGHT"
                ),
            )
        return None
    dies = options.dies if context.vision_dies is None else context.vision_dies
    die_map = context.vision_die_map or (options.die_map if dies == options.dies else ())
    return make_towers(separate, module, dies, die_map, options.max_kv, context)


def to_program(module: Module, asked: BuildOptions, context: CompileContext) -> BuildOptions:
    """Run the passes that a module has not been through; returns what it is now built with.

    Its locations then follow from the ops' attributes alone and results have no names, which get numbers when
    they are written: artifacts are the same bytes with and without debug information, and whether the module
    has been a file on the way or not.
    """
    pipeline = remaining_pipeline(_stage(module), asked, str(context.chosen_machine), recorded(module))
    run_verified_once(module, pipeline, context.passes)
    for op in module.walk():
        op.loc = location_by_path(op)
        for value in op.results:
            value.name = None
    return BuildOptions.of(module)


def _stage(module: Module) -> str:
    stage = stage_of(module)
    if stage is None:
        raise TyirError(
            "the module does not say at which stage it is",
            help='set {tyir.stage = "ty"} on the module, as tyir-import does',
        )
    return stage


# ------------------------------------------------------------------------------------------------- the folder


_OWN_FILES: Final = (MANIFEST, _BUFFER_CONFIG, _EMPTY, _EMBEDDING, MACHINE)
_OWN_FOLDERS: Final = re.compile(r"batch_\d+(/seqlen_\d+)?|visual(/size_\d+x\d+)?")
_PROGRAM_FILES: Final = re.compile(
    r"batch_\d+/(common_die\d+|seqlen_\d+/llm_die\d+)\.\w+"
    r"|compute_rope_param\.\w+"
    r"|visual/((constant_die\d+|(size_\d+x\d+/)?vit_die\d+)\.\w+|(aot|buffer)_config\.json)"
)


def check_target(target: Path) -> None:
    """`TyirError` when something stands where the artifacts would go that may not be replaced."""
    replacing.check_target(target, _writes())


def _writes(checkpoint: Path | None = None) -> replacing.Writes:
    """What a compile writes: with `checkpoint` also the files that it copies from there."""
    copied = [n for n in _COPIED if checkpoint is not None and (checkpoint / n).is_file()]

    def writes(name: str, is_folder: bool) -> bool:
        if _OWN_FOLDERS.fullmatch(name):
            return not is_folder
        return name in (*_OWN_FILES, *copied) or _PROGRAM_FILES.fullmatch(name) is not None

    return writes


# ---------------------------------------------------------------------------------------------------- weights


def _weight_files(
    dies: list[Module], folder: Path, options: BuildOptions, module: Module, towers: Towers | None
) -> WeightFiles:
    """Which parameter of which die goes to which `.params` file."""
    found = WeightFiles(folder, CheckpointReader(checkpoint_of(module)))
    places = found.places
    for index, die in enumerate(dies):
        params = [p for p in die.body if isinstance(p, Param)]
        users = {
            s: {g.symbol.leaf for f in functions_of(die, s) for g in f.walk_type(GetGlobal)}
            for s in options.seqlens
        }
        used = {p: [s for s in options.seqlens if p.sym_name in users[s]] for p in params}
        tables = {p for p in params if not any(isinstance(op, GetGlobal) for op in p.body)}
        several = len(options.seqlens) > 1
        own = {p for p in params if p in tables or (several and len(used[p]) == 1)}
        common = [p for p in params if p not in own]
        for seqlen in options.seqlens:
            named = _files(options, seqlen)
            if seqlen == options.seqlens[0]:
                file = found.add(named.shared(index), common)
                for p in common:
                    places.add(index, p, file, named.shared(index))
            mine = [p for p in params if p in own and seqlen in used[p]]
            file = found.add(named.name(index, "params"), mine)
            for p in mine:
                places.add(index, p, file, named.name(index, "params"), seqlen)
    if shared := [
        p for p in module.body if isinstance(p, Param)
    ]:  # embedding-as-input: the table is the host's
        found.add(_EMBEDDING, shared)
    if towers is not None:
        towers.params(found)
    check_files(module)
    return found


# --------------------------------------------------------------------------------------------------- programs


def _write_programs(
    dies: list[Module],
    folder: Path,
    options: BuildOptions,
    places: Places,
    context: CompileContext,
    beside: LibrariesBeside | None,
) -> tuple[list[DieProgram], Memory, HostFacts]:
    """Code, command program and IR of every die and length; returns their entries for the manifest, what the
    programs need of memory, and the processor that the code is for.
    """
    parts = [(seqlen, index, die) for seqlen in options.seqlens for index, die in enumerate(dies)]
    programs: list[DieProgram] = []
    with ProgramWriter(folder, places, context, libraries=beside is None) as writer:
        for seqlen, index, die in track(parts, "programs and host code", "program", show=context.progress):
            with collector_paused():  # for one program at a time: what it leaves behind is cyclic
                programs.append(writer.write(die, index, seqlen, _files(options, seqlen)))
    host = HostFacts.of(context.host_target()) if beside is None else beside.finish()
    return programs, writer.memory, host


def _parts(dies: list[Module], folder: Path, options: BuildOptions) -> list[Part]:
    """Every die's program of every length."""
    return [
        _files(options, seqlen).part(folder, die, index, seqlen)
        for seqlen in options.seqlens
        for index, die in enumerate(dies)
    ]


def _files(options: BuildOptions, seqlen: int) -> ProgramFiles:
    return ProgramFiles(
        f"batch_{options.batch}/seqlen_{seqlen}/llm_die{{die}}",
        f"batch_{options.batch}/common_die{{die}}.params",
    )


# --------------------------------------------------------------------------------------------------- the rest


def _check_model_files(checkpoint: Path) -> None:
    """`TyirError` for files beside the weights that would break the artifacts when they are run: links to
    nothing, JSON and text that are none, end tokens that are no tokens.
    """
    problems: list[Diagnostic] = []
    help = "restore the file of the original model, or remove it"
    for name in _COPIED:
        path = checkpoint / name
        if not os.path.lexists(path):
            continue
        try:
            if path.suffix != ".json":
                _check_data_file(path, help)
                continue
            content = read_json_object(path, help)
            if name in ("config.json", "generation_config.json"):
                token_ids(content, "eos_token_id", path, path.read_bytes())
        except TyirError as error:
            problems.extend(error.diagnostics)
    if problems:
        raise TyirError(problems)


def _check_data_file(path: Path, help: str) -> None:
    """`TyirError` for a file that is no JSON and cannot be read, or, where it is a text, is none."""
    try:
        data = read_regular(path, MAX_JSON)
    except OSError as error:
        raise TyirError(f"cannot read {path.name}: {error.strerror}", where=str(path), help=help) from None
    if path.suffix in _TEXTS:
        utf8_text(data, path, help)
    elif (instead := stand_in(data)) is not None:
        raise TyirError(f"{path.name} is {instead[0]}, not the file itself", where=str(path), help=instead[1])


def _copy_model_files(checkpoint: Path, folder: Path, others: Mapping[str, bytes]) -> None:
    for name in _COPIED:
        if name in others:
            (folder / name).write_bytes(others[name])
        elif (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    (folder / _EMPTY).write_bytes(b"")


def _copy_machine(folder: Path, context: CompileContext) -> str:
    """What the manifest says of the machine: its name, or the file of one's own, copied to the artifacts."""
    if Path(context.chosen_machine).suffix != ".toml":
        return str(context.chosen_machine)
    shutil.copyfile(context.chosen_machine, folder / MACHINE)
    return MACHINE


def _write_buffer_config(
    folder: Path, options: BuildOptions, programs: list[DieProgram], memory: Memory
) -> None:
    """Per die, what a host must allocate (caches, inputs and outputs of a step) and the peak bytes of each
    length's program in DRAM and SRAM.
    """
    config: dict[str, Any] = {
        "max_kv_cache_size": options.max_kv,
        "seq_len_list": list(options.seqlens),
        "dev_count": options.dies,
        "dies": {},
    }
    for program in programs:
        aliased = {t.alias for t in program.outputs if t.alias is not None}
        entry = config["dies"].setdefault(
            str(program.die), {"kv_cache": {}, "inputs": {}, "outputs": {}, "memory": {}}
        )
        if (program.die, program.seqlen) in memory:
            entry["memory"][str(program.seqlen)] = memory[program.die, program.seqlen]
        for i, tensor in enumerate(program.inputs):
            if i in aliased:
                entry["kv_cache"][tensor.name] = {"shape": tensor.shape, "dtype": tensor.dtype}
            else:
                entry["inputs"].setdefault(str(program.seqlen), {})[tensor.name] = {
                    "shape": tensor.shape,
                    "dtype": tensor.dtype,
                }
        for tensor in program.outputs:
            if tensor.alias is None:
                entry["outputs"].setdefault(str(program.seqlen), {})[tensor.name] = {
                    "shape": tensor.shape,
                    "dtype": tensor.dtype,
                }
    (folder / _BUFFER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _write_manifest(
    folder: Path,
    module: Module,
    options: BuildOptions,
    programs: list[DieProgram],
    context: CompileContext,
    machine: str,
    vision: Vision | None,
    digests: Mapping[str, str],
    host: HostFacts,
) -> None:
    import importlib.metadata

    build: Build = {
        "tyir": importlib.metadata.version("tyir"),
        "tvm": importlib.metadata.version("apache-tvm"),
        "host": {
            "mcpu": host.mcpu,
            "features": host.features,
            "activations": host.activations,
        },
        "machine": machine,
    }
    if context.schedule is not None:
        build["host"]["schedule"] = str(context.schedule)
    model = to_json(module.attributes.get("tyir.model", DictAttr()))
    files: dict[str, FileRecord] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        known = digests.get(name)  # as it was hashed on its way out
        files[name] = file_record(path) if known is None else {"size": path.stat().st_size, "sha256": known}
    manifest = Manifest(
        model=model, options=options, build=build, programs=tuple(programs), files=files, vision=vision
    )
    (folder / MANIFEST).write_text(manifest.to_json())
