"""What the gate looks at: clips to time trackers on, and the crops that a tracker cuts of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetrack.bundle import Bundle
from edgetrack.data.target_clips import TargetClip, render_target_clips
from edgetrack.runtime.recording import record_crops

__all__ = ["Evidence", "gather", "render_evidence"]

OnFraction = Callable[[float], None]

# Some 250 kB each at most; of more, every second is dropped, again and again.
_MAX_CROPS = 1000
_MAX_COMPARED = 256
_MAX_NAMED = 3
# Other clips than those of ``benchmarks/make_calibration.py``.
_NUM_CLIPS, _NUM_FRAMES, _FIRST_SEED = 8, 13, 1000


@dataclass(frozen=True)
class Evidence:
    """Clips and their crops.

    Attributes:
        source: Where they are from, in words.
        clips: Frames to track on.
        crops: Per frame its name and what the tracker read, as ``record_crops`` gives them,
            evenly thinned where there are many.
    """

    source: str
    clips: Sequence[TargetClip]
    crops: Sequence[tuple[str, Mapping[str, Any]]]

    @property
    def compared(self) -> list[Mapping[str, Any]]:
        """Crops to compare engines on: not more than say something new."""
        stride = max(math.ceil(len(self.crops) / _MAX_COMPARED), 1)
        return [crop for _, crop in self.crops[::stride]]


def gather(
    bundle: Bundle,
    clips: Sequence[TargetClip],
    *,
    source: str = "",
    on_progress: OnFraction | None = None,
) -> Evidence:
    """Track on clips, and keep what the tracker read.

    Args:
        bundle: What tracks, in float.
        clips: On what.
        source: Where they are from, in words; their names unless given.
        on_progress: Called with the fraction done.

    Raises:
        SourceError: A clip cannot be read.
        ValueError: A clip is empty, or its box does not overlap the first frame.
    """
    crops: list[tuple[str, Mapping[str, Any]]] = []
    stride, num_seen = 1, 0
    for number, clip in enumerate(clips, start=1):
        for crop in record_crops(bundle, clip.frames(), clip.bbox, name=clip.name):
            if num_seen % stride == 0:
                crops.append(crop)
            if len(crops) > _MAX_CROPS:
                crops, stride = crops[::2], 2 * stride
            num_seen += 1
        if on_progress is not None:
            on_progress(number / len(clips))
    return Evidence(source or _named(clips), clips, crops)


def render_evidence(bundle: Bundle, *, on_progress: OnFraction | None = None) -> Evidence:
    """Track on clips that are rendered for it.

    Raises:
        BackendUnavailableError: OpenCV is not installed.
    """
    clips = render_target_clips(
        num_clips=_NUM_CLIPS, num_frames=_NUM_FRAMES, first_seed=_FIRST_SEED
    )
    source = f"{_NUM_CLIPS} rendered clips"
    return gather(bundle, clips, source=source, on_progress=on_progress)


def _named(clips: Sequence[TargetClip]) -> str:
    """Names of the first clips, and how many follow."""
    names = list(dict.fromkeys(clip.name for clip in clips))
    num_more = len(names) - _MAX_NAMED
    more = [f"{num_more} more"] if num_more > 0 else []
    return ", ".join([*names[:_MAX_NAMED], *more])
