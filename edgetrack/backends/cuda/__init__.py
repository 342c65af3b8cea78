"""CUDA: the driver asked directly, the primary context through PyCUDA, and graphs.

``driver`` and ``graphs`` need nothing but the driver's library. ``context`` is what others use; it
imports PyCUDA when a context is opened.
"""

from edgetrack.backends.cuda.context import CudaContext
from edgetrack.backends.cuda.driver import CudaDevice, cuda_driver_version, find_cuda_device
from edgetrack.backends.cuda.memory import DeviceMemory, MappedMemory
from edgetrack.backends.cuda.streams import Event, Function, Module, Stream

__all__ = [
    "CudaContext",
    "CudaDevice",
    "DeviceMemory",
    "Event",
    "Function",
    "MappedMemory",
    "Module",
    "Stream",
    "cuda_driver_version",
    "find_cuda_device",
]
