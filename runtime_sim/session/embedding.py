"""The embedding table of artifacts whose programs take embeddings: the host looks tokens up in it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.weights import tensors_of
from tyir.manifest import AGAIN

__all__ = ["embedding_table"]

_FILE: Final = "embedding.params"


def embedding_table(artifacts: Artifacts) -> npt.NDArray[Any]:
    """The table [vocabulary, hidden] f16 of `embedding.params`; `TyirError` unless it has a row for each
    token and the width that the programs take.
    """
    manifest, path = artifacts.manifest, artifacts.path / _FILE
    table = tensors_of(artifacts.map(_FILE), path).get("embedding")
    vocabulary = manifest.model.get("vocab_size")
    hidden = next(t.shape[-1] for t in manifest.programs[0].inputs if t.name == "embeddings")
    wanted = (vocabulary if vocabulary is not None or table is None else table.shape[0], hidden)
    if table is None or table.shape != wanted or table.dtype != np.float16:
        found = "no table" if table is None else f"a table {table.dtype}{list(table.shape)}"
        raise TyirError(f"{path} holds {found}, the programs need float16{list(wanted)}", help=AGAIN)
    return table
