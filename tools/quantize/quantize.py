"""From a checkpoint to a quantised one: `quantize`, what `tyir-quantize` and `tyir.quantize` call."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tyir.backends.checkpoint.writer import Beside, check_source, write_checkpoint
from tyir.backends.replacing import check_target
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Global
from tyir.execution.awq_table import AwqTable
from tyir.execution.weights import CheckpointReader
from tyir.frontends.dense_state import parameter_array
from tyir.frontends.huggingface import OpenedModel, import_model
from tyir.layers import is_named_in
from tyir.passes.pipelines import awq_pipeline
from tyir.pipeline import run_pipeline
from tyir.tools.quantize.arithmetic import dequantized, folded, quantized
from tyir.tools.quantize.by_rows import threads_for
from tyir.tools.quantize.calibration import drawn, generated_windows, text_windows
from tyir.tools.quantize.choice import apart, chosen
from tyir.tools.quantize.layer_search import LinearReport, ScaledChannels
from tyir.tools.quantize.perplexity import (
    Change,
    Perplexity,
    artifact_perplexity,
    model_perplexity,
    window_losses,
)
from tyir.tools.quantize.search import Found, scaled_channels, search
from tyir.tools.quantize.settings import OBJECTIVES, QuantizeSettings, Work, work_for
from tyir.tools.quantize.streamed_model import StreamedModel, Tensors

__all__ = ["TABLE", "Outcome", "Text", "check_device", "perplexity_of", "quantize"]

Tensor = Any
TABLE: Final = "awq.safetensors"
_TOKENS: Final = 1 << 14  # fewer say too little of the loss's gradient
_JUDGING: Final = 64  # windows by which objectives are judged, at most
_GENERATED: Final = 16  # windows of the model's own text, unless more or fewer are asked for


@dataclass(frozen=True)
class Text:
    """A text to measure a perplexity on: a file, and how many of its first characters."""

    path: Path
    characters: int | None = None


@dataclass
class Outcome:
    """What was done: the folder, the errors by layer, and perplexities where they were asked for."""

    out: Path
    settings: QuantizeSettings
    reports: dict[int, list[LinearReport]] = field(default_factory=dict)
    before: Perplexity | None = None
    after: Perplexity | None = None


def quantize(
    folder: Path,
    out: Path,
    settings: QuantizeSettings | None = None,
    *,
    calibration: Path | None = None,
    evaluate: Text | None = None,
    format: str | None = None,
    progress: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Quantise the checkpoint in `folder` into the checkpoint folder `out`.

    `calibration`: a text, JSONL or Parquet file; None: the model's own text.  `format`: "awq", "gptq" or
    "compressed-tensors"; None: awq, or gptq for the method gptq.  Weights of other than 4 bits, which no
    format holds, leave the table alone in `out`.  `out` also gets the table, awq.safetensors.  What is done
    of the search stays in `{out}.search` until `out` is complete: called again, it goes on there.
    Raises `TyirError`.
    """
    settings = settings or QuantizeSettings()
    check_device(settings.device)
    packs = settings.bits == 4
    if packs:
        if not folder.is_dir():
            raise TyirError(
                f"checkpoint folder {folder} does not exist", help="download a model of the hub first"
            )
        check_source(folder)
        check_target(out, lambda name, is_folder: not is_folder)
    elif format is not None:
        raise TyirError(f"format {format} holds weights of 4 bits, not {settings.bits}", help="use --bits 4")
    note = _noting(warn)
    work_folder = out.with_name(out.name + ".search")
    model = StreamedModel(folder, settings.window, settings.device, note)
    module = import_model(folder)
    run_pipeline(module, "to-ty")
    kept = settings.modules_to_not_convert
    groups = scaled_channels(module, lambda path: is_named_in(path, kept), settings.device)
    found = Found(AwqTable(_plain_table(settings)))
    if settings.method != "rtn":
        windows = _calibration(model, calibration, settings)
        found, settings = _searched(model, windows, groups, settings, work_folder, warn, progress)
    work_folder.mkdir(parents=True, exist_ok=True)
    table = work_folder / TABLE
    found.table.save(table)
    outcome = Outcome(out, settings, found.reports)
    if packs:
        run_pipeline(module, awq_pipeline(table))
        write_checkpoint(
            module,
            out,
            format=format or ("gptq" if settings.method == "gptq" else "awq"),
            rounded=found.rounded,
            progress=progress,
            **_around(model.opened, module),
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(table, out / TABLE)
    if evaluate is not None:
        windows = text_windows(folder, evaluate.path, settings.window, evaluate.characters)
        outcome.before = model_perplexity(model, windows, progress=progress)
        if packs:
            written = StreamedModel(out, settings.window, settings.device, note)
            outcome.after = model_perplexity(written, windows, progress=progress)
        else:
            outcome.after = model_perplexity(
                model, windows, _change(model, found, groups, settings), progress
            )
    shutil.rmtree(work_folder)
    return outcome


def perplexity_of(
    folder: Path, text: Text, window: int, device: str = "cpu", progress: bool = False
) -> Perplexity:
    """The perplexity of a checkpoint, or of compiled artifacts through their host engine."""
    windows = text_windows(folder, text.path, window, text.characters)
    if (folder / "manifest.json").is_file():
        return artifact_perplexity(folder, windows, progress)
    return model_perplexity(StreamedModel(folder, window, device), windows, progress=progress)


def check_device(device: str) -> None:
    """`TyirError` for a device that torch does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TyirError(
            f"device '{device}' cannot be used: {str(error).splitlines()[0]}", help="use --device cpu"
        ) from None


def _around(opened: OpenedModel, module: Module) -> dict[str, Any]:
    """What `write_checkpoint` is told of a model that sees pictures: the names of its parameters in the
    source, and those of tower and projector, which stay as they are.
    """
    if not opened.meta.sees:
        return {}
    weights, tensors = opened.weights, opened.checkpoint.tensors
    read = {str(g.sym_name) for g in module.body if isinstance(g, Global)}
    reader = CheckpointReader(opened.checkpoint.folder)

    def array(name: str) -> Any:
        found = np.array(parameter_array(weights, name, reader))
        reader.give_back()
        return found

    outside = dict.fromkeys(
        name for each in opened.meta.state if (name := weights.canonical(each)) not in read
    )
    return {
        "names": {name: tensors[name].key for name in read if name in tensors},
        "beside": [
            Beside(name, tensors[name].key, weights.shape(name), partial(array, name)) for name in outside
        ],
    }


def _noting(warn: Callable[[str], None]) -> Callable[[Diagnostic], None]:
    return lambda diagnostic: warn(diagnostic.message)


def _plain_table(settings: QuantizeSettings) -> Any:
    from tyir.execution.awq_table import AwqSettings

    return AwqSettings(
        bits=settings.bits,
        group_size=settings.group_size,
        zero_point=settings.zero_point,
        modules_to_not_convert=settings.modules_to_not_convert,
        lm_head=settings.lm_head,
    )


def _work(model: StreamedModel, settings: QuantizeSettings) -> Work:
    return work_for(settings, model.depth, [m.shape for m in model.linears(0)])


def _calibration(
    model: StreamedModel, source: Path | None, settings: QuantizeSettings
) -> tuple[Tensor, Tensor]:
    """The windows [S, T] that the search sees, and those of the same text to judge by, [0, T] where
    nothing is to be judged or the text is too short for it.
    """
    work = _work(model, settings)
    if source is None:
        samples = settings.samples or min(work.samples, _GENERATED)
        with threads_for(model.layer_weights, samples * settings.window):
            windows = generated_windows(model.folder, settings.window, samples, settings.seed)
        return windows, windows[:0]
    windows = text_windows(model.folder, source, settings.window)
    if work.both:
        searched, judging = apart(windows)
        seen = drawn(searched, work.samples, settings.seed)
        if len(judging) and seen.numel() >= _TOKENS:
            return seen, drawn(judging, _JUDGING, settings.seed)
    return drawn(windows, work.samples, settings.seed), windows[:0]


def _searched(
    model: StreamedModel,
    windows: tuple[Tensor, Tensor],
    groups: list[ScaledChannels],
    settings: QuantizeSettings,
    folder: Path,
    warn: Callable[[str], None],
    progress: bool,
) -> tuple[Found, QuantizeSettings]:
    """What the search chose, and the settings that it is the outcome of: with the objective, where windows to
    judge by decided between both and rounding to nearest.
    """
    seen, judging = windows
    if not len(judging):
        return search(model, seen, groups, settings, folder, progress), settings

    def losses(found: Found, asked: QuantizeSettings) -> Tensor:
        return window_losses(model, judging, _change(model, found, groups, asked), progress)

    nearest = replace(settings, method="rtn")
    plain = Found(AwqTable(_plain_table(settings)))
    tried = []
    for objective in OBJECTIVES:
        asked = replace(settings, objective=objective)
        tried.append((search(model, seen, groups, asked, folder / objective, progress), asked))
    index = chosen(losses(plain, nearest), [losses(*each) for each in tried])
    if index is None:
        warn("rounding to nearest is kept: on the last part of the calibration text no search was better")
        return plain, nearest
    return tried[index]


def _change(
    model: StreamedModel, found: Found, groups: list[ScaledChannels], settings: QuantizeSettings
) -> Change:
    """A layer's tensors with what the ranges and numbers make of its linears; for tables that no checkpoint
    can be made of.  Scales are taken out again, so that norms stay as they are.
    """
    grid, device = settings.grid, settings.device
    groups = [group for group in groups if group.producer in found.table.scales]
    scales = {g.producer: torch.tensor(found.table.scales[g.producer], device=device) for g in groups}
    columns = {path: g.of_columns(scales[g.producer]) for g in groups for path in g.readers}

    def change(index: int, tensors: Tensors) -> Tensors:
        for linear in model.linears(index):
            path = f"{model.paths[index]}.{linear.path}"
            if is_named_in(path, settings.modules_to_not_convert):
                continue
            rows = None
            for group in groups:
                if group.producer == path and group.rows is not None:
                    rows = torch.ones(linear.shape[0], device=device)
                    rows[group.rows] = scales[path]
            weight = folded(linear.weight(tensors), rows, columns.get(path))
            ranges = found.table.ranges.get(path)
            q, s, z = quantized(weight, None if ranges is None else torch.tensor(ranges, device=device), grid)
            if path in found.rounded:
                q = torch.tensor(found.rounded[path][0], device=device).float()
            weight = dequantized((q, s, z), grid)
            weight = weight / columns[path] if path in columns else weight
            weight = weight if rows is None else weight * rows[:, None]
            tensors[linear.weight_name] = linear.stored(weight)
        return tensors

    return change
