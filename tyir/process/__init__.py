"""The running Python process: its cyclic collector, time and memory."""
