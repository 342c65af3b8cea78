"""A history of templates in fixed memory, and the few of them that the next frame uses.

FARTrack keeps every template of a video and picks some by exponential sampling: the first, the
latest, and between them ever closer to the latest. Here the history has M places: it holds every
``stride``-th template, and when it is full, every second one is dropped and the stride doubles.
Everything is a tensor of a fixed shape, so that it can live in an exported graph.
"""

import torch
from torch import Tensor

__all__ = ["choose_templates", "enter_template", "first_clock", "first_history"]

_DECAY = 0.7
_PARTS = 1000
# From here on the clock stands: after more than a year of video at 30 frames per second.
_LAST_FRAME = 2**30


def first_history(tokens: Tensor, num_places: int) -> Tensor:
    """The history ``(B, M, ...)`` of one template ``(B, ...)``: it is in all places."""
    return tokens[:, None].expand(-1, num_places, *tokens.shape[1:]).contiguous()


def first_clock(reference: Tensor) -> Tensor:
    """The clock of a history of one template: int32 ``(B, 2)``, the latest's number and stride.

    Args:
        reference: Any tensor ``(B, ...)``, finite. The clock is computed from it, because engines
            have no outputs that depend on no input.
    """
    zero = (reference.flatten(1)[:, :1] * 0).int()
    return torch.cat([zero, zero + 1], 1)


def enter_template(history: Tensor, clock: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Take in the next template.

    Args:
        history: ``(B, M, ...)``; M is even.
        clock: int32 ``(B, 2)``.
        tokens: The template ``(B, ...)``.

    Returns:
        History and clock. The template itself is in the history only if its number is a multiple
        of the stride.
    """
    num_places = history.shape[1]
    frame = (clock[:, :1] + 1).clamp(max=_LAST_FRAME)
    stride = clock[:, 1:].clamp(min=1)
    is_full = frame == stride * num_places
    thinned = torch.cat([history[:, ::2], history[:, num_places // 2 :]], 1)
    history = torch.where(_like(is_full, history), thinned, history)
    stride = torch.where(is_full, stride * 2, stride)
    places = torch.arange(num_places, dtype=torch.int32, device=clock.device)
    is_place = places * stride == frame
    history = torch.where(_like(is_place, history), tokens[:, None], history)
    return history, torch.cat([frame, stride], 1)


def choose_templates(history: Tensor, clock: Tensor, latest: Tensor, num_chosen: int) -> Tensor:
    """Pick templates by exponential sampling.

    Of n templates these are 0, ``int((n - 1) * (1 - 0.7^i))`` for i from 1, and n - 1; while there
    are too few, the first repeats. One that the history dropped is replaced by the one before it.

    Args:
        history: ``(B, M, ...)``.
        clock: int32 ``(B, 2)``.
        latest: The latest template ``(B, ...)``.
        num_chosen: S.

    Returns:
        ``(B, S, ...)``, oldest first.
    """
    if num_chosen == 1:
        return history[:, :1]
    frame, stride = clock[:, :1], clock[:, 1:].clamp(min=1)
    middle = range(1, num_chosen - 1)
    shares = [0, *(round(_PARTS * (1 - _DECAY**i)) for i in middle)]
    # Filled in on the device: copies from host memory cannot be captured in a CUDA graph.
    share = torch.cat([torch.full_like(frame[:1, 0], number) for number in shares])
    # Whole thousands apart, so that no product leaves int32. ``torch.div`` would export a division
    # of floats, which cannot tell large frame numbers apart.
    thousands = frame // _PARTS
    spread = thousands * share + (frame - thousands * _PARTS) * share // _PARTS
    order = torch.arange(num_chosen - 1, dtype=torch.int32, device=clock.device)
    padded = (order + frame + 1 - num_chosen).clamp(min=0)
    number = torch.where(frame + 1 < num_chosen, padded, spread)
    place = (number // stride).clamp(max=history.shape[1] - 1)
    flat = history.flatten(2)
    index = place.long()[..., None].expand(-1, -1, flat.shape[2])
    older = flat.gather(1, index).reshape(-1, num_chosen - 1, *history.shape[2:])
    return torch.cat([older, latest[:, None]], 1)


def _like(mask: Tensor, history: Tensor) -> Tensor:
    """A mask ``(B, 1)`` or ``(B, M)`` with as many axes as a history has."""
    return mask.reshape(*mask.shape, *(1 for _ in history.shape[2:]))
