"""TensorRT 10.3 to 11.x and TensorRT-RTX: engines compiled from graphs, and run."""

from edgetrack.backends.trt.backend import REQUIRED_API, TensorRTBackend

__all__ = ["REQUIRED_API", "TensorRTBackend"]
