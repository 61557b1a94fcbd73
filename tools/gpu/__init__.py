"""Kernel models of GPUs: measure, validate, predict."""
