"""What vLLM asks of a platform, and nothing of a device: the artifacts' runtime is in the worker."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from vllm.platforms.interface import Platform, PlatformEnum

from tyir.manifest import Manifest
from vllm_tyir import TESTED
from vllm_tyir.sampling import check
from vllm_tyir.settings import Execution, fit, manifest_of

__all__ = ["TyirPlatform"]


class TyirPlatform(Platform):
    """tyir's artifacts, executed by their runtime in the process of vLLM's engine."""

    _enum = PlatformEnum.OOT
    device_name = "tyir"
    device_type = "cpu"  # where vLLM's own tensors are
    dispatch_key = "CPU"
    dist_backend = "gloo"
    supported_quantization: ClassVar[list[str]] = []  # all: what config.json says is in the artifacts already
    _manifest: ClassVar[Manifest | None] = None  # of what this process serves

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def import_kernels(cls) -> None:
        """None: vLLM's may be for another processor."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """None, as above."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "tyir"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 0  # vLLM allocates none: caches are the runtime's

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """There is one."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.manual_seed(seed)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> None:
        """It is set already: a block is a slot."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """`ValueError` for what artifacts cannot do, in the words of vLLM's options."""
        import vllm

        if vllm_config.model_config is None:
            return
        if vllm.__version__ not in TESTED:
            logging.getLogger("vllm").warning(
                "vllm-tyir was tested with vLLM %s, this is %s", ", ".join(TESTED), vllm.__version__
            )
        Execution.of(vllm_config)
        cls._manifest = manifest_of(vllm_config.model_config.model)
        fit(vllm_config, cls._manifest)

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """`ValueError` for a request that these artifacts cannot answer."""
        if cls._manifest is not None and hasattr(params, "temperature"):
            check(params, cls._manifest)
