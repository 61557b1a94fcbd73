"""Answers over HTTP from compiled artifacts, and the same from Python: what tyir-serve is made of."""
