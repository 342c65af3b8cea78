import numpy as np

from edgetrack.bundle import Bundle
from edgetrack.runtime.buffers import ALIGNMENT_BYTES, allocate


def test_every_tensor_of_a_bundle_has_a_buffer_of_its_own(toy: Bundle) -> None:
    specs = {spec.name: spec for g in toy.graphs for spec in (*g.inputs, *g.outputs)}

    buffers = allocate(toy)

    assert buffers.keys() == specs.keys()
    for name, array in buffers.items():
        assert array.shape == specs[name].shape
        assert array.dtype == np.dtype(specs[name].dtype)
        assert not array.any()
        assert not any(np.shares_memory(array, buffers[n]) for n in buffers if n != name)


def test_buffers_are_what_devices_ask_for(toy: Bundle) -> None:
    for array in allocate(toy).values():
        assert array.ctypes.data % ALIGNMENT_BYTES == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_two_chains_share_nothing(toy: Bundle) -> None:
    first, second = allocate(toy), allocate(toy)

    assert not any(np.shares_memory(first[name], second[name]) for name in first)
