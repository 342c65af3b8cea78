"""Graphs with conditional nodes on the emulated device: captured, nested, launched, refused."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from emulator.hooks import EmulatedDriver

from edgetrack.backends.cuda import CudaContext, DeviceMemory, Function, MappedMemory, Stream
from edgetrack.backends.cuda.graphs import (
    Graph,
    GraphExec,
    add_child_graph,
    body_node_types,
    capture,
    capture_to,
    check_body,
    conditional_handle,
    end_capture,
    if_node,
    is_capturing,
    supports_conditional_nodes,
    without_garbage_collection,
)
from edgetrack.errors import DeviceError
from edgetrack.runtime.device_state import read_ptx

DRIVER = EmulatedDriver()
ONE = (1, 1, 1)
INVALID_VALUE = 1
HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Bench:
    """A context, streams for three levels of bodies, words to write, and a kernel that writes."""

    def __init__(self) -> None:
        self.context = CudaContext.open()
        self.streams = [self.context.stream() for _ in range(3)]
        self.words = self.context.allocate_mapped(32, what="words")
        module = self.context.module(read_ptx())
        self.probe: Function = module.function("edgetrack_probe")
        self.callbacks: list[object] = []

    @property
    def stream(self) -> Stream:
        return self.streams[0]

    @property
    def handle(self) -> int:
        return self.streams[0].handle

    def decide(self, index: int, value: int, condition: int, *, depth: int = 0) -> None:
        """Put a kernel on a stream that writes a word, and its lowest bit to a condition."""
        address, handle = np.uint64(self.words.address + 4 * index), np.uint64(condition)
        self.probe.launch(self.streams[depth], ONE, ONE, address, np.uint32(value), handle)

    def write(self, index: int, value: int, *, depth: int = 0) -> None:
        """Put a kernel on a stream that writes a word."""
        words = self.words.array.view(np.uint32)
        DRIVER.enqueue(self.streams[depth].handle, lambda: words.__setitem__(index, value))

    def call_host(self, depth: int = 0) -> None:
        """Put a function of the host on a stream, which no body may hold."""
        nothing = HostFunction(lambda _: None)
        self.callbacks.append(nothing)
        stream = ctypes.c_void_p(self.streams[depth].handle)
        assert DRIVER.library.cuLaunchHostFunc(stream, nothing, None) == 0

    def run(self, graph: GraphExec) -> list[int]:
        """Launch once; the words that it wrote."""
        self.words.array[:] = 0
        graph.launch(self.handle)
        self.stream.synchronize()
        return self.words.array.view(np.uint32).tolist()


def live() -> tuple[int, int]:
    return DRIVER.live_bytes, DRIVER.live_handles()


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = live()
    made = Bench()
    with made.context.current():
        yield made
    made.context.close()
    DRIVER.reset()
    assert live() == before


def captured_if(bench: Bench, fill: Callable[[int], None], *, value: int | None) -> GraphExec:
    """Word 0 ← value; IF(value & 1) fill(body); word 7 ← 9."""
    with capture(bench.handle) as captured:
        condition = conditional_handle(bench.handle, bench.context.handle)
        if value is not None:
            bench.decide(0, value, condition)
        body = if_node(bench.handle, bench.context.handle, condition)
        fill(body)
        bench.write(7, 9)
    return GraphExec(captured.graph, bench.handle)


def write_in_body(bench: Bench, *, index: int = 1, depth: int = 1) -> Callable[[int], None]:
    def fill(body: int) -> None:
        capture_to(bench.streams[depth].handle, body)
        bench.write(index, 5, depth=depth)
        end_capture(bench.streams[depth].handle)

    return fill


class TestConditions:
    def test_the_driver_has_them(self) -> None:
        assert supports_conditional_nodes()

    def test_an_older_driver_has_not(self) -> None:
        script = (
            "from edgetrack.backends.cuda.graphs import supports_conditional_nodes\n"
            "print(supports_conditional_nodes())"
        )
        environment = {**os.environ, "EMULATED_CUDA_VERSION": "12030"}

        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )

        assert done.stdout == "False\n", done.stderr

    @pytest.mark.parametrize(("value", "written"), [(3, 5), (2, 0)])
    def test_a_body_runs_where_its_condition_is_set(
        self, bench: Bench, value: int, written: int
    ) -> None:
        graph = captured_if(bench, write_in_body(bench), value=value)
        launches = DRIVER.num_launches

        assert bench.run(graph) == [value, written, 0, 0, 0, 0, 0, 9]

        assert DRIVER.num_launches - launches == (3 if written else 2)
        graph.close()

    def test_a_condition_is_0_again_at_every_launch(self, bench: Bench) -> None:
        graph = captured_if(bench, write_in_body(bench), value=None)

        assert bench.run(graph) == [0, 0, 0, 0, 0, 0, 0, 9]
        graph.close()

    def test_a_condition_may_change_from_launch_to_launch(self, bench: Bench) -> None:
        value = bench.context.allocate_mapped(4, what="a value")
        with capture(bench.handle) as captured:
            condition = conditional_handle(bench.handle, bench.context.handle)
            bench.decide(0, 1, condition)
            body = if_node(bench.handle, bench.context.handle, condition)
            capture_to(bench.streams[1].handle, body)
            bench.context.copy_to_device(bench.words.address + 4, value.array, bench.streams[1])
            end_capture(bench.streams[1].handle)
        graph = GraphExec(captured.graph, bench.handle)

        seen = []
        for number in (7, 8, 9):
            value.array[:] = number
            seen.append(bench.run(graph)[1])

        assert seen == [0x07070707, 0x08080808, 0x09090909]
        graph.close()

    @pytest.mark.parametrize(
        ("outer", "inner", "words"),
        [
            (1, 1, [1, 1, 5, 6, 0, 0, 0, 9]),
            (1, 2, [1, 2, 0, 6, 0, 0, 0, 9]),
            (2, 1, [2, 0, 0, 0, 0, 0, 0, 9]),
        ],
    )
    def test_bodies_nest(self, bench: Bench, outer: int, inner: int, words: list[int]) -> None:
        context = bench.context.handle

        def fill(body: int) -> None:
            stream = bench.streams[1].handle
            capture_to(stream, body)
            condition = conditional_handle(stream, context)
            bench.decide(1, inner, condition, depth=1)
            write_in_body(bench, index=2, depth=2)(if_node(stream, context, condition))
            bench.write(3, 6, depth=1)
            end_capture(stream)
            check_body(body)
            assert body_node_types(body) == ["kernel", "conditional", "kernel"]

        graph = captured_if(bench, fill, value=outer)

        assert bench.run(graph) == words
        graph.close()

    def test_the_calls_are_those_of_every_driver_since_12_4_in_this_order(
        self, bench: Bench
    ) -> None:
        DRIVER.clear_calls()

        graph = captured_if(bench, write_in_body(bench), value=1)

        assert DRIVER.calls() == [
            "cuStreamBeginCapture_v2",
            "cuStreamGetCaptureInfo_v3",
            "cuGraphConditionalHandleCreate",
            "cuLaunchKernel",
            "cuStreamGetCaptureInfo_v3",
            "cuGraphAddNode_v2",
            "cuStreamUpdateCaptureDependencies_v2",
            "cuStreamBeginCaptureToGraph",
            "emulator_enqueue",
            "cuStreamEndCapture",
            "emulator_enqueue",
            "cuStreamEndCapture",
            "cuGraphInstantiateWithFlags",
            "cuGraphUpload",
        ]
        DRIVER.clear_calls()
        bench.run(graph)
        assert DRIVER.calls() == ["cuGraphLaunch", "cuStreamSynchronize"]
        graph.close()


class TestChildren:
    def test_a_child_graph_runs_where_it_was_added(self, bench: Bench) -> None:
        with capture(bench.handle) as inner:
            bench.write(1, 1)
            bench.write(1, 4)
        with capture(bench.handle) as outer:
            bench.write(1, 2)
            add_child_graph(bench.handle, inner.graph.handle)
            bench.context.set_bytes(bench.words.address + 4, 8, 1, bench.stream)
        inner.graph.close()
        assert body_node_types(outer.graph.handle) == [
            "kernel", "child graph", "kernel", "kernel", "memset",
        ]  # fmt: skip

        graph = GraphExec(outer.graph, bench.handle)

        assert bench.run(graph)[1] == 8
        graph.close()

    def test_a_child_graph_runs_in_a_body(self, bench: Bench) -> None:
        with capture(bench.handle) as inner:
            bench.write(4, 4)

        def fill(body: int) -> None:
            stream = bench.streams[1].handle
            capture_to(stream, body)
            add_child_graph(stream, inner.graph.handle)
            end_capture(stream)
            check_body(body)

        graph = captured_if(bench, fill, value=1)
        inner.graph.close()

        assert bench.run(graph)[4] == 4
        graph.close()

    def test_a_graph_with_conditions_is_no_child(self, bench: Bench) -> None:
        with capture(bench.handle) as inner:
            condition = conditional_handle(bench.handle, bench.context.handle)
            write_in_body(bench)(if_node(bench.handle, bench.context.handle, condition))

        refused = pytest.raises(DeviceError, match="cuGraphAddChildGraphNode: expected success")
        with refused, capture(bench.handle):
            add_child_graph(bench.handle, inner.graph.handle)

        inner.graph.close()


class TestRefusals:
    def test_a_body_with_a_forbidden_node_is_named(self, bench: Bench) -> None:
        def fill(body: int) -> None:
            capture_to(bench.streams[1].handle, body)
            bench.write(1, 1, depth=1)
            bench.call_host(depth=1)
            end_capture(bench.streams[1].handle)
            check_body(body)

        with pytest.raises(DeviceError, match="got host function; build the engine without"):
            captured_if(bench, fill, value=1)

    def test_a_forbidden_node_is_found_in_a_child_graph(self, bench: Bench) -> None:
        with capture(bench.handle) as inner:
            bench.call_host()

        def fill(body: int) -> None:
            capture_to(bench.streams[1].handle, body)
            add_child_graph(bench.streams[1].handle, inner.graph.handle)
            end_capture(bench.streams[1].handle)
            check_body(body)

        with pytest.raises(DeviceError, match="got host function"):
            captured_if(bench, fill, value=1)
        inner.graph.close()

    def test_a_graph_that_the_driver_refuses_is_freed(self, bench: Bench) -> None:
        def fill(body: int) -> None:
            capture_to(bench.streams[1].handle, body)
            bench.call_host(depth=1)
            end_capture(bench.streams[1].handle)

        with pytest.raises(
            DeviceError, match=r"cuGraphInstantiateWithFlags.*check_body names them"
        ):
            captured_if(bench, fill, value=1)

    def test_nodes_are_only_added_while_a_stream_captures(self, bench: Bench) -> None:
        for add in (
            lambda: conditional_handle(bench.handle, bench.context.handle),
            lambda: if_node(bench.handle, bench.context.handle, 1),
            lambda: add_child_graph(bench.handle, 1),
        ):
            with pytest.raises(DeviceError, match="expected a stream that captures, got one that"):
                add()

    def test_a_stream_captures_once(self, bench: Bench) -> None:
        with capture(bench.handle) as captured:
            assert is_capturing(bench.handle)
            with pytest.raises(DeviceError, match="cuStreamBeginCapture_v2: expected success"):
                capture(bench.handle).begin()
            with pytest.raises(DeviceError, match="expected it ended, got it under way"):
                _ = captured.graph
        assert not is_capturing(bench.handle)
        captured.graph.close()

    def test_a_stream_that_captures_is_not_waited_for(self, bench: Bench) -> None:
        refused = pytest.raises(DeviceError, match=r"STREAM_CAPTURE_UNSUPPORTED; while a stream")
        with refused, capture(bench.handle):
            bench.stream.synchronize()

        bench.write(0, 3)
        bench.stream.synchronize()
        assert bench.words.array[0] == 3

    def test_an_error_in_a_capture_leaves_the_streams_as_they_were(self, bench: Bench) -> None:
        def fill(body: int) -> None:
            capture_to(bench.streams[1].handle, body)
            try:
                raise ZeroDivisionError
            finally:
                end_capture(bench.streams[1].handle)

        with pytest.raises(ZeroDivisionError):
            captured_if(bench, fill, value=1)

        assert [is_capturing(s.handle) for s in bench.streams] == [False] * 3

    def test_a_closed_graph_is_not_launched(self, bench: Bench) -> None:
        graph = captured_if(bench, write_in_body(bench), value=1)
        graph.close()
        graph.close()

        with pytest.raises(DeviceError, match="cuGraphLaunch: expected success"):
            graph.launch(bench.handle)

    def test_another_thread_may_allocate_meanwhile(self, bench: Bench) -> None:
        from concurrent.futures import ThreadPoolExecutor

        with capture(bench.handle) as captured, ThreadPoolExecutor(1) as pool:
            bench.write(0, 3)
            memory: MappedMemory = pool.submit(
                bench.context.allocate_mapped, 64, what="more"
            ).result()
        memory.close()

        graph = GraphExec(captured.graph, bench.handle)
        assert bench.run(graph)[0] == 3
        graph.close()


class Cycle:
    """What only the garbage collector frees, and its memory with it."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self.itself = self

    def __del__(self) -> None:
        self.memory.close()


@pytest.fixture
def eager_collector() -> Iterator[None]:
    """A garbage collector that runs at nearly every allocation."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


class TestGarbage:
    @pytest.mark.usefixtures("eager_collector")
    def test_what_is_garbage_during_a_capture_does_not_spoil_it(self, bench: Bench) -> None:
        before = DRIVER.live_bytes
        memory = bench.context.allocate(64, what="memory in a cycle")

        with without_garbage_collection(), capture(bench.handle) as captured:
            Cycle(memory)
            kept = [[k] for k in range(1000)]  # any of them would start the collector
            bench.write(1, len(kept) % 7)
            assert not memory.is_closed

        graph = GraphExec(captured.graph, bench.handle)
        assert bench.run(graph)[1] == 1000 % 7
        graph.close()
        gc.collect()
        assert DRIVER.live_bytes == before

    def test_the_collector_is_set_as_it_was_by_the_last_one_out(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        first, second = without_garbage_collection(), without_garbage_collection()
        with ThreadPoolExecutor(1) as other:
            first.__enter__()
            other.submit(second.__enter__).result()
            first.__exit__(None, None, None)
            assert not gc.isenabled()
            other.submit(second.__exit__, None, None, None).result()
        assert gc.isenabled()

    def test_what_is_garbage_before_goes_and_a_collector_that_was_off_stays_off(
        self, bench: Bench
    ) -> None:
        memory = bench.context.allocate(64, what="memory in a cycle")
        gc.disable()
        try:
            Cycle(memory)
            with without_garbage_collection():
                assert memory.is_closed
            assert not gc.isenabled()
        finally:
            gc.enable()


def use_everything(bench: Bench) -> None:
    inner: Graph | None = None
    graph: GraphExec | None = None
    try:
        with capture(bench.handle) as captured:
            bench.write(4, 4)
        inner = captured.graph

        def fill(body: int) -> None:
            stream = bench.streams[1].handle
            capture_to(stream, body)
            try:
                add_child_graph(stream, captured.graph.handle)
                bench.write(1, 5, depth=1)
            finally:
                end_capture(stream)
            check_body(body)

        graph = captured_if(bench, fill, value=1)
        assert is_capturing(bench.handle) is False
        bench.run(graph)
    finally:
        if graph is not None:
            graph.close()
        if inner is not None:
            inner.close()


# A failure of these is where something stays behind: nobody else can free it.
FREEING = {"cuGraphDestroy", "cuGraphExecDestroy"}
HOOKS = {"emulator_enqueue"}


def test_a_failure_of_any_call_leaves_nothing_behind(bench: Bench) -> None:
    before = live()
    DRIVER.clear_calls()
    use_everything(bench)
    seen: dict[str, int] = {}
    for name in DRIVER.calls():
        seen[name] = seen.get(name, 0) + 1
    assert live() == before

    for name, count in seen.items():
        if name in FREEING | HOOKS:
            continue
        for nth in range(1, count + 1):
            DRIVER.fail(name, INVALID_VALUE, nth=nth)
            with pytest.raises(DeviceError, match="expected"):
                use_everything(bench)
            assert live() == before, (name, nth)
            assert not any(is_capturing(s.handle) for s in bench.streams), (name, nth)
