import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle

from edgetrack.backends.cuda.driver import find_cuda_device
from edgetrack.backends.trt.builder import BuildJob, compile_graph
from edgetrack.backends.trt.child import compile_in_child, free_memory_bytes
from edgetrack.backends.trt.layer_table import read_layer_table
from edgetrack.errors import BackendUnavailableError, EngineBuildError

PROJECT = str(Path(__file__).parents[3])
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs tensorrt_rtx: pip install "edgetrack[tensorrt-rtx]"',
)
# No `if __name__ == "__main__":`, as in a user's script; stops its child, says who that is, waits.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from edgetrack.backends.trt.builder import BuildJob
from edgetrack.backends.trt.child import compile_in_child
print("script", flush=True)
def wait(phase, fraction):
    child = int(open(f"/proc/self/task/{os.getpid()}/children").read().split()[0])
    os.kill(child, signal.SIGSTOP)
    print(child, flush=True)
    time.sleep(60)
compile_in_child(
    BuildJob(backend="tensorrt-rtx", onnx_path=Path(sys.argv[1]), engine_path=Path(sys.argv[2]),
             precision="fp32"),
    wait,
)
"""


@pytest.fixture
def job(tmp_path: Path) -> BuildJob:
    bundle = write_toy_bundle(tmp_path / "toy")
    (tmp_path / "engines").mkdir()
    return BuildJob(
        backend="tensorrt-rtx",
        onnx_path=bundle.graph_path(bundle.segments[0]),
        engine_path=tmp_path / "engines" / "s.plan",
        precision="fp32",
    )


def changed(job: BuildJob, **changes: object) -> BuildJob:
    return BuildJob(**{**vars(job), **changes})


_others: set[int] = set()


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [child for child in map(int, found) if child not in _others]


@pytest.fixture(autouse=True)
def others() -> None:
    """What this process had for children before, such as multiprocessing's resource tracker."""
    _others.clear()
    _others.update(children())


def at_first_step(act: Callable[[int], None]) -> Callable[[str, float], None]:
    """A report of steps that does something with the child's process id at the first one."""
    seen: list[str] = []

    def on_step(phase: str, fraction: float) -> None:
        if not seen:
            act(children()[0])
        seen.append(phase)

    return on_step


def files(job: BuildJob) -> list[str]:
    return sorted(p.name for p in job.engine_path.parent.iterdir())


def is_running(process_id: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    return False


def wait_for_end(process_id: int) -> None:
    until = time.monotonic() + 30
    while is_running(process_id):
        assert time.monotonic() < until, f"{process_id} still runs"
        time.sleep(0.05)


@pytest.mark.rtx
@needs_rtx
def test_an_engine_from_a_child_is_that_of_this_process(job: BuildJob) -> None:
    here = changed(job, engine_path=job.engine_path.with_name("here.plan"))
    steps: list[tuple[str, float]] = []

    compile_in_child(job, lambda *step: steps.append(step))
    compile_graph(here, lambda *step: None)

    assert read_layer_table(job.engine_path) == read_layer_table(here.engine_path) != ()
    assert job.engine_path.stat().st_size == here.engine_path.stat().st_size
    fractions = [fraction for _, fraction in steps]
    assert fractions == sorted(fractions)
    assert len(fractions) > 10
    assert children() == []


@pytest.mark.rtx
@needs_rtx
def test_what_tensorrt_refuses_is_the_same_error(job: BuildJob) -> None:
    with pytest.raises(EngineBuildError, match=r"expected a graph cast to fp16, got .*\[\]"):
        compile_in_child(changed(job, precision="fp16"), lambda *step: None)

    assert files(job) == []


@pytest.mark.rtx
@needs_rtx
def test_a_file_that_cannot_be_written_is_an_os_error(job: BuildJob) -> None:
    lost = changed(job, engine_path=job.engine_path.parent / "none" / "s.plan")

    with pytest.raises(FileNotFoundError) as caught:
        compile_in_child(lost, lambda *step: None)

    assert caught.value.errno is not None
    assert "none" in str(caught.value.filename)


def test_a_package_that_is_missing_is_named(job: BuildJob) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("needs a machine without tensorrt")

    with pytest.raises(BackendUnavailableError, match="expected the package tensorrt, got"):
        compile_in_child(changed(job, backend="tensorrt"), lambda *step: None)


@pytest.mark.rtx
@needs_rtx
def test_an_exception_in_a_report_ends_the_child(job: BuildJob) -> None:
    found: list[int] = []

    def interrupt(child: int) -> None:
        found.append(child)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_in_child(job, at_first_step(interrupt))

    assert not is_running(found[0])
    assert children() == []
    assert files(job) == []


@pytest.mark.rtx
@needs_rtx
def test_a_child_that_the_kernel_killed_means_that_memory_is_short(job: BuildJob) -> None:
    kill = at_first_step(lambda child: os.kill(child, signal.SIGKILL))

    with pytest.raises(EngineBuildError, match=r"segment_0\.onnx: .* killed.*; memory is short: "):
        compile_in_child(job, kill)

    assert files(job) == []


@pytest.mark.rtx
@needs_rtx
def test_a_child_that_crashed_is_an_error_with_its_signal(job: BuildJob) -> None:
    crash = at_first_step(lambda child: os.kill(child, signal.SIGSEGV))

    with pytest.raises(EngineBuildError, match=r"crashed with SIGSEGV.*; .*edgetrack doctor"):
        compile_in_child(job, crash)

    assert files(job) == []


@pytest.mark.rtx
@needs_rtx
def test_what_a_dying_child_printed_is_in_the_error(job: BuildJob) -> None:
    with pytest.raises(EngineBuildError, match=r"ended with code 1 \| .*AttributeError: .*rea"):
        compile_in_child(changed(job, onnx_path="not a path"), lambda *step: None)


@pytest.mark.rtx
@needs_rtx
@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [("GPU-a,GPU-b", 1, "GPU-b"), ("GPU-a", 0, "GPU-a"), ("", 2, "2"), ("", 0, "")],
)
def test_the_child_sees_the_device_that_was_asked_for(
    job: BuildJob, monkeypatch: pytest.MonkeyPatch, visible: str, device: int, expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen: list[bytes] = []
    look = at_first_step(lambda child: seen.append(Path(f"/proc/{child}/environ").read_bytes()))

    compile_in_child(changed(job, device=device), look)

    assert f"CUDA_VISIBLE_DEVICES={expected}".encode() in seen[0].split(b"\0")


@pytest.mark.rtx
@needs_rtx
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_the_script_that_started_it(job: BuildJob, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, job.onnx_path, job.engine_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PROJECT},
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "script\n"
        child = int(script.stdout.readline())
        group = os.getpgid(child)
        os.killpg(script.pid, how)  # as a terminal does at Ctrl-C
        printed, _ = script.communicate(timeout=30)

    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGCONT)
    wait_for_end(child)
    assert group != script.pid
    assert "script" not in printed
    assert files(job) == []


def test_without_a_device_the_free_memory_is_unknown() -> None:
    if find_cuda_device() is not None:
        pytest.skip("needs a machine without a CUDA device")

    assert free_memory_bytes() is None
