"""A GPU for Triton to compile for and, up to the call into CUDA, launch on, where there is none."""

from typing import Any

import triton
from fused_resnet.triton_kernels import launch
from triton.backends.compiler import GPUTarget

#: Of every launch, the kernel's hash, the grid and the arguments.
launched: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class _Driver:
    """Of GPUs of ``launch.planned_arch``. Each architecture is a device, so that what was compiled
    for it is found by its number."""

    utils = _Utils()

    def get_current_device(self) -> int:
        return launch.planned_arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", launch.planned_arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        # Between grid and arguments: the stream, the function, and what hooks are told.
        return lambda *args: launched.append((metadata.hash, args[:3], args[9:]))


triton.runtime.driver.set_active(_Driver())
