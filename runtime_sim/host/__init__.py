"""How long the compiled host code takes on a processor that was measured."""
