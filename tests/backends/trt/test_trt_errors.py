"""What TensorRT really said, copied from its issue tracker and from TensorRT-RTX itself."""

import re

import pytest

from edgetrack.backends.trt.errors import KNOWN_ERRORS, build_error, run_error
from edgetrack.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceMemoryError,
    EdgeTrackError,
    EngineBuildError,
    EngineError,
    EngineMismatchError,
)

REBUILD = "run: edgetrack build --backend tensorrt --force"
# The log of TensorRT 10.3 on a machine whose memory ran out, github.com/NVIDIA/TensorRT #4258.
OUT_OF_MEMORY = (
    "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
    "Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:"
    "117] autotuning: User allocator error allocating 15485030400-byte buffer",
    "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}.)",
    "Requested amount of GPU memory (15485030400 bytes) could not be allocated. There may not be "
    "enough free memory for allocation to succeed.",
)
# TensorRT-RTX 1.7 and 1.4 say this wherever there is no driver.
NO_DRIVER_1_7 = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient "
    "for CUDA runtime version))"
)
NO_DRIVER_1_4 = (
    "[checkMacros.cpp::catchCudaError::229] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:229)"
)

# What was said while an engine was loaded or run → what is raised, and what its hint says.
RECORDED: dict[str, tuple[str, type[EdgeTrackError], str]] = {
    "memory for a context, 8.6 #3017": (
        "[executionContext.cpp::nvinfer1::rt::ExecutionContext::ExecutionContext::470] Error Code "
        "2: OutOfMemory (no further information)",
        DeviceMemoryError,
        "smaller model",
    ),
    "memory for CUDA itself, YOLOX #515": (
        "[runtime.cpp::isCudaInstalledCorrectly::41] Error Code 6: Internal Error (CUDA "
        "initialization failure with error 2. Please check your CUDA installation)",
        DeviceMemoryError,
        "memory is short",
    ),
    "memory, RTX": (
        "The engine requires 92341248 bytes of GPU memory, but the current GPU only has 1 bytes",
        DeviceMemoryError,
        "memory is short",
    ),
    "an old GPU, 10 #4359": (
        "IBuilder::buildSerializedNetwork: Error Code 9: API Usage Error (Target GPU SM 61 is not "
        "supported by this TensorRT release.)",
        BackendUnavailableError,
        "not among those that this TensorRT supports",
    ),
    "an old GPU, 10.0 #3826": (
        "[caskUtils.cpp::nvinfer1::rt::task::trtSmToCask::193] Error Code 1: Internal Error "
        "(Unsupported SM: 0x601)",
        BackendUnavailableError,
        "not among those that this TensorRT supports",
    ),
    "a GPU that RTX has no kernels for": (
        "The engine cannot run on this GPU, which has compute capability 9.0. TensorRT-RTX does "
        "not support this compute capability, so the engine cannot be rebuilt for it.",
        BackendUnavailableError,
        "not among those that this TensorRT supports",
    ),
    "another GPU, 10.8 insightface #2882": (
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is "
        "generated on an incompatible device, expecting compute 8.9 got compute 8.6, please "
        "rebuild.)",
        EngineMismatchError,
        f"built for another GPU, {REBUILD}",
    ),
    "another GPU, RTX": (
        "The engine cannot run on this GPU, which has compute capability 7.5. Rebuild the engine "
        "for compute capability 7.5 with IBuilderConfig::setComputeCapability",
        EngineMismatchError,
        f"built for another GPU, {REBUILD}",
    ),
    "another platform, pytorch/TensorRT #3090": (
        "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
        "plan->header.pad == expectedPlatformTag failed.Platform specific tag mismatch detected. "
        "TensorRT plan files are only supported on the target runtime platform they were created "
        "on.)",
        EngineMismatchError,
        f"built for another GPU, {REBUILD}",
    ),
    "another version, 10 ComfyUI-Upscaler-Tensorrt #34": (
        "[stdArchiveReader.cpp::stdArchiveReaderInitCommon::47] Error Code 1: Serialization "
        "(Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does "
        "not match. Note: Current Version: 228, Serialized Engine Version: 239)",
        EngineMismatchError,
        f"another TensorRT wrote it, {REBUILD}",
    ),
    "another version, JetPack 4 #2105": (
        "[stdArchiveReader.cpp::StdArchiveReader::35] Error Code 1: Serialization (Serialization "
        "assertion safeVersionRead == safeSerializationVersion failed.Version tag does not match. "
        "Note: Current Version: 0, Serialized Engine Version: 43)",
        EngineMismatchError,
        f"another TensorRT wrote it, {REBUILD}",
    ),
    "another version, 8.2 pytorch/TensorRT #1059": (
        "The engine plan file is not compatible with this version of TensorRT, expecting library "
        "version 8.2.4 got 8.2.3, please rebuild.",
        EngineMismatchError,
        f"another TensorRT wrote it, {REBUILD}",
    ),
    "another version, RTX": (
        "IRuntime::deserializeCudaEngine: Error Code 1: Internal Error (Failed due to an old "
        "deserialization call on a newer plan file.",
        EngineMismatchError,
        f"another TensorRT wrote it, {REBUILD}",
    ),
    "damaged, RTX": (
        "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
        "plan.header.size == blobSize failed. In parsePlan at /_src/runtime/dispatch/"
        "runtime.cpp:780)",
        EngineMismatchError,
        f"damaged, or not an engine, {REBUILD}",
    ),
    "capture, 8.6 #3011": (
        "[executionContext.cpp::handleTrainStationRunnerPhase1::146] Error Code 1: Cuda Runtime "
        "(operation not permitted when stream is capturing)",
        EngineError,
        "exit_decision='host'",
    ),
    "no driver, 8.6 #2913": (
        "CUDA initialization failure with error: 35. Please check your CUDA installation:  "
        "http://docs.nvidia.com/cuda/cuda-installation-guide-linux/index.html",
        BackendUnavailableError,
        "update the driver",
    ),
    "no driver, RTX 1.7": (NO_DRIVER_1_7, BackendUnavailableError, "update the driver"),
    "another driver error, 7.2 #1052": (
        "CUDA initialization failure with error 222. Please check your CUDA installation",
        BackendUnavailableError,
        "edgetrack doctor",
    ),
    "a fault on the GPU, SAM3-TensorRT #18": (
        "[checkMacros.cpp::catchCudaError::212] Error Code 1: Cuda Runtime (an illegal memory "
        "access was encountered)",
        DeviceError,
        "start it again",
    ),
    "nothing known": ("something else", EngineError, "edgetrack doctor"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_what_tensorrt_says_becomes_one_error_that_says_what_to_do(case: str) -> None:
    said, kind, hint = RECORDED[case]

    error = run_error("x.plan", expected="tensorrt to read it", messages=[said], backend="tensorrt")

    assert type(error) is kind
    assert str(error).startswith(f"x.plan: expected tensorrt to read it, got: {said[:40]}")
    assert hint in str(error).rpartition("; ")[2]


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.words[:20])
def test_every_row_of_the_table_is_met_by_something_recorded(known: object) -> None:
    recorded = [OUT_OF_MEMORY[2], *(said for said, _, _ in RECORDED.values())]

    firsts = [next((k for k in KNOWN_ERRORS if re.search(k.words, s)), None) for s in recorded]

    assert known in firsts


def test_memory_that_ran_out_in_a_build_says_how_much_was_asked_for() -> None:
    error = build_error("g.onnx", expected="an engine", messages=OUT_OF_MEMORY, backend="tensorrt")

    assert type(error) is EngineBuildError
    assert "(15485030400 bytes) could not be allocated" in str(error)
    assert "memory is short" in str(error).rpartition("; ")[2]


def test_no_implementation_alone_hints_at_memory_too() -> None:
    error = build_error("g.onnx", expected="an engine", messages=[OUT_OF_MEMORY[2]], backend="x")

    assert "memory is short" in str(error).rpartition("; ")[2]


def test_what_is_for_another_gpu_at_load_is_a_build_error_in_a_build() -> None:
    said, _, _ = RECORDED["another GPU, RTX"]
    absent, _, _ = RECORDED["no driver, 8.6 #2913"]

    assert type(build_error("g", expected="", messages=[said], backend="")) is EngineBuildError
    assert type(build_error("g", expected="", messages=[absent], backend="")) is (
        BackendUnavailableError
    )


@pytest.mark.parametrize("consequence", [NO_DRIVER_1_7, NO_DRIVER_1_4])
def test_complaints_that_follow_from_a_missing_driver_do_not_hide_the_cause(
    consequence: str,
) -> None:
    error = run_error(
        "x.plan", expected="", messages=[consequence, "odd graph", consequence], backend=""
    )

    assert "got: odd graph; " in str(error)


def test_nothing_said_is_said_so() -> None:
    error = run_error("x.plan", expected="a run", messages=[], backend="tensorrt")

    assert "got: no reason given; " in str(error)
