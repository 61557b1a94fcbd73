"""What `tyir-sim` is given: an artifact folder, the programs of all dies, or a report that it saved; and the
lengths it is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import TyirError
from tyir.process.files import download_hint
from tyir.runtime_sim.timing.predictor import Pictures, Predictor
from tyir.runtime_sim.timing.summary import Summary, summarize
from tyir.targets.machine import Machine, load_machine
from tyir.text.json_files import read_json_object

if TYPE_CHECKING:
    from tyir.ir import Op
    from tyir.manifest import Manifest
    from tyir.runtime_sim.timing.program import EdgeProgram
    from tyir.targets.collectives import CollectiveNeed

__all__ = ["Choice", "Lengths", "Source", "common_lengths", "is_report", "open_source", "read_report"]


@dataclass(frozen=True)
class Choice:
    """A machine to simulate: `name` (None: the one that was compiled for) with constants changed."""

    name: str | None
    changed: dict[str, float]

    def machine(self, compiled_for: Callable[[], Machine]) -> Machine:
        machine = load_machine(self.name) if self.name is not None else compiled_for()
        return machine.with_overrides(self.changed)


@dataclass(frozen=True)
class Lengths:
    """A prompt's tokens, and the cached tokens of the decode step; None: not asked for."""

    prompt: int | None
    pos: int | None


@dataclass(frozen=True)
class Source:
    """What can be simulated, what to call it, and the closed form of its collectives where it is known."""

    predictor: Predictor
    name: str
    least: Callable[[int], Sequence[CollectiveNeed]] | None = None

    def summary(self, lengths: Lengths, *, curves: bool = True, tornado: bool = False) -> Summary:
        """All figures; `TyirError` when the cache does not hold these lengths."""
        prompt, pos = self.lengths(lengths)
        return summarize(
            self.predictor, self.name, prompt, pos, least=self.least, curves=curves, tornado=tornado
        )

    def lengths(self, asked: Lengths) -> tuple[int, int]:
        """Prompt length and decode position.

        By default a prompt of 128 tokens (less if the cache is smaller) and the position after it.
        """
        capacity, shortest = self.predictor.capacity, min(self.predictor.seqlens)
        prompt = asked.prompt if asked.prompt is not None else max(min(128, capacity - shortest), 1)
        pos = asked.pos if asked.pos is not None else min(prompt, capacity - shortest)
        if not 1 <= prompt <= capacity:
            raise TyirError(
                f"--prompt-tokens {prompt} is not in 1..{capacity}, the cache's positions",
                help=f"the nearest possible is {min(max(prompt, 1), capacity)}",
            )
        if pos < 0:
            raise TyirError(
                f"--pos {pos} is negative", help="it is the number of tokens in the cache, 0 for the first"
            )
        if pos > capacity - shortest:
            raise TyirError(
                f"--pos {pos} leaves no room for a step of {shortest} in a cache of {capacity}",
                help=f"give a position in 0..{capacity - shortest}",
            )
        return prompt, pos

    def within(self, asked: Lengths) -> Lengths:
        """The nearest lengths that the cache holds."""
        capacity, shortest = self.predictor.capacity, min(self.predictor.seqlens)
        return Lengths(
            min(asked.prompt, capacity) if asked.prompt is not None else None,
            min(asked.pos, capacity - shortest) if asked.pos is not None else None,
        )


def common_lengths(sources: Sequence[Source], asked: Lengths) -> Lengths:
    """The lengths that all can be asked about, so that their figures may be compared: the smallest of what
    each takes by itself, where none is asked for.
    """
    prompts, positions = zip(*(s.lengths(asked) for s in sources))
    return Lengths(min(prompts), min(positions))


def is_report(path: Path) -> bool:
    """Whether a file is a saved report: JSON, which neither text nor bytes of programs begin like."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def read_report(path: Path) -> Summary:
    """The report that `tyir-sim --report json -o` has saved; `TyirError` for another file."""
    help = f"simulate again: tyir-sim ARTIFACTS --report json -o {path}"
    values = read_json_object(path, help)
    if set(values) == {"a", "b"}:
        raise TyirError(
            f"{path} is a comparison, not the report of one simulation",
            help="give the two reports that it was made of",
        )
    return Summary.from_json(values, str(path))


def open_source(paths: Sequence[str | Path], choice: Choice, *, check: bool = True) -> Source:
    """An artifact folder, or the programs (`.edge10`, `.bin`) of all dies for one length.

    `check`: whether the artifacts' hashes are verified.  `TyirError` for anything else.
    """
    given = [Path(path) for path in paths]
    if missing := [str(p) for p in given if not p.exists()]:
        hint = download_hint(missing[0])
        raise TyirError(
            f"{', '.join(missing)} does not exist",
            help=f"{hint}, and compiled (tyir-compile)"
            if hint
            else "give the folder that tyir-compile printed, for example out/4die",
        )
    if all(p.is_file() for p in given):
        return _of_programs(given, choice)
    if len(given) > 1:
        raise TyirError(
            "more than one folder given",
            help=(
                "give one artifact folder, or the .edge10 files of all dies for one length; --compare takes"
                " two folders"
            ),
        )
    from tyir.execution.artifacts import Artifacts
    from tyir.process.cache import checked_files
    from tyir.runtime_sim.timing.program import load_program, load_programs, machine_of

    artifacts = Artifacts.open(given[0], check=check, seen=checked_files())
    manifest = artifacts.manifest
    loaded: dict[int, list[EdgeProgram]] = {}

    def programs_of(seqlen: int) -> list[EdgeProgram]:
        if seqlen not in loaded:
            loaded[seqlen] = load_programs(artifacts, seqlen)
        return loaded[seqlen]

    machine = choice.machine(lambda: machine_of(artifacts))
    pictures = [
        Pictures(
            size.image.name,
            size.image.tokens,
            cache(lambda size=size: [load_program(artifacts, program) for program in size.programs]),
        )
        for size in (manifest.vision.sizes if manifest.vision is not None else ())
    ]
    lengths, capacity = manifest.options.seqlens, manifest.options.max_kv
    rope = manifest.vision.rope if manifest.vision is not None else None
    filling = rope.program if rope is not None else None
    tables = None if filling is None else cache(lambda: load_program(artifacts, filling))
    options = manifest.options
    predictor = Predictor(
        programs_of, lengths, capacity, machine, pictures, tables, options.choice, options.steps_ahead
    )
    return Source(predictor, str(given[0]), _least(manifest))


def _of_programs(paths: Sequence[Path], choice: Choice) -> Source:
    from tyir.edge10.binary import read_program
    from tyir.runtime_sim.timing.program import EdgeProgram

    programs = [EdgeProgram(read_program(p)) for p in paths]
    lengths = {p.seqlen for p in programs}
    if len(lengths) > 1:
        raise TyirError(
            f"the programs are for different lengths: {', '.join(map(str, sorted(lengths)))}",
            help="give the files of all dies of one length",
        )
    machine = choice.machine(lambda: _named_machine(programs[0]))
    name = str(paths[0]) if len(paths) == 1 else f"{len(programs)} programs"
    return Source(Predictor(lambda s: programs, tuple(lengths), _capacity(programs), machine), name)


def _capacity(programs: Sequence[EdgeProgram]) -> int:
    """Positions of the cache, from its buffers."""
    return min(
        (
            _int_attribute(b, "tyir.capacity") or b.type.static_shape[2]
            for p in programs
            for b in p.buffers.values()
            if b.kind == "kv"
        ),
        default=1 << 30,
    )


def _int_attribute(op: Op, name: str) -> int | None:
    from tyir.attributes import IntegerAttr

    value = op.attributes.get(name)
    return value.value if isinstance(value, IntegerAttr) else None


def _named_machine(program: EdgeProgram) -> Machine:
    """The machine that a program names."""
    from tyir.attributes import StringAttr

    name = program.module.attributes.get("tyir.machine")
    return load_machine(name.value if isinstance(name, StringAttr) else "edge10")


def _least(manifest: Manifest) -> Callable[[int], Sequence[CollectiveNeed]] | None:
    """The closed form of the collectives on the main die, for a step of so many tokens.

    None where the manifest does not say the model's sizes.
    """
    from tyir.passes.select_output import parse_output
    from tyir.targets.collectives import minimal_collectives

    layers, hidden, vocabulary = (
        manifest.model.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(vocabulary, int)):
        return None
    options = manifest.options
    heads, width = manifest.model.get("num_attention_heads"), manifest.model.get("head_dim")
    if not isinstance(heads, int) or heads < 1:
        if options.kv_parts > 1:
            return None
        heads = 1  # nothing is asked of them
    width = width if isinstance(width, int) else hidden // heads
    of_group = heads * options.kv_parts // (options.dies // options.pp)
    return lambda tokens: minimal_collectives(
        layers,
        hidden,
        vocabulary,
        tokens * options.batch,
        options.dies,
        stages=options.pp,
        top_k=parse_output(options.output),
        embedding_as_input=options.embedding_as_input,
        kv_parts=options.kv_parts,
        heads=of_group,
        width=width,
        rows=options.batch if options.takes_row(tokens) else None,
    )
