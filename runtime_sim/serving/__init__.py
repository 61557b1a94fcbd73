"""Serving: which tokens run in which step, on this computer or on the simulator's clock."""
