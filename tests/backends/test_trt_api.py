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
import sys, threading
from pathlib import Path
import tensorrt as trt
assert trt.__version__ == sys.argv[1], trt.__version__
"""
CHECKS = {
    "names": """
from edgetrack.backends.trt import REQUIRED_API
missing = [f"{c}.{n}" for c, names in REQUIRED_API.items() for n in names.split()
           if not hasattr(getattr(trt, c, None), n)]
assert not missing, missing
""",
    "network_flags": """
from edgetrack.backends.trt import network_flags
strongly_typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
assert network_flags(trt) == 1 << int(strongly_typed)
""",
    "configure": """
from edgetrack.backends.trt import WORKSPACE_BYTES, configure
class Config:
    # Takes what the real IBuilderConfig has, with arguments of the types that it documents.
    def __init__(self): self.__dict__["seen"] = []
    def __setattr__(self, name, value):
        assert isinstance(getattr(trt.IBuilderConfig, name), property), name
        self.seen.append((name, value))
    def __getattr__(self, name):
        signature = getattr(trt.IBuilderConfig, name).__doc__.splitlines()[0]
        def call(*arguments):
            assert signature.count(": ") == 1 + len(arguments), signature
            enums = [a for a in arguments if not isinstance(a, int)]
            assert all(type(a).__name__ in signature for a in enums), signature
            self.seen.append((name, arguments))
        return call
config = Config()
configure(trt, config)
workspace = (trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
assert config.seen == [
    ("set_memory_pool_limit", workspace),
    ("clear_flag", (trt.BuilderFlag.TF32,)),
    ("max_aux_streams", 0),
    ("profiling_verbosity", trt.ProfilingVerbosity.DETAILED),
], config.seen
""",
    "log": """
from edgetrack.backends.layer_table import make_log
log = make_log(trt)
log.log(trt.Logger.VERBOSE, "Layers:")
log.log(trt.Logger.ERROR, "wrong")
log.log(trt.Logger.INTERNAL_ERROR, "very wrong")
log.log(trt.Logger.WARNING, "odd")
assert (log.errors, log.tables) == (["wrong", "very wrong"], ["Layers:"])
""",
    "monitor": """
from edgetrack.backends.trt import make_monitor
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
}


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
    bundle = write_toy_bundle(tmp_path)
    project = str(Path(__file__).parents[2])

    done = subprocess.run(
        [sys.executable, "-c", HEADER + CHECKS[check], requirement.split("==")[1],
         bundle.graph_path(bundle.segments[0])],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder),
             "PYTHONPATH": os.pathsep.join([str(folder), project])},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
