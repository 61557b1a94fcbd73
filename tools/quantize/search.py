"""The search through a whole model: layer after layer, each written down before the next begins.

    OUT.search/state.json                what the search was asked; another question starts anew
    OUT.search/layer_0007.safetensors    scales, ranges and numbers of a layer, its report in the metadata
    OUT.search/states_0008.safetensors   what enters the next layer
    OUT.search/gradient_0008.safetensors where the loss counts: see `tyir.tools.quantize.loss_terms`

A layer's file appears when it is complete, after the states that follow it: who comes again after an
interrupt goes on behind the last layer that is there, with the same bytes as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tyir.backends.checkpoint.writer import Rounded
from tyir.diagnostics import TyirError
from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.layers import is_named_in
from tyir.process.memory import return_free_memory
from tyir.process.progress import Bar
from tyir.tools.quantize.arithmetic import is_finite
from tyir.tools.quantize.by_rows import threads_for
from tyir.tools.quantize.layer_search import LayerResult, LinearReport, ScaledChannels, search_layer
from tyir.tools.quantize.loss_terms import gradient_file, read_state, write_gradients
from tyir.tools.quantize.settings import QuantizeSettings, Work, work_for
from tyir.tools.quantize.streamed_model import StreamedModel

__all__ = ["Found", "scaled_channels", "search"]

Tensor = Any
_VERSION: Final = 2
_STATE: Final = "state.json"
_ROUNDED: Final = ("q", "scales", "zeros")
_T = TypeVar("_T")


class _Reading(Mapping[str, _T]):
    """What lies in files, by module path: read each time it is asked for, and not held."""

    def __init__(self, files: dict[str, Path], read: Callable[[Path, str], _T]) -> None:
        self._files, self._read = files, read

    def __getitem__(self, path: str) -> _T:
        return self._read(self._files[path], path)

    def __contains__(self, path: object) -> bool:
        return path in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _array(kind: str) -> Callable[[Path, str], Any]:
    def read(file: Path, path: str) -> Any:
        with safe_open(file, framework="np") as opened:
            return opened.get_tensor(f"{path}.{kind}")

    return read


def _numbers(file: Path, path: str) -> Rounded:
    q, scales, zeros = (_array(kind)(file, path) for kind in _ROUNDED)
    return q, scales, zeros


@dataclass
class Found:
    """What a search chose: see `LayerResult`, for all layers.  Arrays stay in the layers' files until they
    are asked for.
    """

    table: AwqTable
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    reports: dict[int, list[LinearReport]] = field(default_factory=dict)


def scaled_channels(module: Any, is_kept: Callable[[str], bool], device: str) -> list[ScaledChannels]:
    """The channels of a module at stage `ty` that can be scaled, those left out that a kept linear reads."""
    from tyir.passes._scale_groups import scale_groups

    return [
        ScaledChannels(
            group.producer,
            group.readers,
            None if group.kind == "norm" else torch.tensor(group.rows, device=device),
            group.head,
            group.repeats,
        )
        for group in scale_groups(module)
        if not any(is_kept(path) for path in group.readers)
    ]


def search(
    model: StreamedModel,
    windows: Tensor,
    groups: list[ScaledChannels],
    settings: QuantizeSettings,
    folder: Path,
    progress: bool = False,
) -> Found:
    """Search all layers on windows [S, T] of tokens; `folder` keeps what is done.

    `TyirError` names the layer whose values are not finite, and group sizes that do not divide.
    """
    kept = settings.modules_to_not_convert

    def is_kept(path: str) -> bool:
        return is_named_in(path, kept)

    shapes = [m.shape for m in model.linears(0) if not is_kept(f"{model.paths[0]}.{m.path}")]
    work = work_for(settings, model.depth, shapes)
    _check_group_size(model, settings, is_kept)
    return_free_memory()
    weights = sum(n * k for n, k in shapes)
    with threads_for(weights, windows.numel()), _reproducible():
        by_loss = settings.objective == "loss"
        store = _Store(folder, _question(model, windows, settings, work))
        done = store.done()
        if by_loss and done < model.depth:
            write_gradients(model, windows, folder, _write_state)
        states = store.states(done, model.device) if done else None
        if states is None:
            exact = model.embedded(windows)
            states = (exact, exact.clone())
        else:
            model.embedded(windows[:1])  # what layers are called with
        with Bar(settings.method, model.depth - done, "layer", show=progress) as bar:
            for index in range(done, model.depth):
                of_layer = [g for g in groups if g.readers[0].startswith(model.paths[index] + ".")]
                gradient = read_state(gradient_file(folder, index), model.device) if by_loss else None
                result = search_layer(model, index, states, of_layer, settings, work, is_kept, gradient)
                _advance(model, index, states, result, settings)
                store.write(index, result, states)
                del result
                return_free_memory()
                bar.advance()
    return store.found(model.depth, _table_settings(model, settings))


def _advance(
    model: StreamedModel,
    index: int,
    states: tuple[Tensor, Tensor],
    result: LayerResult,
    settings: QuantizeSettings,
) -> None:
    """Take the states through the layer, in place; the plain tensors are read again, not kept beside."""
    exact, rough = states
    plain = model.tensors(index)
    model.advance(index, plain, exact)
    del plain
    if settings.sequential:
        model.advance(index, result.tensors, rough)
    for state in states:
        if not is_finite(state):
            raise TyirError(
                f"the values that leave {model.paths[index]} are not finite",
                help="mend the checkpoint: a weight of that layer holds NaN or values that overflow",
            )


def _check_group_size(
    model: StreamedModel, settings: QuantizeSettings, is_kept: Callable[[str], bool]
) -> None:
    bad = {
        f"{model.paths[i]}.{m.path}": m.shape[1]
        for i in range(model.depth)
        for m in model.linears(i)
        if m.shape[1] % settings.group_size and not is_kept(f"{model.paths[i]}.{m.path}")
    }
    if bad:
        path, channels = next(iter(bad.items()))
        fits = next(g for g in (64, 32, 16, 8, 4, 2, 1) if g < settings.group_size and channels % g == 0)
        raise TyirError(
            f"group size {settings.group_size} does not divide the {channels} input channels of {path}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            help=f"use --group-size {fits}, or leave it as it is: --skip {path.rpartition('.')[2]}",
        )


@contextmanager
def _reproducible() -> Iterator[None]:
    """Equal inputs give equal bits, on one machine and with one number of threads."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _question(model: StreamedModel, windows: Tensor, settings: QuantizeSettings, work: Work) -> str:
    """Everything that the answer depends on, hashed."""
    stamps = {name: str(stamp) for name, stamp in sorted(model.opened.checkpoint.stamps.items())}
    text = json.dumps(
        [
            _VERSION,
            asdict(settings),
            asdict(work),
            stamps,
            dict(model.opened.checkpoint.config),
            hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            torch.__version__,
            torch.get_num_threads(),
        ],
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _table_settings(model: StreamedModel, settings: QuantizeSettings) -> AwqSettings:
    return AwqSettings(
        bits=settings.bits,
        group_size=settings.group_size,
        zero_point=settings.zero_point,
        model_type=str(model.opened.checkpoint.config.get("model_type", "")),
        modules_to_not_convert=settings.modules_to_not_convert,
        lm_head=settings.lm_head,
    )


class _Store:
    """The folder of what is done."""

    def __init__(self, folder: Path, question: str) -> None:
        self.folder = folder
        state = folder / _STATE
        try:
            same = json.loads(state.read_text())["question"] == question
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            folder.mkdir(parents=True, exist_ok=True)
            for path in self._files():
                path.unlink()
            _replace(state, lambda path: path.write_text(json.dumps({"question": question}) + "\n"))

    def _files(self) -> list[Path]:
        return [
            *self.folder.glob("layer_*.safetensors"),
            *self.folder.glob("states_*.safetensors"),
            *self.folder.glob("entering_*.safetensors"),
            *self.folder.glob("gradient_*.safetensors"),
            *self.folder.glob("*.partial"),
        ]

    def _layer(self, index: int) -> Path:
        return self.folder / f"layer_{index:04}.safetensors"

    def _states(self, index: int) -> Path:
        return self.folder / f"states_{index:04}.safetensors"

    def done(self) -> int:
        """How many layers are."""
        count = 0
        while self._layer(count).exists():
            count += 1
        return count

    def states(self, index: int, device: str) -> tuple[Tensor, Tensor] | None:
        """What enters a layer."""
        path = self._states(index)
        if not path.exists():
            return None
        with safe_open(path, framework="pt", device=device) as file:
            return file.get_tensor("exact"), file.get_tensor("rough")

    def write(self, index: int, result: LayerResult, states: tuple[Tensor, Tensor]) -> None:
        """Note a layer; what entered it is not needed any more."""
        exact, rough = (state.cpu().contiguous() for state in states)
        _replace(
            self._states(index + 1), lambda path: save_file({"exact": exact, "rough": rough.clone()}, path)
        )
        tensors = {
            **{f"{path}.scale": t for path, t in result.scales.items()},
            **{f"{path}.range": t for path, t in result.ranges.items()},
            **{
                f"{path}.{kind}": t
                for path, each in result.rounded.items()
                for kind, t in zip(_ROUNDED, each, strict=True)
            },
        }
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        report = json.dumps([asdict(r) for r in result.reports])
        _replace(self._layer(index), lambda path: save_file(tensors, path, {"report": report}))
        self._states(index).unlink(missing_ok=True)

    def found(self, depth: int, settings: AwqSettings) -> Found:
        """All layers."""
        files: dict[str, dict[str, Path]] = {"scale": {}, "range": {}, _ROUNDED[0]: {}}
        reports = {}
        for index in range(depth):
            with safe_open(self._layer(index), framework="np") as file:
                reports[index] = [LinearReport(**r) for r in json.loads(file.metadata()["report"])]
                for name in list(file.keys()):
                    path, _, kind = name.rpartition(".")
                    if kind in files:
                        files[kind][path] = self._layer(index)
        table = AwqTable(
            settings,
            _Reading(files["scale"], _array("scale")),
            _Reading(files["range"], _array("range")),
        )
        return Found(table, _Reading(files[_ROUNDED[0]], _numbers), reports)


def _write_state(path: Path, state: Tensor) -> None:
    _replace(path, lambda temporary: save_file({"state": state.cpu().contiguous()}, temporary))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that appears when it is complete, and on the disk."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
