"""Where `BatchSession` was before sessions had a folder of their own; programs that import it from here go on."""

from tyir.runtime_sim.session.batch_session import BatchSession

__all__ = ["BatchSession"]
