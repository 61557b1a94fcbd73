"""Traits: facts about an op that passes and the verifier rely on.

A trait is a bare class, named in the op's declaration.
"""

from __future__ import annotations

__all__ = [
    "Collective",
    "Commutative",
    "ComputedTensor",
    "ConstantLike",
    "Elementwise",
    "Gated",
    "InPlace",
    "IsolatedFromAbove",
    "NoTerminator",
    "Pure",
    "StoredTensor",
    "Symbol",
    "SymbolTable",
    "SymbolUser",
    "Terminator",
    "Trait",
    "WeightReference",
]


class Trait:
    """Base of all traits."""


class Pure(Trait):
    """No side effect, no state: may be deleted when unused, merged when equal, moved."""


class ConstantLike(Trait):
    """No operands; the result depends on properties alone (constants, weight references).

    A class whose `materialize` makes an op of an attribute makes the constants that folders ask for.
    """


class WeightReference(Trait):
    """Its result is the tensor of the symbol that the property `symbol` names."""


class StoredTensor(Trait):
    """A symbol that is a tensor of a file (`tyir.execution.weights.TensorReference` says how)."""


class ComputedTensor(Trait):
    """A symbol that is the tensor its region computes, from symbols that are stored tensors only."""


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


class SymbolUser(Trait):
    """Refers to symbols; its `verify_symbols(tables)` says what is wrong with them (`SymbolTables` of
    `tyir.checking.symbols` knows them).
    """


class SymbolTable(Trait):
    """Its region holds symbols, unique by name."""


class InPlace(Trait):
    """Result 0 is operand 0, updated in place: that operand may have no later use."""


class Collective(Trait):
    """Executed by all dies of the mesh together; never reordered against another collective.

    What the interpreter may run has a method `request(operand)`: what it asks of the other dies
    (`tyir.execution.lockstep`).
    """
