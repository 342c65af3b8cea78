"""The exceptions that edgetrack raises.

    EdgeTrackError
    ├── BundleError              a bundle cannot be read or written
    │   ├── BundleFormatError    its manifest lacks a key, or is of a newer format
    │   └── BundleTamperedError  a file differs from the hash in the manifest
    ├── EngineError              an engine cannot be built, found or run
    │   ├── EngineNotFoundError  nothing was built for this bundle, precision and backend
    │   ├── EngineMismatchError  it was built by another version or for another device
    │   └── EngineBuildError     the compiler refused the graph, or there was no room
    ├── BackendUnavailableError  the backend is unknown or not installed
    ├── DeviceError              a GPU is not there, or a call of its driver failed
    │   └── DeviceMemoryError    it has too little free memory
    ├── SourceError              a video, folder or camera cannot be read, or a video written
    │   ├── SourceEndedError     it ended before its own frame count said so
    │   └── FrameSizeError       its frames change size
    ├── TrackerStateError        a call came too early, or after close
    ├── DataError                a data set is missing or malformed
    ├── CalibrationError         crops cannot be calibrated on, or a cache does not fit
    ├── CheckpointError          weights do not fit the model
    └── TrainingError            training went wrong

Bad arguments raise ``ValueError`` or ``TypeError``. Every message has the form
*where: expected X, got Y; do Z*.
"""

__all__ = [
    "BackendUnavailableError",
    "BundleError",
    "BundleFormatError",
    "BundleTamperedError",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "DeviceMemoryError",
    "EdgeTrackError",
    "EngineBuildError",
    "EngineError",
    "EngineMismatchError",
    "EngineNotFoundError",
    "FrameSizeError",
    "SourceEndedError",
    "SourceError",
    "TrackerStateError",
    "TrainingError",
    "package_missing",
]

_INSTALL_HINTS = {
    "cv2": "run: pip install 'edgetrack[opencv]', or on a Jetson make the venv with "
    "--system-site-packages to get the system's own OpenCV",
    "matplotlib": "run: pip install 'edgetrack[plot]'",
    "pycuda": "run: pip install 'edgetrack[cuda]', which compiles it with the CUDA toolkit; on a "
    "Jetson first run: export PATH=/usr/local/cuda/bin:$PATH CPATH=/usr/local/cuda/include "
    "LIBRARY_PATH=/usr/local/cuda/lib64",
}


class EdgeTrackError(Exception):
    """Base of every error that edgetrack raises itself."""


class BundleError(EdgeTrackError):
    """A bundle cannot be read or written."""


class BundleFormatError(BundleError):
    """The manifest lacks a key, has a wrong value, or is of a newer format."""


class BundleTamperedError(BundleError):
    """A file of the bundle is missing or differs from its hash in the manifest."""


class EngineError(EdgeTrackError):
    """An engine cannot be built, found or run."""


class EngineNotFoundError(EngineError):
    """No engine was built for this bundle, precision and backend."""


class EngineMismatchError(EngineError):
    """An engine was built by another version, or for another device."""


class EngineBuildError(EngineError):
    """The compiler refused the graph, or there was no room to write."""


class BackendUnavailableError(EdgeTrackError):
    """The backend is unknown, or its package is not installed."""


class DeviceError(EdgeTrackError):
    """A GPU is not there, or a call of its driver failed."""


class DeviceMemoryError(DeviceError):
    """A GPU has too little free memory."""


class SourceError(EdgeTrackError):
    """A video, folder, camera or stream cannot be read, or a video cannot be written."""


class SourceEndedError(SourceError):
    """A source ended before its own frame count said it would."""


class FrameSizeError(SourceError):
    """Frames of one source differ in size."""


class TrackerStateError(EdgeTrackError):
    """A call came before ``init``, or after ``close``."""


class DataError(EdgeTrackError):
    """A data set is missing or malformed."""


class CalibrationError(EdgeTrackError):
    """Crops cannot be calibrated on, or a calibration cache does not fit the model."""


class CheckpointError(EdgeTrackError):
    """Weights do not fit the model, or a file is not a checkpoint."""


class TrainingError(EdgeTrackError):
    """Training went wrong in a way that another step cannot mend."""


def package_missing(package: str, error: ImportError) -> BackendUnavailableError:
    """The error to raise where an optional package cannot be imported; it says what to install."""
    hint = _INSTALL_HINTS[package]
    return BackendUnavailableError(f"{package}: expected to import it, got: {error}; {hint}")
