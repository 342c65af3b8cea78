"""The API that trt.py uses, checked against the bindings of every TensorRT that is supported.

NVIDIA publishes the bindings as small wheels of their own. They need nine C functions of the
TensorRT libraries to be imported; stubs of those let them be imported without TensorRT or a GPU.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle

BINDINGS = [
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu13-bindings==10.13.3.9",
    "tensorrt-cu13-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.0.0.114",
    "tensorrt-cu13-bindings==11.4.0.106",
]
STUBS = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""
# What the package `tensorrt` itself consists of.
PACKAGE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
HEADER = """
import re, sys, threading
from pathlib import Path
import tensorrt as trt
assert trt.__version__ == sys.argv[1], trt.__version__

class Stand:
    # Stands for an object of TensorRT: takes what the real class has, with arguments of the number
    # and types that its docstring gives, and answers what it is told to.
    def __init__(self, kind, answers=None):
        self.__dict__.update(kind=kind, answers=answers or {}, seen=[])
    def __setattr__(self, name, value):
        assert isinstance(getattr(self.kind, name), property), name
        self.seen.append((name, value))
    def __getattr__(self, name):
        real = getattr(self.kind, name)
        if isinstance(real, property):
            return self.answers[name]
        def call(*arguments):
            signatures = re.findall(rf"^(?:\\d+\\. )?{name}\\((.*)\\) -> ", real.__doc__, re.M)
            assert any(fits(arguments, s) for s in signatures), (name, arguments, signatures)
            self.seen.append((name, *arguments))
            answer = self.answers.get(name)
            return answer(*arguments) if callable(answer) else answer
        return call

TYPES = {int: "int|SupportsInt", str: "str", bytes: "[Bb]uffer", bool: "bool"}

def fits(arguments, signature):
    parameters = signature.split(", ")[1:]
    needed = [p for p in parameters if " = " not in p]
    return len(needed) <= len(arguments) <= len(parameters) and all(
        re.search(rf"\\b({TYPES.get(type(a), type(a).__name__)})\\b", p.split(": ")[1])
        for a, p in zip(arguments, parameters)
    )
"""
CHECKS = {
    "names": """
from edgetrack.backends.trt import REQUIRED_API
missing = [f"{c}.{n}" for c, names in REQUIRED_API.items() for n in names.split()
           if not hasattr(getattr(trt, c, None), n)]
assert not missing, missing
""",
    "network_flags": """
from edgetrack.backends.trt.builder import network_flags
strongly_typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
assert network_flags(trt) == 1 << int(strongly_typed)
""",
    "configure": """
from edgetrack.backends.trt.builder import WORKSPACE_BYTES, configure
config, pools = Stand(trt.IBuilderConfig), trt.MemoryPoolType
configure(trt, config)
common = [
    ("clear_flag", trt.BuilderFlag.TF32),
    ("max_aux_streams", 0),
    ("profiling_verbosity", trt.ProfilingVerbosity.DETAILED),
]
assert config.seen == [
    ("set_memory_pool_limit", pools.WORKSPACE, WORKSPACE_BYTES), *common
], config.seen
capped = Stand(trt.IBuilderConfig)
configure(trt, capped, free_bytes=900 << 20)
assert capped.seen == [
    ("set_memory_pool_limit", pools.TACTIC_DRAM, 512 << 20),
    ("set_memory_pool_limit", pools.WORKSPACE, 450 << 20),
    *common,
], capped.seen
""",
    "timings": """
from edgetrack.backends.trt.builder import set_timings
def config(*, is_accepted, is_read=True):
    caches = []
    def create(timings):
        caches.append(Stand(trt.ITimingCache) if is_read or not timings else None)
        return caches[-1]
    return caches, Stand(
        trt.IBuilderConfig,
        {"create_timing_cache": create, "set_timing_cache": lambda cache, ignore: is_accepted},
    )
# The docstring's type is the real class, so a stand-in must bear its name.
Stand.__name__ = "ITimingCache"
caches, own = config(is_accepted=True)
assert set_timings(own, b"own") is caches[0]
assert own.seen == [("create_timing_cache", b"own"), ("set_timing_cache", caches[0], False)]
for caches, foreign in (config(is_accepted=False), config(is_accepted=False, is_read=False)):
    assert set_timings(foreign, b"foreign") is caches[1]
    assert foreign.seen[0] == ("create_timing_cache", b"foreign"), foreign.seen
    assert foreign.seen[-2:] == [
        ("create_timing_cache", b""), ("set_timing_cache", caches[1], False)
    ], foreign.seen
""",
    "log": """
from edgetrack.backends.trt.errors import make_log, make_recorder
log = make_log(trt)
log.log(trt.Logger.VERBOSE, "Layers:")
log.log(trt.Logger.ERROR, "wrong")
log.log(trt.Logger.ERROR, "wrong")
log.log(trt.Logger.INTERNAL_ERROR, "very wrong")
log.log(trt.Logger.WARNING, "odd")
log.log(trt.Logger.WARNING, "CUDA initialization failure with error: 35")
assert log.tables == ["Layers:"]
recorder = make_recorder(trt, log)
code = trt.ErrorCodeTRT.INTERNAL_ERROR
assert recorder.report_error(code, "recorded") is True
assert (recorder.num_errors(), recorder.get_error_code(0)) == (1, code)
assert recorder.get_error_desc(0) == "recorded"
assert not recorder.has_overflowed()
recorder.clear()
assert recorder.num_errors() == 0
assert log.take() == [
    "wrong", "very wrong", "recorded", "CUDA initialization failure with error: 35"
]
assert log.take() == []
""",
    "monitor": """
from edgetrack.backends.trt.builder import make_monitor
steps, cancelled = [], threading.Event()
monitor = make_monitor(trt, steps.append, cancelled)
monitor.phase_start("all", None, 2)
monitor.phase_start("part", "all", 2)
assert monitor.step_complete("part", 0)
monitor.phase_finish("part")
cancelled.set()
assert not monitor.step_complete("all", 0)
assert steps == [("part", 0.25), ("all", 0.5)], steps
""",
    "compile": """
from edgetrack.backends.trt import TensorRTBackend
from edgetrack.errors import EngineBuildError
try:
    TensorRTBackend("tensorrt").compile(Path(sys.argv[2]), Path("none.plan"), precision="fp32")
except EngineBuildError as error:  # the stub gives no builder
    assert f"expected a builder from tensorrt {sys.argv[1]}, got: " in str(error), error
else:
    raise AssertionError("expected an error")
""",
    "load": """
from edgetrack.backends.trt import TensorRTBackend
from edgetrack.bundle import Bundle
from edgetrack.errors import EngineError
onnx_path = Path(sys.argv[2])
segment = Bundle.load(onnx_path.parent).segments[0]
try:
    TensorRTBackend("tensorrt").load(onnx_path, segment)
except EngineError as error:  # the stub gives no runtime
    assert "expected tensorrt to make a runtime, got: " in str(error), error
else:
    raise AssertionError("expected an error")
""",
    "run": """
import types
from edgetrack.backends.trt.engine import TensorRTEngine
from edgetrack.bundle import Bundle
from edgetrack.errors import EngineError, EngineMismatchError
plan = Path(sys.argv[2])
segment = Bundle.load(plan.parent).segments[0]
inputs = {t.name: t for t in segment.inputs}
tensors = {t.name: t for t in (*segment.inputs, *segment.outputs)}
names = list(tensors)
modes, kinds = trt.TensorIOMode, {"float32": trt.DataType.HALF, "uint8": trt.DataType.UINT8}

is_rtx = hasattr(trt, "EngineValidity")
valid = (trt.EngineValidity.VALID, 0) if is_rtx else None

def load(
    *, shape_of=lambda name: tensors[name].shape, is_enqueued=True, is_read=True, validity=valid,
    is_bound=True, is_capturable=True,
):
    context = Stand(trt.IExecutionContext, {
        "set_tensor_address": is_bound,
        "is_stream_capturable": is_capturable,
        "execute_async_v3": lambda stream: is_enqueued or runtime.fail("no enqueue") or False,
    })
    engine = Stand(trt.ICudaEngine, {
        "num_io_tensors": len(names),
        "get_tensor_name": lambda i: names[i],
        "get_tensor_mode": lambda name: modes.INPUT if name in inputs else modes.OUTPUT,
        "get_tensor_shape": lambda name: trt.Dims(shape_of(name)),
        "get_tensor_dtype": lambda name: kinds[tensors[name].dtype],
        "device_memory_size_v2": 4096,
        "create_execution_context": context,
    })
    runtime = Stand(trt.Runtime, {
        "deserialize_cuda_engine": lambda plan: engine if is_read else runtime.fail("no plan"),
        "get_engine_validity": validity,
    })
    def fail(text):
        recorder = dict(runtime.seen)["error_recorder"]
        recorder.report_error(trt.ErrorCodeTRT.INTERNAL_ERROR, text)
    runtime.__dict__["fail"] = fail
    class Stub(types.ModuleType):
        Runtime = staticmethod(lambda log: runtime)
        def __getattr__(self, name): return getattr(trt, name)
    loaded = TensorRTEngine(Stub("trt"), plan, segment, backend="tensorrt")
    return loaded, runtime, engine, context

def error_of(kind, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except kind as error:
        return str(error)
    raise AssertionError("expected an error")

loaded, runtime, engine, context = load()
assert runtime.seen[-1] == ("deserialize_cuda_engine", plan.read_bytes())
user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
assert ("create_execution_context", user_managed) == engine.seen[-1], engine.seen
assert loaded.dtypes["search_region"] == "uint8" and loaded.dtypes["score"] == "float16"
assert set(loaded.dtypes) == set(tensors) and loaded.scratch_bytes == 4096

addresses = {name: 0x7F00000000 + 256 * i for i, name in enumerate([*names, "another"])}
assert "none of ['score']" in error_of(
    ValueError, loaded.bind_device, {n: 256 for n in names if n != "score"}, scratch=0, stream=5
)
assert context.seen == []
loaded.bind_device(addresses, scratch=0x7F10000000, stream=5)
loaded.enqueue_on(7)
assert context.seen == [
    ("set_device_memory", 0x7F10000000, 4096),
    *(("set_tensor_address", name, addresses[name]) for name in names),
    ("execute_async_v3", 5),
    *([("is_stream_capturable", 5)] if is_rtx else []),
    ("execute_async_v3", 7),
], context.seen
loaded.close()
loaded.close()
assert "got a closed one" in error_of(EngineError, loaded.enqueue_on, 7)

loaded, *_ = load(is_enqueued=False)
assert "to enqueue a run, got: no enqueue; " in error_of(EngineError, loaded.enqueue_on, 7)
assert "to read the engine, got: no plan; " in error_of(EngineError, load, is_read=False)
wrong = error_of(
    EngineMismatchError, load, shape_of=lambda n: (1, 9) if n == "score" else tensors[n].shape
)
assert "other names or shapes of ['score']" in wrong, wrong
loaded, _, _, context = load(is_bound=False)
refused = error_of(EngineError, loaded.bind_device, addresses, scratch=256, stream=5)
assert f"to use {names[0]!r} at 0x7f00000000, got: no reason given" in refused, refused
assert context.seen[-1][0] == "set_tensor_address"
if is_rtx:
    found = trt.EngineInvalidityDiagnostics
    other = (trt.EngineValidity.INVALID, int(found.UNSUPPORTED_CC) | int(found.OLD_CUDA_DRIVER))
    error = error_of(EngineMismatchError, load, validity=other)
    assert "got: UNSUPPORTED_CC OLD_CUDA_DRIVER; it was built for another GPU" in error, error
    load(validity=(trt.EngineValidity.SUBOPTIMAL, int(found.OLD_CUDA_DRIVER)))
    load(validity=(trt.EngineValidity.INVALID, 0))  # without a diagnosis, reading it will tell
    loaded, *_ = load(is_capturable=False)
    error = error_of(EngineError, loaded.bind_device, addresses, scratch=256, stream=5)
    assert "got: the engine is not stream capturable; it cannot be part of a CUDA" in error, error
""",
}
RTX_PACKAGE = "from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n"


def unpacked_bindings(requirement: str, folder: Path) -> Path:
    """Download a wheel once, and unpack it beside stubs of the libraries that it loads."""
    name, version = requirement.split("==")
    unpacked = folder / f"{name}-{version}-py{sys.version_info.major}{sys.version_info.minor}"
    if (unpacked / "tensorrt.py").is_file():
        return unpacked
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", unpacked]
    done = subprocess.run([*download, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"needs pip to download {requirement}: {reason}")
    for wheel in unpacked.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(unpacked)
    (unpacked / "stubs.c").write_text(STUBS, encoding="utf-8")
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        file = f"lib{library}.so.{version.split('.')[0]}"
        options = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", unpacked / file]
        subprocess.run(["gcc", *options, unpacked / "stubs.c"], check=True)
    (unpacked / "tensorrt.py").write_text(PACKAGE, encoding="utf-8")
    return unpacked


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("requirement", BINDINGS)
def test_bindings_have_what_is_used(
    requirement: str, check: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build stubs of the TensorRT libraries")
    assert pytestconfig.cache is not None
    folder = unpacked_bindings(requirement, pytestconfig.cache.mkdir("tensorrt_bindings"))
    run_check(check, requirement.split("==")[1], folder, tmp_path)


@pytest.mark.rtx
@pytest.mark.parametrize("check", ["names", "network_flags", "timings", "log", "monitor", "run"])
def test_tensorrt_rtx_has_what_is_used(check: str, tmp_path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx")
    (tmp_path / "tensorrt.py").write_text(RTX_PACKAGE, encoding="utf-8")

    run_check(check, rtx.__version__, tmp_path, tmp_path / "toy")


def run_check(check: str, version: str, package_folder: Path, bundle_folder: Path) -> None:
    """Run a check where ``import tensorrt`` finds what lies in a folder."""
    bundle = write_toy_bundle(bundle_folder)
    project = str(Path(__file__).parents[3])

    done = subprocess.run(
        [sys.executable, "-c", HEADER + CHECKS[check], version,
         bundle.graph_path(bundle.segments[0])],
        env={**os.environ, "LD_LIBRARY_PATH": str(package_folder),
             "PYTHONPATH": os.pathsep.join([str(package_folder), project])},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
