"""The towers of a vision-language model: `visual/` of an artifact folder, a program for each size.

visual/constant_die{i}.params              weights of die i that all sizes share
visual/vit_die{i}.so .edge10 .ir .params   programs of the first size, with tables of its own
visual/size_{W}x{H}/vit_die{i}...          those of the others
compute_rope_param.so .edge10 .ir .params  of models with positions on several axes (`rope_program`)
visual/aot_config.json buffer_config.json  what a host must know and allocate, beside the manifest
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tyir.artifacts.json_attributes import to_json
from tyir.artifacts.programs import DieProgram
from tyir.artifacts.schema import checked
from tyir.artifacts.vision import VISION_EXPONENT, ImageSize, Rope, Vision, VisionSize, VisionSplit
from tyir.backends.edge10.programs import Memory, ProgramFiles, ProgramWriter
from tyir.backends.edge10.rope_program import RopeProgram
from tyir.backends.edge10.weight_files import Places, WeightFiles
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Param
from tyir.execution.entry_points import entry_points
from tyir.layers import location_by_path
from tyir.passes.pipelines import tower_pipeline
from tyir.pipeline import run_pipeline
from tyir.printer import print_op
from tyir.stages import stage_of
from tyir.vision.graphs import GRAPH, VISION, graph_kind, graphs_of

if TYPE_CHECKING:
    from tyir.backends.edge10.compile import CompileContext

__all__ = ["Towers", "make_towers", "split_towers"]

FACTS: Final = "tyir.vision"
_FOLDER: Final = "visual"
_STRATEGIES: Final[Mapping[VisionSplit, str]] = {"cost": "cost", "heads": "split", "rows": "rows"}


def split_towers(module: Module) -> dict[str, Module]:
    """The towers of a module that has some, by name, each as a module of its own; the module keeps its
    language model alone.
    """
    names = [name for name, f in graphs_of(module).items() if graph_kind(f) == VISION]
    if not names or FACTS not in module.attributes:
        return {}
    towers: dict[str, Module] = {}
    for name in names:
        towers[name] = module.clone()
        run_pipeline(towers[name], f"extract-graph{{graph={name}}}")
    run_pipeline(module, "extract-graph{graph=main}")
    return towers


class Towers:
    """Towers as programs of dies, ready to be written: made by `make_towers`."""

    def __init__(
        self,
        towers: Mapping[str, Module],
        facts: Any,
        dies: int,
        die_map: tuple[int, ...],
        rope: RopeProgram | None,
    ) -> None:
        self.dies, self.die_map, self.facts, self.rope = dies, die_map, facts, rope
        self.said = [_said(tower, name) for name, tower in towers.items()]
        self.sizes: list[list[Module]] = [
            [m for m in t.body if isinstance(m, Module)] for t in towers.values()
        ]
        self._own: dict[Param, bool] = {}
        for die in range(dies):
            self._find_shared([modules[die] for modules in self.sizes])

    def _find_shared(self, modules: list[Module]) -> None:
        """Which parameters of a die all sizes have, by name and expression; those come first in each."""
        texts = [{str(p.sym_name): print_op(p, locations=False) for p in _params(m)} for m in modules]
        for module, mine in zip(modules, texts):
            for param in _params(module):
                name = str(param.sym_name)
                self._own[param] = any(other.get(name) != mine[name] for other in texts)
            for param in [p for p in _params(module) if self._own[p]]:
                last = next(reversed(_params(module)))
                if param is not last:
                    param.detach().insert_after(last)

    def files(self, size: int) -> ProgramFiles:
        """How a size's files are called."""
        name = self.image(size)[0].name
        folder = _FOLDER if size == 0 else f"{_FOLDER}/size_{name}"
        return ProgramFiles(f"{folder}/vit_die{{die}}", f"{_FOLDER}/constant_die{{die}}.params")

    def image(self, size: int) -> list[ImageSize]:
        """The sizes of pictures that share a program."""
        return self.said[size][0]

    def params(self, files: WeightFiles) -> None:
        """Adds the files of weights."""
        for die in range(self.dies):
            first = [p for p in _params(self.sizes[0][die]) if not self._own[p]]
            name = self.files(0).shared(die)
            common = files.add(name, first)
            for size, modules in enumerate(self.sizes):
                own = [p for p in _params(modules[die]) if self._own[p]]
                private = self.files(size).name(die, "params")
                file = files.add(private, own)
                for param in own:
                    files.places.add(die, param, file, private)
            by_name = {str(p.sym_name): p for p in first}
            for modules in self.sizes:
                for param in [p for p in _params(modules[die]) if not self._own[p]]:
                    common.slots[param] = common.slots[by_name[str(param.sym_name)]]
                    files.places.add(die, param, common, name)
        if self.rope is not None:
            self.rope.params(files)

    def write(self, folder: Path, places: Places, context: CompileContext) -> Vision:
        """The programs; returns the manifest's section."""
        sizes: list[VisionSize] = []
        memory: list[Memory] = []
        for size, modules in enumerate(self.sizes):
            images, order = self.said[size]
            patches = images[0].patches
            with ProgramWriter(folder, places, context) as writer:
                programs = tuple(
                    writer.write(module, die, patches, self.files(size)) for die, module in enumerate(modules)
                )
            sizes += [VisionSize(image, tuple(order), programs) for image in images]
            memory.append(writer.memory)
        facts = {**self.facts, "dies": self.dies, "die_map": self.die_map}
        content = {**facts, "sizes": [asdict(size) for size in sizes]}
        vision = checked(Vision, content, "the module's tyir.vision", "import the model again")
        if self.rope is not None:
            with ProgramWriter(folder, places, context) as writer:
                vision = replace(vision, rope=replace(self.rope.rope, program=self.rope.write(writer)))
        self._write_configs(folder, vision, memory)
        return vision

    def _write_configs(self, folder: Path, vision: Vision, memory: list[Memory]) -> None:
        """What TyLLM's tools look for beside the programs."""
        configs: dict[str, Any] = {
            "aot_config.json": {
                "dev_count": vision.dies,
                "die_map": vision.die_map or tuple(range(vision.dies)),
                "sizes": [
                    {**asdict(s.image), "patches": s.image.patches, "program": s.programs[0].library}
                    for s in vision.sizes
                ],
            },
            "buffer_config.json": {
                "dev_count": vision.dies,
                "sizes": {
                    self.image(size)[0].name: _buffers(self.program_of(vision, size), memory[size])
                    for size in range(len(self.sizes))
                },
            },
        }
        for name, content in configs.items():
            path = folder / _FOLDER / name
            path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    def program_of(self, vision: Vision, size: int) -> tuple[DieProgram, ...]:
        """The programs of a grid."""
        name = self.image(size)[0].name
        return next(s.programs for s in vision.sizes if s.image.name == name)


def _buffers(programs: tuple[DieProgram, ...], memory: Memory) -> dict[str, Any]:
    def shapes(tensors: Any) -> dict[str, Any]:
        return {t.name: {"shape": t.shape, "dtype": t.dtype} for t in tensors}

    return {
        str(p.die): {
            "inputs": shapes(p.inputs),
            "outputs": shapes(p.outputs),
            "memory": memory[p.die, p.seqlen],
        }
        for p in programs
    }


def _dies(tower: Module) -> list[Module]:
    return [m for m in tower.body if isinstance(m, Module)]


def _params(module: Module) -> list[Param]:
    return [op for op in module.body if isinstance(op, Param)]


def _said(tower: Module, name: str) -> tuple[list[ImageSize], list[int]]:
    """The sizes of a tower and the order of its patches."""
    die = next(m for m in tower.body if isinstance(m, Module))
    (entry,) = entry_points(die).values()
    said = to_json(entry.attributes[GRAPH]) if GRAPH in entry.attributes else {}
    if not isinstance(said, dict) or "images" not in said:
        raise TyirError(f"@{name} does not say for which sizes of pictures it is", help="import it again")
    images = [checked(ImageSize, image, f"{GRAPH} of @{name}", "import it again") for image in said["images"]]
    return images, list(said.get("order", []))


def make_towers(
    towers: Mapping[str, Module],
    module: Module,
    dies: int,
    die_map: tuple[int, ...],
    max_kv: int,
    context: CompileContext,
) -> Towers:
    """The towers that `split_towers` has taken out of a module, as programs of `dies`; their rows go to
    language programs with caches of `max_kv` tokens.
    """
    exponent = VISION_EXPONENT if context.vision_exponent is None else context.vision_exponent
    for name, tower in towers.items():
        patches = _patches(tower, name)
        machine = str(context.chosen_machine)
        strategy = _STRATEGIES[context.vision_split]
        pipeline = tower_pipeline(stage_of(tower) or "", patches, dies, die_map, machine, exponent, strategy)
        run_pipeline(tower, pipeline, context.passes)
        for op in tower.walk():
            op.loc = location_by_path(op)
            for value in op.results:
                value.name = None
    facts: dict[str, Any] = {**to_json(module.attributes[FACTS]), "exponent": exponent}
    rope = facts.get("rope")
    if rope is not None:
        rope = checked(Rope, rope, f"rope of the module's {FACTS}", "import the model again")
    return Towers(towers, facts, dies, die_map, None if rope is None else RopeProgram(rope, max_kv))


def _patches(tower: Module, name: str) -> int:
    """Rows of a tower's input."""
    said = to_json(next(f for f in tower.body if isinstance(f, Func)).attributes[GRAPH])
    (first, *_) = said["images"]
    rows, columns = first["grid"]
    return int(rows * columns)
