"""Analytic models of library kernels on machines that were measured.

Tiles, waves, bytes and launches; apart from the event-driven engine of `runtime_sim/timing/engine.py`.

One function per kind of kernel, each returning nanoseconds for one call in a graph; `steps` adds them up to a
step of a whole model. The command engine is for programs that are known command by command.  The inner
program of a library kernel is not known; these models search the library's tile shapes instead.  They use the
same quantities (transfers at a sustained rate, matrix time by blocks, launch) but they are not the
event-driven core.
"""
