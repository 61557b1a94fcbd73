"""Where `BatchSession` was before sessions had a folder of their own; what imports it from here goes on."""

from tyir.runtime_sim.session.batch_session import BatchSession

__all__ = ["BatchSession"]
