"""What a model computes with is on its device before it runs, as a CUDA graph demands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_families import FAMILIES
from small_fartrack import FARTRACK_PATCH, FARTRACK_PRIOR, make_fartrack
from small_models import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrack.models.segmented import SegmentedModel, State

MODELS: dict[str, Callable[[], SegmentedModel]] = {
    **FAMILIES,
    "fartrack with all options": lambda: make_fartrack(FARTRACK_PATCH),
    "fartrack, prior": lambda: make_fartrack(FARTRACK_PRIOR),
}


class HostCopies(TorchDispatchMode):
    """Counts tensors that are made of numbers in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def run_every_graph(model: SegmentedModel) -> State:
    state: State = make_inputs(model.config)
    state |= model.embed_template(state["template"], state["template_bbox_cxcywh"])
    for index in range(model.num_exits):
        state |= model.run_segment(index, state)
        if model.has_heads:
            state |= model.run_head(index, state)
    return state | model.run_update(state) if model.update_inputs else state


def test_a_tensor_of_numbers_is_counted() -> None:
    with HostCopies() as copies:
        torch.arange(3)
        torch.full((2,), 3.0)
        assert copies.count == 0

        torch.tensor([1.0, 2.0])

    assert copies.count == 1


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@torch.no_grad()
def test_no_graph_copies_numbers_from_host_memory(make: Callable[[], SegmentedModel]) -> None:
    model = make()

    with HostCopies() as copies:
        run_every_graph(model)

    assert copies.count == 0
