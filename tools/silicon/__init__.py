"""The timing engine against command programs executed by multiprocessors of a GPU."""
