"""`AutoAWQForCausalLM` as AutoAWQ has it: from_pretrained, quantize, save_quantized.

The model stays in its folder; `quantize` notes what is wanted and `save_quantized` does the work, layer by
layer, so that no more than a layer is ever in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.tools.quantize.settings import QuantizeSettings

__all__ = ["AutoAWQForCausalLM", "settings_of"]

_VERSIONS: Final = ("gemm",)


def settings_of(quant_config: Mapping[str, Any]) -> QuantizeSettings:
    """The settings of AutoAWQ's quant_config: zero_point, q_group_size, w_bit, version ("GEMM"),
    modules_to_not_convert, and TyLLM's lm_head_enable.

    `TyirError` lists keys and versions that are not known.
    """
    known = {
        "zero_point": "zero_point",
        "q_group_size": "group_size",
        "w_bit": "bits",
        "modules_to_not_convert": "modules_to_not_convert",
        "lm_head_enable": "lm_head",
    }
    problems = [
        Diagnostic(f"quant_config has '{key}', which is not known", help=did_you_mean(key, known) or "")
        for key in quant_config
        if key not in known and key != "version"
    ]
    version = str(quant_config.get("version", "GEMM"))
    if version.lower() not in _VERSIONS:
        problems.append(Diagnostic(f"version '{version}' cannot be written", help='use "version": "GEMM"'))
    if problems:
        raise TyirError(problems)
    found = {known[key]: value for key, value in quant_config.items() if key in known}
    found["modules_to_not_convert"] = tuple(found.get("modules_to_not_convert") or ())
    return QuantizeSettings(**found)


class AutoAWQForCausalLM:
    """A checkpoint folder that is going to be quantised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.quant_config: Mapping[str, Any] = {}
        self._calibration: Path | Sequence[str] | None = None
        self._samples: int | None = None
        self._window = 512

    @classmethod
    def from_pretrained(cls, model_path: str | Path, **ignored: Any) -> Self:
        """The model of a folder; arguments that say how AutoAWQ loads it have no meaning here."""
        folder = Path(model_path)
        if not folder.is_dir():
            raise TyirError(
                f"checkpoint folder {folder} does not exist",
                help=f"download a model of the hub first: hf download {folder} --local-dir {folder.name}",
            )
        return cls(folder)

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: str | Path | Sequence[str] | None = None,
        max_calib_samples: int | None = None,
        max_calib_seq_len: int = 512,
        **ignored: Any,
    ) -> None:
        """Note what is wanted, and check it.

        `tokenizer` is not used: the folder's is.  `calib_data`: a file, or texts; None: the model's own.
        """
        self.quant_config = dict(quant_config or {})
        settings_of(self.quant_config)
        if isinstance(calib_data, str | Path):
            self._calibration = Path(calib_data)
            if not self._calibration.is_file():
                raise TyirError(
                    f"calibration file {calib_data} does not exist",
                    help="give a text, .jsonl or .parquet file, or a list of texts",
                )
        else:
            self._calibration = calib_data
        self._samples, self._window = max_calib_samples, max_calib_seq_len

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: str = "5GB") -> Path:
        """Quantise into the folder `save_dir`, which is returned."""
        from dataclasses import replace

        from tyir.tools.quantize.quantize import quantize

        settings = replace(settings_of(self.quant_config), samples=self._samples, window=self._window)
        if self._calibration is None or isinstance(self._calibration, Path):
            return quantize(self.folder, Path(save_dir), settings, calibration=self._calibration).out
        with tempfile.TemporaryDirectory(prefix="tyir-calibration-") as folder:
            lines = Path(folder) / "texts.jsonl"
            lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in self._calibration))
            return quantize(self.folder, Path(save_dir), settings, calibration=lines).out
