"""Built-in backends. Importing this package registers them; a backend that cannot run here registers all the same and
says why in ``unavailable()``, so that the report of :func:`ptq4arvg_kernels.doctor` is complete.

The result for a NaN is not part of the arithmetic: a backend that can read its data raises (the reference does), the
others state which code they produce.
"""

from ..registry import register_backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

REFERENCE_PRIORITY = 0
CPU_PRIORITY = 10
TRITON_PRIORITY = 20
CUDA_PRIORITY = 30

register_backend(CudaBackend(), CUDA_PRIORITY)
register_backend(TritonBackend(), TRITON_PRIORITY)
register_backend(CpuBackend(), CPU_PRIORITY)
register_backend(ReferenceBackend(), REFERENCE_PRIORITY)
