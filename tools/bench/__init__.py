"""Benchmarks: `python -m tyir.tools.bench.NAME`."""
