"""The kinds of fusion, one to a file; `lowering/fusions.py` lists them in order."""
