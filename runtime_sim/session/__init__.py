"""Running tokens through compiled artifacts.

Sessions, chunks, sampling, saved caches, serving, and the engines behind them.
"""
