"""The workers of a Ray cluster, for pieces of a compile or of a sweep (`tyir.backends.workers`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tyir.diagnostics import TyirError
from tyir.process.extras import require

__all__ = ["RayWorkers", "ray_workers"]

Piece = TypeVar("Piece")
_RETRIES = 5  # of a piece whose worker is gone


class RayWorkers:
    """Connected to the cluster at `address` ("auto": the one of this machine) until the process ends.

    `TyirError` when Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        require("--ray", "ray")
        import ray

        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise TyirError(
                    f"there is no Ray cluster at '{address}': {str(error).splitlines()[0]}",
                    help="start one: ray start --head on this machine, then --ray auto",
                ) from None
        self._tasks: dict[Callable[..., Any], Any] = {}

    @property
    def count(self) -> int:
        """The processors that the cluster has now."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def run(self, make: Callable[..., Piece], *arguments: Any) -> Piece:
        """What a function gives in a worker; one that is lost has it made again by another."""
        if make not in self._tasks:
            self._tasks[make] = self._ray.remote(num_cpus=1, max_retries=_RETRIES)(make)
        try:
            made: Piece = self._ray.get(self._tasks[make].remote(*arguments))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TyirError):
                raise TyirError(error.cause.diagnostics) from None
            raise
        except self._ray.exceptions.RayError as error:
            raise TyirError(
                f"the Ray cluster has no worker left for a piece: {str(error).splitlines()[0]}",
                help="ray status shows its machines; without --ray this one does all",
            ) from None
        return made


def ray_workers(address: str | None) -> RayWorkers | None:
    """The workers that `--ray` asks for: none where it is not given."""
    return None if address is None else RayWorkers(address)
