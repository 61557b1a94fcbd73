"""Running tokens through compiled artifacts: sessions, chunks, sampling, saved caches and the engines behind
them.
"""
