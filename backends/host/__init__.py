"""Code for the machine that compiles: one TVM kernel per op, linked to a shared object."""
