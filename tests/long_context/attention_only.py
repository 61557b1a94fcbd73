"""A model that is nothing but one attention: token t looks up row t of q, k and v, so that what it computes
can be held against an attention written down anywhere else.

    x = embedding(ids);  q, k, v = x W (each W picks channels);  logits = attention(rope(q), rope(k), v)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tyir.artifacts.json_attributes import to_attribute
from tyir.attributes import DenseElementsAttr, DictAttr, StringAttr, SymbolRefAttr
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Op, Value
from tyir.layers import place
from tyir.location import NameLoc
from tyir.types import TensorType, f16, i64

from .reference import Chunks, frequencies

Array = npt.NDArray[Any]
_FILE = "model.safetensors"


def attention_only(q: Array, k: Array, v: Array, theta: float, chunks: Chunks | None, folder: Path) -> Module:
    """The module at stage `ty` for q [t, H, D], k and v [t, G, D], whose weights lie in `folder`."""
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    rows = np.concatenate([x.reshape(tokens, -1) for x in (q, k, v)], axis=1).astype(np.float16)
    vocabulary, width = max(tokens, heads * dim), rows.shape[1]
    rows = np.pad(rows, ((0, vocabulary - tokens), (0, 0)))
    picks = np.split(np.eye(width, dtype=np.float16), np.cumsum([heads * dim, groups * dim]))
    weights = {"embed": rows, **dict(zip(("wq", "wk", "wv"), picks)), "out": np.eye(vocabulary, heads * dim)}
    weights = {name: np.ascontiguousarray(array, np.float16) for name, array in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _FILE)
    facts: dict[str, Any] = {"vocab_size": vocabulary, "num_hidden_layers": 1}
    if chunks is not None:
        sizes = (chunks.size, chunks.local, chunks.original)
        keys = ("chunk_size", "local_size", "original_max_position_embeddings")
        facts["dual_chunk_attention_config"] = dict(zip(keys, sizes))
    module = Module.empty()
    module.attributes = DictAttr(
        {
            "tyir.stage": StringAttr("ty"),
            "tyir.checkpoint": StringAttr(str(folder)),
            "tyir.model": to_attribute(facts),
        }
    )
    ids = TensorType((1, None), i64)
    function = Func.make("main", [ids, ids], ["input_ids", "position_ids"])

    def add(op: Op) -> Value:
        if op.loc is not None and isinstance(op.loc, NameLoc):
            place(op, op.loc.name)
        return function.body.append(op).results[0]

    def weight(name: str) -> Value:
        kind = TensorType(weights[name].shape, f16)
        offset, nbytes = _extent(folder / _FILE, name)
        module.body.append(
            ty.Global(sym_name=name, type=kind, file=_FILE, key=name, offset=offset, nbytes=nbytes)
        )
        return add(ty.GetGlobal(symbol=SymbolRefAttr(name), result_types=[kind]))

    own = NameLoc("model.layers.0.self_attn")
    x = add(ty.Embedding(weight("embed"), function.args[0]))
    inv_freq = DenseElementsAttr.from_numpy(frequencies(dim, theta).astype(np.float32))
    angles = function.body.append(ty.RopeAngles(function.args[1], inv_freq=inv_freq))
    parts = []
    for name, count in (("wq", heads), ("wk", groups), ("wv", groups)):
        y = add(ty.Linear(x, weight(name), loc=own))
        y = add(ty.Reshape(y, shape=(1, -1, count, dim), loc=own))
        parts.append(y if name == "wv" else add(ty.Rope(y, *angles.results, loc=own)))
    mixed = add(ty.Attention(*parts, scale=dim**-0.5, loc=own))
    flat = add(ty.Reshape(mixed, shape=(1, -1, heads * dim), loc=own))
    function.body.append(Return(values=[add(ty.Linear(flat, weight("out")))]))
    function.refresh_type()
    module.body.append(function)
    return module


def _extent(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in the file, and its bytes."""
    import json

    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    low, high = json.loads(data[8 : 8 + size])[name]["data_offsets"]
    return 8 + size + low, high - low
