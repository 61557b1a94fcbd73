"""Running tokens through compiled artifacts.

Sessions, chunks, sampling, saved caches, and the engines behind them.
"""
