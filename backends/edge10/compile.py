"""From a module at any stage to a folder of artifacts: the whole back end, readable top to bottom in
`compile_module`.

Everything is written into a folder beside the target, which takes its place when the manifest is written
(`tyir.backends.replacing`).  A failure or an interrupt leaves what was there before, and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tyir.artifacts.agreement import interface_of
from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
)
from tyir.backends import replacing
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.backends.edge10.memory.check import check_memory
from tyir.backends.edge10.memory.summary import memory_summary
from tyir.backends.edge10.params import ParamsFile, write_params
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal, Param
from tyir.edge10.binary import encode
from tyir.execution.entry_points import entry_point
from tyir.execution.weights import CheckpointReader, check_files, checkpoint_of
from tyir.layers import location_by_path
from tyir.manifest import (
    MACHINE,
    MANIFEST,
    Build,
    BuildOptions,
    DieProgram,
    Manifest,
    file_record,
    recorded,
    settled,
)
from tyir.passes.pipelines import remaining_pipeline
from tyir.pipeline import PassContext, run_pipeline
from tyir.printer import print_op
from tyir.process.progress import track
from tyir.process.stopwatch import Stopwatch
from tyir.stages import stage_of
from tyir.targets.machine import load_machine
from tyir.text.json_files import read_json_object, token_ids
from tyir.types import i64

__all__ = ["CompileContext", "check_target", "compile_module", "to_program"]

EDGE10: Final = "edge10"
_BUFFER_CONFIG, _EMPTY, _EMBEDDING = "buffer_config.json", "empty.bin", "embedding.params"
Memory = dict[tuple[int, int], dict[str, int]]  # (die, length) -> bytes by kind, `memory_plan.memory_summary`

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
)


@dataclass
class CompileContext:
    """What a compile carries along: where it reports, whether it shows progress, and what it builds for.

    `binary`: command programs as bytes (`.bin`) instead of text (`.edge10`).  `machine`: a known machine's
    name, or a machine file, which goes to the artifacts; None is the one a module was cut for, or edge10.
    `files`: what is to lie beside the artifacts, by name, where the checkpoint folder holds no such file.
    """

    watch: Stopwatch = field(default_factory=Stopwatch)
    progress: bool = False
    mcpu: str | None = None
    binary: bool = False
    machine: str | Path | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    passes: PassContext = field(default_factory=PassContext)

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
    _check_model_files(checkpoint_of(module))
    stage, source, asked = _stage(module), module.clone(), settled(options, module)
    with context.watch.stage("passes"):
        options = to_program(module, asked, context)
    dies = [m for m in module.body if isinstance(m, Module)]
    wanted = replace(asked, seqlens=options.seqlens)
    check_memory(dies, wanted, source, stage, context.chosen_machine)
    target = out / f"{options.dies}die"
    with replacing.replacing(target, _writes(checkpoint_of(module))) as folder:
        with context.watch.stage("weights"):
            constants = _write_weights(dies, folder, options, module, context)
        programs, memory = _write_programs(dies, folder, options, constants, context)
        with context.watch.stage("manifest"):
            _copy_model_files(checkpoint_of(module), folder, context.files)
            machine = _copy_machine(folder, context)
            _write_buffer_config(folder, options, programs, memory)
            _write_manifest(folder, module, options, programs, context, machine)
    return target


def to_program(module: Module, asked: BuildOptions, context: CompileContext) -> BuildOptions:
    """Run the passes that a module has not been through; returns what it is now built with.

    Its locations then follow from the ops' attributes alone and results have no names, which get numbers when
    they are written: artifacts are the same bytes with and without debug information, and whether the module
    has been a file on the way or not.
    """
    pipeline = remaining_pipeline(_stage(module), asked, str(context.chosen_machine), recorded(module))
    run_pipeline(module, pipeline, context.passes)
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
_OWN_FOLDERS: Final = re.compile(r"batch_\d+(/seqlen_\d+)?")
_PROGRAM_FILES: Final = re.compile(r"batch_\d+/(common_die\d+|seqlen_\d+/llm_die\d+)\.\w+")


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


def _program_folder(options: BuildOptions, seqlen: int) -> str:
    return f"batch_{options.batch}/seqlen_{seqlen}"


# ---------------------------------------------------------------------------------------------------- weights


def _functions(die: Module, seqlen: int) -> list[Func]:
    """A die's entry function for a sequence length and what it calls."""
    by_name = {str(f.sym_name): f for f in die.body if isinstance(f, Func)}
    main = entry_point(die, seqlen)
    called = dict.fromkeys(c.callee.leaf for c in main.walk_type(Call))
    return [*(by_name[name] for name in called), main]


def _write_weights(
    dies: list[Module], folder: Path, options: BuildOptions, module: Module, context: CompileContext
) -> dict[tuple[int, Param], tuple[ParamsFile, str]]:
    """Write all `.params`; returns where each die's parameter went: tensors of all lengths in common_die{i},
    those of one length beside its program.
    """
    places: dict[tuple[int, Param], tuple[ParamsFile, str]] = {}
    files: list[ParamsFile] = []

    def add(die: int, params: list[Param], name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = ParamsFile(path, params)
        files.append(file)
        places.update({(die, p): (file, name) for p in params})

    for index, die in enumerate(dies):
        params = [p for p in die.body if isinstance(p, Param)]
        users = {
            s: {g.symbol.leaf for f in _functions(die, s) for g in f.walk_type(GetGlobal)}
            for s in options.seqlens
        }
        own = {
            s: [p for p in params if [t for t in users if p.sym_name in users[t]] == [s]]
            if len(users) > 1
            else []
            for s in users
        }
        owned = {p for ps in own.values() for p in ps}
        common = [p for p in params if p not in owned]
        add(index, common, f"batch_{options.batch}/common_die{index}.params")
        for seqlen in options.seqlens:
            add(index, own[seqlen], f"{_program_folder(options, seqlen)}/llm_die{index}.params")
    if shared := [
        p for p in module.body if isinstance(p, Param)
    ]:  # embedding-as-input: the table is the host's
        files.append(ParamsFile(folder / _EMBEDDING, shared))
    check_files(module)
    write_params(files, CheckpointReader(checkpoint_of(module)), progress=context.progress)
    return places


# --------------------------------------------------------------------------------------------------- programs


def _write_programs(
    dies: list[Module],
    folder: Path,
    options: BuildOptions,
    places: dict[tuple[int, Param], tuple[ParamsFile, str]],
    context: CompileContext,
) -> tuple[list[DieProgram], Memory]:
    """Code, command program and IR of every die and length; returns their entries for the manifest and what
    the programs need of memory.
    """
    from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library

    target = HostTarget() if context.mcpu is None else HostTarget(mcpu=context.mcpu)
    machine = load_machine(context.chosen_machine)
    search = Search()
    programs: list[DieProgram] = []
    memory: Memory = {}
    built: dict[tuple[str, ...], Path] = {}
    parts = [(seqlen, index, die) for seqlen in options.seqlens for index, die in enumerate(dies)]
    for seqlen, index, die in track(parts, "programs and host code", "program", show=context.progress):
        place = _program_folder(options, seqlen)
        with context.watch.stage(f"edge10 s{seqlen} die{index}"):
            lowered = lower_die(die, seqlen, machine, search=search)
            memory[index, seqlen] = memory_summary(lowered)
            _write_command_program(lowered, folder / _command_program(place, index, context))
        with context.watch.stage(f"host code s{seqlen} die{index}"):
            kernels = assign_kernels(_functions(die, seqlen))
            library = folder / place / f"llm_die{index}.so"
            same = built.setdefault(tuple(sorted(kernels)), library)
            if same is library:
                build_library(kernels, target, library)
            else:  # kernels of one name are one program: dies with equal shapes share a library's bytes
                shutil.copyfile(same, library)
        program = _die_program(die, index, seqlen, place, _command_program(place, index, context))
        text = print_op(_artifact_ir(die, index, seqlen, places), locations=False)
        (folder / program.ir).write_text(text)
        programs.append(program)
    return programs, memory


def _command_program(place: str, die: int, context: CompileContext) -> str:
    return f"{place}/llm_die{die}.{'bin' if context.binary else 'edge10'}"


def _write_command_program(lowered: Module, path: Path) -> None:
    if path.suffix == ".bin":
        path.write_bytes(encode(lowered))
    else:
        path.write_text(print_op(lowered))


def _artifact_ir(
    die: Module, index: int, seqlen: int, places: dict[tuple[int, Param], tuple[ParamsFile, str]]
) -> Module:
    """The die's program as the runtime walks it: functions with their kernels named, weights by reference to
    the `.params`.
    """
    module = Module.empty(f"die{index}")
    functions = _functions(die, seqlen)
    used = {g.symbol.leaf for f in functions for g in f.walk_type(GetGlobal)}
    for param in [p for p in die.body if isinstance(p, Param) and p.sym_name in used]:
        file, name = places[index, param]
        module.body.append(file.global_for(param, name))
    for function in functions:
        module.body.append(function.clone())
    module.set_attribute("tyir.die", IntegerAttr(index, i64))
    module.set_attribute("tyir.stage", StringAttr("program"))
    return module


def _die_program(die: Module, index: int, seqlen: int, place: str, commands: str) -> DieProgram:
    main = _functions(die, seqlen)[-1]
    inputs, outputs = interface_of(main)
    return DieProgram(
        die=index,
        seqlen=seqlen,
        function=str(main.sym_name),
        library=f"{place}/llm_die{index}.so",
        program=commands,
        ir=f"{place}/llm_die{index}.ir",
        constants=f"{place}/llm_die{index}.params",
        params=f"{Path(place).parent.as_posix()}/common_die{index}.params",
        inputs=inputs,
        outputs=outputs,
    )


# --------------------------------------------------------------------------------------------------- the rest


def _check_model_files(checkpoint: Path) -> None:
    """`TyirError` for files beside the weights that would break the artifacts when they are run: JSON that is
    none, end tokens that are no tokens.
    """
    problems: list[Diagnostic] = []
    for name in _COPIED:
        path = checkpoint / name
        if path.suffix != ".json" or not path.exists():
            continue
        try:
            content = read_json_object(path, "restore the file of the original model, or remove it")
            if name in ("config.json", "generation_config.json"):
                token_ids(content, "eos_token_id", path, path.read_bytes())
        except TyirError as error:
            problems.extend(error.diagnostics)
    if problems:
        raise TyirError(problems)


def _copy_model_files(checkpoint: Path, folder: Path, others: Mapping[str, bytes]) -> None:
    for name in _COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
        elif name in others:
            (folder / name).write_bytes(others[name])
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
) -> None:
    import importlib.metadata

    from tyir.backends.host.tvm_host import HostTarget

    target = HostTarget() if context.mcpu is None else HostTarget(mcpu=context.mcpu)
    build: Build = {
        "tyir": importlib.metadata.version("tyir"),
        "tvm": importlib.metadata.version("apache-tvm"),
        "host": {"mcpu": target.mcpu, "features": target.features()},
        "machine": machine,
    }
    model = to_json(module.attributes.get("tyir.model", DictAttr()))
    files = {
        p.relative_to(folder).as_posix(): file_record(p) for p in sorted(folder.rglob("*")) if p.is_file()
    }
    manifest = Manifest(model=model, options=options, build=build, programs=tuple(programs), files=files)
    (folder / MANIFEST).write_text(manifest.to_json())


def to_json(attribute: Attribute) -> Any:
    """An attribute of plain values as Python data."""
    if isinstance(attribute, DictAttr):
        return {k: to_json(v) for k, v in attribute.items()}
    if isinstance(attribute, ArrayAttr):
        return [to_json(a) for a in attribute]
    if isinstance(attribute, DenseArrayAttr):
        return list(attribute.values)
    if isinstance(attribute, (StringAttr, IntegerAttr, FloatAttr, BoolAttr)):
        return attribute.value
    return str(attribute)
