"""`ty`: the tensor dataflow of a language model, between the imported graph and a die's program.

Shapes use b = batch, s = tokens of this step, H = query heads, G = key/value heads, D = head dimension.
Activations are f16; every reduction accumulates in f32 and rounds once, at the result.

The names of this package are those that its modules list in `__all__`.
"""

from __future__ import annotations

from tyir.dialects.ty.attention import *
from tyir.dialects.ty.choice import *
from tyir.dialects.ty.elementwise import *
from tyir.dialects.ty.layers import *
from tyir.dialects.ty.tensors import *
from tyir.dialects.ty.weights import *
