"""Traits: facts about an op that passes and the verifier rely on.

A trait is a bare class, named in the op's declaration.
"""

from __future__ import annotations

__all__ = [
    "Collective",
    "Commutative",
    "ConstantLike",
    "Elementwise",
    "Gated",
    "InPlace",
    "IsolatedFromAbove",
    "NoTerminator",
    "Pure",
    "Symbol",
    "SymbolTable",
    "Terminator",
    "Trait",
]


class Trait:
    """Base of all traits."""


class Pure(Trait):
    """No side effect, no state: may be deleted when unused, merged when equal, moved."""


class ConstantLike(Trait):
    """No operands; the result depends on properties alone (constants, weight references)."""


class Commutative(Trait):
    """Operands may be exchanged."""


class Elementwise(Trait):
    """Each element of the result is computed of the elements at its place in the operands, which all have its
    shape: the result may be cut as they are, and may take an operand's place when it has its type.
    """


class Gated(Trait):
    """Two operands, gate and up, and f(gate) * up element by element: the activation of a gated MLP."""


class Terminator(Trait):
    """Must end its block."""


class NoTerminator(Trait):
    """The regions' blocks need no terminator."""


class IsolatedFromAbove(Trait):
    """The regions use no values defined outside."""


class Symbol(Trait):
    """Defines the symbol named by the property `sym_name`."""


class SymbolTable(Trait):
    """Its region holds symbols, unique by name."""


class InPlace(Trait):
    """Result 0 is operand 0, updated in place: that operand may have no later use."""


class Collective(Trait):
    """Executed by all dies of the mesh together; never reordered against another collective."""
