"""What a frame needs on a CUDA device beside its engines: memory for the state, and the kernels."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.backends.cuda import CudaContext, Stream
from edgetrack.backends.engine import DeviceEngine
from edgetrack.bundle import Bundle, CropSpec
from edgetrack.crops import CropWindow
from edgetrack.runtime import device_state
from edgetrack.runtime.buffers import DeviceBuffers
from edgetrack.runtime.device_state import DECISION, RESULT, RING, RULES, SOURCE, TARGET
from edgetrack.runtime.frame_graph import FrameParts

__all__ = ["DeviceFrame"]

_BLOCK_PX = 16
_BLOCK = (_BLOCK_PX, _BLOCK_PX, 1)
_ONE = (1, 1, 1)
_ALIGNMENT_BYTES = 256
_CHUNK_BYTES = 16
_CARRY_THREADS, _MAX_CARRY_BLOCKS = 256, 64
_GATE = "uncertainty", "score", "decision", "target"
_NOWHERE = np.uint64(0)
_EXIT_INDEX_OFFSET: int = dict(TARGET.fields or {})["exit_index"][1]

Array = npt.NDArray[Any]


class DeviceFrame:
    """Memory, kernels and bound engines of one tracker.

    Args:
        context: Where; current in this thread at every call.
        bundle: What the engines were built from.
        engines: One per graph of the bundle, in its order.
        owned: What is made here is entered into it; whoever passes it closes it.

    Attributes:
        stream: The tracker's own stream.
        buffers: The tensors.
        sources: Where the frames in flight are: ``SOURCE`` ``(RING,)``, in mapped memory.
        results: What came of them: ``RESULT`` ``(RING,)``, in mapped memory.
        flags: What ``gate_flag`` writes at each exit but the last: uint32, in mapped memory.
        num_bytes: Device memory of the tensors, the scratch memory and the state.

    Raises:
        DeviceError: The device refused memory, or the kernels.
        EngineMismatchError: The engines do not fit each other.
    """

    def __init__(
        self,
        context: CudaContext,
        bundle: Bundle,
        engines: Sequence[DeviceEngine],
        *,
        owned: contextlib.ExitStack,
    ) -> None:
        self._context, self._engines = context, engines
        self._segments = engines[1 : 1 + bundle.num_exits]
        self._heads = engines[1 + bundle.num_exits :][: len(bundle.heads)]
        self._update_engine = None if bundle.update is None else engines[-1]
        self._carried = bundle.carried
        self._crops: CropSpec = bundle.crops
        self.stream = owned.enter_context(contextlib.closing(context.stream()))
        self.buffers = owned.enter_context(
            contextlib.closing(DeviceBuffers(context, bundle, engines))
        )
        module = owned.enter_context(contextlib.closing(context.module(device_state.read_ptx())))
        self.module = module
        self._kernels = {name: module.function(name) for name in device_state.KERNEL_NAMES}
        mapped = {
            "sources": (SOURCE, RING),
            "results": (RESULT, RING),
            "flags": (np.dtype(np.uint32), bundle.num_exits),
            "decisions": (DECISION, RING),
            "answer": (np.dtype(np.float32), 2),
        }
        state = {
            "target": (TARGET, 1),
            "template_target": (TARGET, 1),
            "rules": (RULES, 1),
            "decision": (DECISION, 1),
        }
        mapped_offsets, mapped_bytes = _offsets(mapped)
        offsets, num_bytes = _offsets(state)
        words = owned.enter_context(
            contextlib.closing(context.allocate_mapped(mapped_bytes, what="results"))
        )
        memory = owned.enter_context(
            contextlib.closing(context.allocate(num_bytes, what="the target's state"))
        )
        words.array[:] = 0
        views = {
            name: words.array[offset : offset + dtype.itemsize * count].view(dtype)
            for (name, (dtype, count)), offset in zip(
                mapped.items(), mapped_offsets.values(), strict=True
            )
        }
        self.sources, self.results, self.flags = views["sources"], views["results"], views["flags"]
        self._decisions, self._num_decisions = views["decisions"], 0
        self._answer = views["answer"]
        self._addresses: Mapping[str, np.uint64] = {
            **{name: np.uint64(words.address + offset) for name, offset in mapped_offsets.items()},
            **{name: np.uint64(memory.address + offset) for name, offset in offsets.items()},
            **{name: np.uint64(address) for name, address in self.buffers.addresses.items()},
        }
        self.num_bytes = self.buffers.num_bytes + num_bytes
        self.buffers.clear(self.stream)
        self.stream.synchronize()  # engines may first run on streams of their own
        self._bind()

    def parts(self) -> FrameParts:
        """The frame, to be captured or run piece by piece."""
        return FrameParts(
            context=self._context,
            stream=self.stream,
            crop=partial(self._crop, target="target", out="search_region"),
            segments=[partial(_enqueue, engine) for engine in self._segments],
            heads=[partial(_enqueue, engine) for engine in self._heads],
            gate=self._gate,
            gate_flag=self._gate_flag,
            settle=self._settle,
            update=None if self._update_engine is None else self._update,
        )

    def write_rules(self, rules: Array) -> None:
        """Set the rules of the target; waits for the stream."""
        self._write("rules", rules)

    def write_target(self, target: Array) -> None:
        """Set the target's state; waits for the stream."""
        self._write("target", target)

    def write_decision(self, decision: Array) -> None:
        """Set the thresholds from the next frame on, in stream order."""
        # A ring, so that a copy under way is not written to: at most RING frames are in flight.
        staged = self._decisions[self._num_decisions % RING :][:1]
        self._num_decisions += 1
        staged[0] = decision.reshape(1)[0]
        self._context.copy_to_device(int(self._addresses["decision"]), staged, self.stream)

    def write_exit(self, exit_index: int) -> None:
        """Put the exit that the host chose into the target's state, in stream order."""
        # Exits fit into one byte, and the others of the little-endian word are always 0.
        address = int(self._addresses["target"]) + _EXIT_INDEX_OFFSET
        self._context.set_bytes(address, exit_index, 1, self.stream)

    def embed_template(self, target: Array, bbox_cxcywh: npt.NDArray[np.float32]) -> None:
        """Cut the template from the frame in slot 0 of ``sources`` and run its engine.

        Args:
            target: ``TARGET`` whose window is the template's and whose ``frame_index`` is -1.
            bbox_cxcywh: The target in that window, ``(4,)``, normalised.
        """
        self._write("template_target", target)
        self._crop(self.stream, target="template_target", out="template")
        if "template_bbox_cxcywh" in self.buffers.addresses:
            self.buffers.write("template_bbox_cxcywh", bbox_cxcywh, self.stream)
        self._engines[0].enqueue_on(self.stream.handle)
        self.stream.synchronize()

    def read_answer(self) -> tuple[float, float]:
        """Uncertainty and score of the segment that ran last; waits for the stream once."""
        for word, name in enumerate(("uncertainty", "score")):
            target = int(self._addresses["answer"]) + 4 * word
            self._context.copy_on_device(target, int(self._addresses[name]), 4, self.stream)
        self.stream.synchronize()
        uncertainty, score = self._answer.tolist()
        return uncertainty, score

    def read_window(self) -> CropWindow:
        """Where the next frame is looked at, to fractions of a pixel; waits for the stream once."""
        found = np.zeros(1, TARGET)
        self._context.copy_from_device(found, int(self._addresses["target"]), self.stream)
        left, top, side = (int(v) for v in found["window"][0].tolist())
        corner_x, corner_y = (float(found[f"corner_{axis}_px"][0]) for axis in "xy")
        return CropWindow(left, top, side, corner_x - left, corner_y - top)

    def _write(self, name: str, value: Array) -> None:
        self._context.copy_to_device(int(self._addresses[name]), value.reshape(1), self.stream)
        self.stream.synchronize()

    def _bind(self) -> None:
        """Give every engine its memory; each runs once, because a first run cannot be captured."""
        handle = self.stream.handle
        for engine in self._engines:
            engine.bind_device(self.buffers.addresses, scratch=self.buffers.scratch, stream=handle)
        self.stream.synchronize()

    def _crop(self, stream: Stream, *, target: str, out: str) -> None:
        is_template = out == "template"
        size_px = self._crops.template_size_px if is_template else self._crops.search_size_px
        side = -(-size_px // _BLOCK_PX)
        self._launch(
            "edgetrack_crop",
            stream,
            "sources",
            target,
            out,
            np.int32(size_px),
            grid=(side, side, 1),
            block=_BLOCK,
        )

    def _gate(self, exit_index: int, stream: Stream, handle: int, head_handle: int | None) -> None:
        arguments = *_GATE, np.int32(exit_index), np.uint64(handle)
        if head_handle is None:
            self._launch("edgetrack_gate", stream, *arguments)
        else:
            self._launch("edgetrack_gate_with_head", stream, *arguments, np.uint64(head_handle))

    def _gate_flag(self, exit_index: int, stream: Stream) -> None:
        word = self._addresses["flags"] + np.uint64(4 * exit_index)
        self._launch("edgetrack_gate_flag", stream, *_GATE, np.int32(exit_index), word)

    def _settle(self, stream: Stream) -> None:
        """Settle, and say that the frame is done: once the update's crop is cut, if it has one."""
        names = "bbox_cxcywh", "score", "uncertainty", "rules", "target", "results"
        if self._update_engine is None:
            self._launch("edgetrack_settle", stream, *names, _NOWHERE, _NOWHERE)
            return
        bbox = self._addresses.get("template_bbox_cxcywh", _NOWHERE)
        self._launch("edgetrack_settle", stream, *names, "template_target", bbox)
        self._crop(stream, target="template_target", out="template")
        self._launch("edgetrack_tell", stream, "target", "results")

    def _update(self, stream: Stream) -> None:
        """Run the update graph, and copy what it wrote to where the next frame reads it."""
        assert self._update_engine is not None, "there is no such part without an update graph"
        _enqueue(self._update_engine, stream)
        for name, source in self._carried.items():
            num_chunks = self.buffers.sizes[name] // _CHUNK_BYTES
            self._launch(
                "edgetrack_carry",
                stream,
                *("target", source, name, np.uint32(num_chunks)),
                grid=(min(-(-num_chunks // _CARRY_THREADS), _MAX_CARRY_BLOCKS), 1, 1),
                block=(_CARRY_THREADS, 1, 1),
            )

    def _launch(
        self,
        kernel: str,
        stream: Stream,
        *arguments: Any,
        grid: tuple[int, int, int] = _ONE,
        block: tuple[int, int, int] = _ONE,
    ) -> None:
        """Launch a kernel; names stand for addresses."""
        values = [self._addresses[a] if isinstance(a, str) else a for a in arguments]
        self._kernels[kernel].launch(stream, grid, block, *values)


def _enqueue(engine: DeviceEngine, stream: Stream) -> None:
    engine.enqueue_on(stream.handle)


def _offsets(arrays: Mapping[str, tuple[np.dtype[Any], int]]) -> tuple[dict[str, int], int]:
    """Aligned offsets of arrays in one block, and its size."""
    offsets: dict[str, int] = {}
    size = 0
    for name, (dtype, count) in arrays.items():
        offsets[name] = size
        size += -(-dtype.itemsize * count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, size
