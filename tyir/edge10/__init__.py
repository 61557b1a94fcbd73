"""The Edge10 chip as the lowering and the simulator both see it: bytes of programs, memories, times of
commands.
"""
