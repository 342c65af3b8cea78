"""The emulator's graphs: conditions run the branch taken, and what a driver refuses is refused."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from driver import (
    CONDITIONAL_NODE,
    HOST_NODE,
    IF,
    KERNEL_NODE,
    MEMSET_NODE,
    WHILE,
    Conditional,
    Driver,
)


def set_condition(driver: Driver, handle: int, value: int) -> None:
    driver.emulated.library.cudaGraphSetConditional(ctypes.c_uint64(handle), value)


def add_conditional(
    driver: Driver, stream: int, handle: int, *, kind: int = IF, size: int = 1
) -> Conditional:
    """Append a conditional node to what a stream captures."""
    graph, dependencies = driver.graph_of(stream)
    node = Conditional(handle, driver.make("cuCtxGetCurrent"), kind=kind, size=size)
    array = (ctypes.c_uint64 * max(1, len(dependencies)))(*dependencies)
    added = driver.make("cuGraphAddNode_v2", graph, array, None, len(dependencies), node.params)
    driver.do("cuStreamUpdateCaptureDependencies_v2", stream, (ctypes.c_uint64 * 1)(added), 0, 1, 1)
    return node


def capture_into(driver: Driver, graph: int, record: Callable[[int], None]) -> None:
    """Fill a body with what ``record`` does to a stream of its own."""
    stream = driver.stream()
    driver.do("cuStreamBeginCaptureToGraph", stream, graph, None, None, 0, 1)
    record(stream)
    assert driver.end(stream) == graph


def chain(driver: Driver, num_segments: int, exit_index: list[int], ran: list[int]) -> int:
    """Segments, each in the body of a condition that the one before it sets: an exec."""
    emulated = driver.emulated

    def record(stream: int, segment: int) -> None:
        emulated.enqueue(stream, lambda: ran.append(segment))
        if segment + 1 == num_segments:
            return
        handle = driver.condition(driver.graph_of(stream)[0])
        emulated.enqueue(
            stream, lambda: set_condition(driver, handle, int(segment < exit_index[0]))
        )
        body = add_conditional(driver, stream, handle).body()
        capture_into(driver, body, lambda inner: record(inner, segment + 1))

    stream = driver.stream()
    driver.begin(stream)
    record(stream, 0)
    return driver.exec(driver.end(stream))


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_nested_conditions_run_the_branch_taken_only(driver: Driver, exit_index: int) -> None:
    ran: list[int] = []
    executable = chain(driver, 3, [exit_index], ran)
    stream, before = driver.stream(), driver.emulated.num_launches

    driver.launch(executable, stream)

    assert ran == list(range(exit_index + 1))
    num_gates = min(exit_index + 1, 2)
    assert driver.emulated.num_launches - before == len(ran) + num_gates


def test_a_condition_begins_each_launch_with_its_default(driver: Driver) -> None:
    ran: list[str] = []
    stream = driver.stream()
    driver.begin(stream)
    handle = driver.condition(driver.graph_of(stream)[0], default=1)
    body = add_conditional(driver, stream, handle).body()
    driver.emulated.enqueue(stream, lambda: set_condition(driver, handle, 0))
    capture_into(driver, body, lambda s: driver.emulated.enqueue(s, lambda: ran.append("body")))
    executable = driver.exec(driver.end(stream))

    driver.launch(executable, stream)
    driver.launch(executable, stream)

    assert ran == ["body", "body"]


def test_a_condition_without_default_keeps_its_value(driver: Driver) -> None:
    """Before the first launch it holds junk, which is not zero."""
    ran: list[str] = []
    stream = driver.stream()
    driver.begin(stream)
    handle = driver.condition(driver.graph_of(stream)[0], flags=0)
    body = add_conditional(driver, stream, handle).body()
    driver.emulated.enqueue(stream, lambda: set_condition(driver, handle, 0))
    capture_into(driver, body, lambda s: driver.emulated.enqueue(s, lambda: ran.append("body")))
    executable = driver.exec(driver.end(stream))

    driver.launch(executable, stream)
    driver.launch(executable, stream)

    assert ran == ["body"]


def test_a_loop_runs_while_its_condition_holds(driver: Driver) -> None:
    rounds: list[int] = []
    stream = driver.stream()
    driver.begin(stream)
    handle = driver.condition(driver.graph_of(stream)[0], default=1)

    def one_round() -> None:
        rounds.append(len(rounds))
        set_condition(driver, handle, int(len(rounds) < 3))

    body = add_conditional(driver, stream, handle, kind=WHILE).body()
    capture_into(driver, body, lambda s: driver.emulated.enqueue(s, one_round))

    driver.launch(driver.exec(driver.end(stream)), stream)

    assert rounds == [0, 1, 2]


@pytest.mark.parametrize(("value", "branch"), [(1, "then"), (0, "else")])
def test_since_12_8_a_condition_has_an_else_branch(driver, value: int, branch: str) -> None:
    driver.emulated.configure(version=12080)
    ran: list[str] = []
    stream = driver.stream()
    driver.begin(stream)
    handle = driver.condition(driver.graph_of(stream)[0], default=value)
    node = add_conditional(driver, stream, handle, size=2)
    for index, name in enumerate(["then", "else"]):
        capture_into(
            driver,
            node.body(index),
            lambda s, name=name: driver.emulated.enqueue(s, lambda: ran.append(name)),
        )

    driver.launch(driver.exec(driver.end(stream)), stream)

    assert ran == [branch]


class TestConditionalNodes:
    """What is refused when a conditional node is added."""

    def add(self, driver: Driver, node: Conditional, graph: int) -> str:
        found = (ctypes.c_uint64 * 1)()
        return driver.code("cuGraphAddNode_v2", found, graph, None, None, 0, node.params)

    def node(self, driver: Driver, graph: int, **options: int) -> Conditional:
        context = driver.make("cuCtxGetCurrent")
        return Conditional(driver.condition(graph), context, **options)

    @pytest.fixture
    def graph(self, driver: Driver) -> int:
        return driver.graph()

    @pytest.mark.parametrize(
        ("version", "size", "error"),
        [
            (12040, 1, "SUCCESS"),
            (12060, 2, "INVALID_VALUE"),
            (12080, 2, "SUCCESS"),
            (12080, 3, "INVALID_VALUE"),
            (12060, 0, "INVALID_VALUE"),
        ],
    )
    def test_how_many_branches(self, driver, graph, version, size, error) -> None:
        driver.emulated.configure(version=version)
        assert self.add(driver, self.node(driver, graph, size=size), graph) == error

    def test_before_12_4_there_are_none(self, driver: Driver, graph: int) -> None:
        node = self.node(driver, graph)
        driver.emulated.configure(version=12030)

        assert self.add(driver, node, graph) == "NOT_SUPPORTED"
        made = driver.code(
            "cuGraphConditionalHandleCreate", (ctypes.c_uint64 * 1)(), graph, None, 0, 1
        )
        assert made == "NOT_SUPPORTED"

    @pytest.mark.parametrize("offset", [4, 12, 48, 255])
    def test_unused_bytes_must_be_zero(self, driver: Driver, graph: int, offset: int) -> None:
        node = self.node(driver, graph)
        node.params[offset] = 1

        assert self.add(driver, node, graph) == "INVALID_VALUE"

    def test_a_condition_has_one_node(self, driver: Driver, graph: int) -> None:
        node = self.node(driver, graph)

        assert self.add(driver, node, graph) == "SUCCESS"
        assert self.add(driver, node, graph) == "INVALID_VALUE"

    def test_a_condition_of_another_graph(self, driver: Driver, graph: int) -> None:
        assert self.add(driver, self.node(driver, driver.graph()), graph) == "INVALID_VALUE"

    def test_a_condition_of_a_graph_serves_its_bodies(self, driver: Driver, graph: int) -> None:
        outer, inner = self.node(driver, graph), self.node(driver, graph)
        assert self.add(driver, outer, graph) == "SUCCESS"
        assert self.add(driver, inner, outer.body()) == "SUCCESS"

    def test_a_condition_of_another_context(self, driver: Driver, graph: int) -> None:
        node = Conditional(driver.condition(graph), context=12345)
        assert self.add(driver, node, graph) == "INVALID_CONTEXT"

    def test_a_condition_cut_to_32_bits(self, driver: Driver, graph: int) -> None:
        cut = driver.condition(graph) & 0xFFFFFFFF
        node = Conditional(cut, driver.make("cuCtxGetCurrent"))
        assert self.add(driver, node, graph) == "INVALID_VALUE"

    def test_the_arguments_of_the_other_version(self, driver: Driver, graph: int) -> None:
        node, found = self.node(driver, graph), (ctypes.c_uint64 * 1)()

        to_first = driver.code("cuGraphAddNode", found, graph, None, None, 0, node.params)
        to_second = driver.code("cuGraphAddNode_v2", found, graph, None, 0, node.params, 0)

        assert (to_first, to_second) == ("INVALID_VALUE", "INVALID_VALUE")
        assert driver.code("cuGraphAddNode", found, graph, None, 0, node.params) == "SUCCESS"

    def test_a_condition_without_a_node_can_not_be_instantiated(self, driver, graph) -> None:
        driver.condition(graph)

        made = driver.code("cuGraphInstantiateWithFlags", (ctypes.c_uint64 * 1)(), graph, 0)

        assert made == "INVALID_VALUE"

    def test_a_body_is_no_graph_of_its_own(self, driver: Driver, graph: int) -> None:
        node = self.node(driver, graph)
        self.add(driver, node, graph)

        made = driver.code("cuGraphInstantiateWithFlags", (ctypes.c_uint64 * 1)(), node.body(), 0)

        assert made == "INVALID_VALUE"
        assert driver.code("cuGraphDestroy", node.body()) == "INVALID_VALUE"


class Memory(NamedTuple):
    device: int
    pinned: npt.NDArray[np.uint8]
    pageable: npt.NDArray[np.uint8]


def pageable_copy(driver: Driver, stream: int, memory: Memory) -> None:
    driver.do("cuMemcpyHtoDAsync_v2", memory.device, memory.pageable, 4, stream)


def pinned_copy(driver: Driver, stream: int, memory: Memory) -> None:
    driver.do("cuMemcpyHtoDAsync_v2", memory.device, memory.pinned, 4, stream)


def fill(driver: Driver, stream: int, memory: Memory) -> None:
    driver.do("cuMemsetD32Async", memory.device, 1, 1, stream)


def allocation(driver: Driver, stream: int, memory: Memory) -> None:
    driver.make("cuMemAllocAsync", memory.pinned.nbytes, stream)


def host_function(driver: Driver, stream: int, memory: Memory) -> None:
    driver.do("cuLaunchHostFunc", stream, memory.device, None)  # never launched


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (fill, "SUCCESS"),
        (pinned_copy, "SUCCESS"),
        (pageable_copy, "INVALID_VALUE"),
        (allocation, "INVALID_VALUE"),
        (host_function, "INVALID_VALUE"),
    ],
)
@pytest.mark.parametrize("is_body", [True, False])
def test_what_a_body_may_hold(driver, record, error: str, is_body: bool) -> None:
    memory = Memory(driver.memory(), driver.pinned(), np.zeros(64, np.uint8))
    stream = driver.stream()
    driver.begin(stream)
    if is_body:
        handle = driver.condition(driver.graph_of(stream)[0])
        body = add_conditional(driver, stream, handle).body()
        capture_into(driver, body, lambda inner: record(driver, inner, memory))
    else:
        record(driver, stream, memory)
    graph = driver.end(stream)

    made = driver.code("cuGraphInstantiateWithFlags", (ctypes.c_uint64 * 1)(), graph, 0)

    assert made == (error if is_body else "SUCCESS")


class TestChildGraphs:
    def add(self, driver: Driver, graph: int, child: int) -> str:
        found = (ctypes.c_uint64 * 1)()
        return driver.code("cuGraphAddChildGraphNode", found, graph, None, 0, child)

    def test_a_child_runs_as_it_was_when_it_was_added(self, driver: Driver) -> None:
        ran, stream = list[str](), driver.stream()
        driver.begin(stream)
        driver.emulated.enqueue(stream, lambda: ran.append("child"))
        child, graph = driver.end(stream), driver.graph()

        assert self.add(driver, graph, child) == "SUCCESS"
        driver.do("cuGraphDestroy", child)
        driver.launch(driver.exec(graph), stream)

        assert ran == ["child"]

    def test_a_child_has_no_conditions(self, driver: Driver) -> None:
        stream = driver.stream()
        driver.begin(stream)
        add_conditional(driver, stream, driver.condition(driver.graph_of(stream)[0]))

        assert self.add(driver, driver.graph(), driver.end(stream)) == "NOT_SUPPORTED"

    def test_the_rules_of_a_body_hold_for_its_children_too(self, driver: Driver) -> None:
        stream, address = driver.stream(), driver.memory()
        driver.begin(stream)
        driver.do("cuLaunchHostFunc", stream, address, None)  # never launched
        child = driver.end(stream)
        driver.begin(stream)
        handle = driver.condition(driver.graph_of(stream)[0])
        body = add_conditional(driver, stream, handle).body()
        assert self.add(driver, body, child) == "SUCCESS"
        graph = driver.end(stream)

        made = driver.code("cuGraphInstantiateWithFlags", (ctypes.c_uint64 * 1)(), graph, 0)

        assert made == "INVALID_VALUE"

    def test_a_graph_is_not_its_own_child(self, driver: Driver) -> None:
        graph = driver.graph()
        assert self.add(driver, graph, graph) == "INVALID_VALUE"


class TestLaunch:
    def test_a_launch_is_asynchronous_and_in_order(self, driver: Driver) -> None:
        stream, word, gate = driver.stream(), driver.memory(4), threading.Event()
        driver.begin(stream)
        driver.emulated.enqueue(stream, lambda: gate.wait(10))
        driver.do("cuMemsetD32Async", word, 7, 1, stream)
        executable = driver.exec(driver.end(stream))

        driver.do("cuGraphLaunch", executable, stream)
        early = driver.code("cuStreamQuery", stream), read(word)
        gate.set()
        driver.sync(stream)

        assert early == ("NOT_READY", 0xCDCDCDCD)
        assert read(word) == 7

    def test_launches_of_one_executable_follow_each_other(self, driver: Driver) -> None:
        first, second, now_running = driver.stream(), driver.stream(), list[int]()
        overlaps: list[int] = []

        def work() -> None:
            now_running.append(1)
            time.sleep(0.02)
            overlaps.append(len(now_running))
            now_running.pop()

        driver.begin(first)
        driver.emulated.enqueue(first, work)
        executable = driver.exec(driver.end(first))
        driver.do("cuGraphLaunch", executable, first)
        driver.do("cuGraphLaunch", executable, second)
        driver.sync(first)
        driver.sync(second)

        assert overlaps == [1, 1]

    def test_of_two_nodes_without_a_path_the_later_one_runs_first(self, driver: Driver) -> None:
        """So that a dependency which the caller forgot shows."""
        ran, stream = list[str](), driver.stream()
        driver.begin(stream)
        driver.emulated.enqueue(stream, lambda: ran.append("first"))
        driver.do("cuStreamUpdateCaptureDependencies_v2", stream, None, None, 0, 1)
        driver.emulated.enqueue(stream, lambda: ran.append("second"))
        executable = driver.exec(driver.end(stream))

        driver.launch(executable, stream)

        assert ran == ["second", "first"]

    def test_a_graph_that_uses_freed_memory_fails(self, driver: Driver) -> None:
        stream, word = driver.stream(), driver.memory(4)
        driver.begin(stream)
        driver.do("cuMemsetD32Async", word, 7, 1, stream)
        executable = driver.exec(driver.end(stream))
        other, gate = driver.stream(), threading.Event()
        driver.emulated.enqueue(other, lambda: gate.wait(10))
        driver.do("cuMemsetD32Async", word, 7, 1, other)  # for it the memory stays a while
        driver.do("cuMemFree_v2", word)

        driver.do("cuGraphLaunch", executable, stream)

        assert driver.code("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"
        gate.set()

    def test_nodes_are_told_by_type(self, driver: Driver) -> None:
        stream, word = driver.stream(), driver.memory(4)
        driver.begin(stream)
        driver.do("cuMemsetD32Async", word, 7, 1, stream)
        driver.emulated.enqueue(stream, lambda: None)
        driver.do("cuLaunchHostFunc", stream, word, None)
        add_conditional(driver, stream, driver.condition(driver.graph_of(stream)[0]))
        graph = driver.end(stream)

        assert node_types(driver, graph) == [MEMSET_NODE, KERNEL_NODE, HOST_NODE, CONDITIONAL_NODE]


def read(address: int) -> int:
    return int(ctypes.c_uint32.from_address(address).value)


def node_types(driver: Driver, graph: int) -> list[int]:
    nodes, count, kind = (ctypes.c_uint64 * 8)(), ctypes.c_size_t(8), (ctypes.c_int * 1)()
    driver.do("cuGraphGetNodes", graph, nodes, ctypes.addressof(count))
    kinds = []
    for node in nodes[: count.value]:
        driver.do("cuGraphNodeGetType", node, kind)
        kinds.append(kind[0])
    return kinds
