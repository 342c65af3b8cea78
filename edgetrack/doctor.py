"""What this machine has for tracking, and what to install for the rest.

Packages with compiled parts are imported in processes of their own: OpenCV built against another
NumPy, or TensorRT without its libraries, may crash what imports it, and the doctor reports that.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetrack.backends import BackendInfo, list_backends
from edgetrack.backends.cuda.driver import (
    OLDEST_DRIVER,
    CudaDevice,
    cuda_driver_version,
    driver_version,
    find_cuda_device,
)
from edgetrack.backends.cuda.graphs import supports_conditional_nodes
from edgetrack.backends.ort import cpu_name
from edgetrack.power import MachineState, Nvml, read_machine_state

__all__ = ["Finding", "Report", "examine", "jetpack_release", "opencv_traits"]

_PROBE_TIMEOUT_S = 60
_OPENCV_PROBE = "print(json.dumps([m.__version__, m.__file__, m.getBuildInformation()]))"
_ORT_PROBE = "print(json.dumps([m.__version__, m.get_available_providers()]))"
_VERSION_PROBE = "print(json.dumps([m.__version__]))"
_PYCUDA_PROBE = "from importlib import metadata; print(json.dumps([metadata.version('pycuda')]))"
_JETPACK_OF_L4T = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
# From a checkout, edgetrack itself is only found in the working directory.
_NODES_PROBE = f"""m.path.append({str(Path(__file__).parents[1])!r})
from edgetrack.backends.cuda import CudaContext
from edgetrack.runtime.device_state import read_ptx
from edgetrack.runtime.frame_graph import conditional_nodes_refusal
with CudaContext.open() as context, context.current():
    refusal = conditional_nodes_refusal(context, context.module(read_ptx()))
print(json.dumps([refusal and str(refusal)]))
"""
_PYCUDA = "run: pip install 'edgetrack[cuda]'"
_JETSON_EXPORTS = (
    "export PATH=/usr/local/cuda/bin:$PATH CPATH=/usr/local/cuda/include "
    "LIBRARY_PATH=/usr/local/cuda/lib64"
)
_JETPACK_OPENCV = "on Jetson run: sudo apt install python3-opencv; elsewhere: "


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What it is.
        is_present: It is there and works.
        value: What was found, in a few words.
        details: The same as data.
        hint: What to do about it; empty if nothing.
    """

    name: str
    is_present: bool
    value: str
    details: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was looked for; iterate over it for the findings in order."""

    python: Finding
    platform: Finding
    cpu: Finding
    memory: Finding
    disk: Finding
    opencv: Finding
    onnxruntime: Finding
    tensorrt: Finding
    tensorrt_rtx: Finding
    cuda_driver: Finding
    gpu: Finding
    pycuda: Finding
    exit_decision: Finding
    power: Finding
    torch: Finding

    def __iter__(self) -> Iterator[Finding]:
        return (getattr(self, f.name) for f in dataclasses.fields(self))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return dataclasses.asdict(self)


def examine(root: Path = Path("/")) -> Report:
    """Look at this machine; nothing that is missing or broken makes this fail.

    Args:
        root: Of the file system with this machine's release and sensors.
    """
    backends = {info.name: info for info in list_backends()}
    file = root / "etc/nv_tegra_release"
    jetpack = jetpack_release(file.read_text(encoding="utf-8")) if file.is_file() else None
    device, pycuda = find_cuda_device(), _pycuda(is_jetson=jetpack is not None)
    return Report(
        python=Finding(
            name="Python",
            is_present=True,
            value=f"{platform.python_version()} at {sys.executable}",
            details={"version": platform.python_version(), "executable": sys.executable},
        ),
        platform=_platform(jetpack),
        cpu=_cpu(),
        memory=_memory(),
        disk=_disk(),
        opencv=_opencv(),
        onnxruntime=_onnxruntime(backends["onnxruntime"]),
        tensorrt=_tensorrt(backends["tensorrt"], "TensorRT"),
        tensorrt_rtx=_tensorrt(backends["tensorrt-rtx"], "TensorRT-RTX"),
        cuda_driver=_cuda_driver(),
        gpu=_gpu(device),
        pycuda=pycuda,
        exit_decision=_exit_decision(device, has_pycuda=pycuda.is_present),
        power=_power(device, root),
        torch=_torch(),
    )


def jetpack_release(tegra_release: str) -> dict[str, str] | None:
    """Read L4T and JetPack versions out of ``/etc/nv_tegra_release``.

    Example:
        >>> jetpack_release("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
        {'l4t': '36.4.3', 'jetpack': '6'}
    """
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", tegra_release)
    if found is None:
        return None
    major, revision = found.groups()
    return {"l4t": f"{major}.{revision}", "jetpack": _JETPACK_OF_L4T.get(major, "unknown")}


def opencv_traits(build_information: str) -> dict[str, Any]:
    """Read from ``cv2.getBuildInformation()`` whether it has GStreamer and windows."""

    def value_of(key: str) -> str:
        found = re.search(rf"^\s*{key}:[ \t]*(.*)$", build_information, re.MULTILINE)
        return found.group(1).strip() if found else ""

    gui = value_of("GUI")
    return {
        "has_gstreamer": value_of("GStreamer").startswith("YES"),
        "has_gui": gui not in ("", "NONE"),
        "gui": gui or "NONE",
    }


def _platform(jetpack: Mapping[str, str] | None) -> Finding:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    suffix = f", JetPack {jetpack['jetpack']} (L4T {jetpack['l4t']})" if jetpack else ""
    return Finding(
        name="Platform",
        is_present=True,
        value=system + suffix,
        details={
            "system": platform.system(),
            "release": platform.release(),
            "arch": platform.machine(),
            **(jetpack or {}),
        },
    )


def _cpu() -> Finding:
    name, usable = cpu_name(), len(os.sched_getaffinity(0))
    return Finding(
        name="CPU",
        is_present=True,
        value=f"{name}, {usable} usable cores of {os.cpu_count()}",
        details={"name": name, "num_usable_cores": usable, "num_cores": os.cpu_count()},
    )


def _memory() -> Finding:
    file = Path("/proc/meminfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    kib = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    free, total = kib.get("MemAvailable", 0) * 1024, kib.get("MemTotal", 0) * 1024
    return Finding(
        name="Memory",
        is_present=bool(text),
        value=f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}" if text else "unknown",
        details={"free_bytes": free, "total_bytes": total},
        hint="close other programs before building" if text and free < 1e9 else "",
    )


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    return Finding(
        name="Disk",
        is_present=True,
        value=f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} at {Path.cwd()}",
        details={"free_bytes": usage.free, "total_bytes": usage.total},
        hint="free some space before building" if usage.free < 1e9 else "",
    )


def _opencv() -> Finding:
    found = _probe("cv2", _OPENCV_PROBE)
    wheels = sorted(set(importlib.metadata.packages_distributions().get("cv2", [])))
    origin = ", ".join(wheels) or "the system"
    if isinstance(found, str):
        clash = "numpy" in found or "_ARRAY_API" in found
        hint = (
            "it was built for NumPy 1, run: pip install 'numpy<2'"
            if clash
            else f"{_JETPACK_OPENCV}pip install 'edgetrack[opencv]'"
        )
        return Finding(name="OpenCV", is_present=False, value=found, hint=hint)
    version, file, build_information = found
    traits = opencv_traits(build_information)
    gstreamer = "with" if traits["has_gstreamer"] else "without"
    hint = ""
    if len(wheels) > 1:
        hint = f"several wheels share one cv2, keep one: pip uninstall {' '.join(wheels[1:])}"
    elif not traits["has_gui"]:
        hint = "for --show and --select install opencv-python instead of the headless wheel"
    return Finding(
        name="OpenCV",
        is_present=True,
        value=f"{version} from {origin}, {gstreamer} GStreamer, windows: {traits['gui']}",
        details={"version": version, "file": file, "distributions": wheels, **traits},
        hint=hint,
    )


def _onnxruntime(info: BackendInfo) -> Finding:
    found = _probe("onnxruntime", _ORT_PROBE)
    if isinstance(found, str):
        return Finding(name="ONNX Runtime", is_present=False, value=found, hint=info.install)
    version, providers = found
    return Finding(
        name="ONNX Runtime",
        is_present=True,
        value=f"{version}, {', '.join(providers)}",
        details={"version": version, "providers": providers},
    )


def _tensorrt(info: BackendInfo, name: str) -> Finding:
    found = _probe(info.name.replace("-", "_"), _VERSION_PROBE)
    if isinstance(found, str):
        return Finding(name=name, is_present=False, value=found, hint=info.install)
    return Finding(name=name, is_present=True, value=found[0], details={"version": found[0]})


def _cuda_driver() -> Finding:
    version = cuda_driver_version()
    return Finding(
        name="CUDA driver",
        is_present=version is not None,
        value=f"CUDA {version}" if version else "none",
        details={"cuda_version": version},
        hint="" if version else "install NVIDIA's driver if there is an NVIDIA GPU",
    )


def _gpu(device: CudaDevice | None) -> Finding:
    if device is None:
        hint = "without one, trackers run on the CPU: --backend onnxruntime"
        return Finding(name="GPU", is_present=False, value="none", hint=hint)
    shared = " shared with the CPU" if device.is_integrated else ""
    return Finding(
        name="GPU",
        is_present=True,
        value=f"{device.name}, {device.arch}, {device.memory_bytes / 1e9:.1f} GB{shared}, "
        f"driver for CUDA {device.driver}",
        details=dataclasses.asdict(device),
    )


def _pycuda(*, is_jetson: bool) -> Finding:
    found = _probe("pycuda.driver", _PYCUDA_PROBE)
    if isinstance(found, str):
        hint = f"run: {_JETSON_EXPORTS}; then {_PYCUDA}" if is_jetson else _PYCUDA
        return Finding(name="PyCUDA", is_present=False, value=found, hint=hint)
    return Finding(name="PyCUDA", is_present=True, value=found[0], details={"version": found[0]})


def _exit_decision(device: CudaDevice | None, *, has_pycuda: bool) -> Finding:
    """Who would decide to stop, in a tracker whose engines run on the GPU."""
    has_nodes = supports_conditional_nodes()
    chosen, why, hint, is_probed = "host", "segments on the CPU", "", False
    if device is None:
        hint = "with a GPU, it could decide itself"
    elif (driver_version() or 0) < OLDEST_DRIVER:
        hint = "update the driver: trackers on a GPU need CUDA 12.4 or newer"
    elif not has_pycuda:
        hint = "install PyCUDA: trackers on a GPU need it"
    elif not has_nodes:
        chosen = "flag"
        why = "the host reads a flag that the GPU sets, as there are no conditional nodes"
    else:
        (chosen, why, hint), is_probed = _probed_decision(), True
    return Finding(
        name="Exit decision",
        is_present=chosen in ("device", "flag"),
        value=f"{chosen}{' (probed)' if is_probed else ''}: {why}",
        details={
            "exit_decision": chosen,
            "has_conditional_nodes": has_nodes,
            "is_probed": is_probed,
        },
        hint=hint,
    )


def _probed_decision() -> tuple[str, str, str]:
    """Who decides on this device, what that means, and what to do, after a trial of its nodes."""
    found = _probe("sys", _NODES_PROBE)
    if isinstance(found, str):
        hint = "a tracker on this GPU would fail in the same way"
        return "unknown", f"the trial failed: {found}", hint
    (refusal,) = found
    if refusal is None:
        return "device", "one CUDA graph per frame, in which the GPU skips segments", ""
    why = f"the host reads a flag that the GPU sets, as conditional nodes do not work: {refusal}"
    return "flag", why, "update the driver, and tell us the GPU if that does not help"


def _power(device: CudaDevice | None, root: Path) -> Finding:
    """Power mode, clocks and rails: what times and energy depend on."""
    nvml = None if device is None else Nvml.open(device.ordinal)
    state = read_machine_state(root, nvml=nvml)
    if nvml is not None:
        nvml.close()
    hint = "for times that compare, fix the clocks: sudo jetson_clocks"
    return Finding(
        name="Power",
        is_present=state.is_known,
        value=", ".join(_power_words(state)) or "no mode, clock, temperature or rail can be read",
        details=state.as_dict(),
        hint=hint if state.power_mode is not None and state.moving_clocks else "",
    )


def _power_words(state: MachineState) -> Iterator[str]:
    if state.power_mode is not None:
        yield f"mode {state.power_mode.name or state.power_mode.index}"
    for name, clock in state.clocks.items():
        if clock.highest_mhz is not None:
            way = "fixed at" if clock.is_fixed else "up to"
            yield f"{name} {way} {clock.highest_mhz:.0f} MHz"
    known_c = [t for t in state.temperatures_c.values() if t is not None]
    if known_c:
        yield f"{max(known_c):.0f} °C"
    if state.power_mw:
        yield f"rails {', '.join(state.power_mw)}"


def _torch() -> Finding:
    """Its version alone: importing it would take seconds."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        hint = 'only training needs it: pip install "edgetrack[train]"'
        return Finding(name="torch", is_present=False, value="not installed", hint=hint)
    return Finding(name="torch", is_present=True, value=version, details={"version": version})


def _probe(module: str, code: str) -> list[Any] | str:
    """Import a module in another process.

    Returns:
        What ``code`` prints as JSON, or in one line why there is nothing.
    """
    command = [sys.executable, "-c", f"import json; import {module} as m; {code}"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
            cwd=os.sep,  # `python -c` also imports from the working directory
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines() or [f"its import ended with {done.returncode}"]
    if done.returncode:
        is_missing = f"No module named '{module.partition('.')[0]}'" in lines[-1]
        return "not installed" if is_missing else lines[-1]
    content: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return content
