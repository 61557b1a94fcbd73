"""Random AWQ tables for the models that tests import."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tyir.attributes import DictAttr, StringAttr
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.ty import tensor_type
from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.layers import layer_of
from tyir.passes._parameters import ParameterUses
from tyir.passes._scale_groups import scale_groups

__all__ = ["random_table"]


def random_table(
    module: Module, settings: AwqSettings, *, seed: int = 0, largest: float = 4.0, clip: float | None = None
) -> AwqTable:
    """Scales from 1/largest to `largest` for all groups of a module; with `clip` also ranges of the decoder's
    linears, of about that width.
    """
    rng = np.random.default_rng(seed)
    spread = math.log(largest)
    scales = {
        group.producer: np.exp(rng.uniform(-spread, spread, group.channels)).astype(np.float32)
        for group in scale_groups(module)
    }
    ranges = {}
    uses = ParameterUses(module)
    for use in uses if clip is not None else ():
        if isinstance(use.user, ty.Linear) and use.index == 1 and layer_of(use.user) is not None:
            n, k = tensor_type(use.root).static_shape
            high = (clip * rng.uniform(0.5, 1.5, (n, k // settings.group_size))).astype(np.float32)
            low = high if not settings.zero_point else high * rng.uniform(0.8, 1.2, high.shape)
            ranges[uses.path(use)] = np.stack([-low, high]).astype(np.float32)
    model = module.attributes.get("tyir.model")
    kind = model.get("model_type") if isinstance(model, DictAttr) else None
    assert isinstance(kind, StringAttr)
    return AwqTable(replace(settings, model_type=kind.value), scales, ranges)
