"""What a tracker believes of its target from frame to frame, and where it looks next.

The state is a box and two small counters, and nothing here depends on a family: a device kernel
can do the same without asking the host. Each rule can be switched off; ``TargetRules()`` of a
bundle is what its manifest says.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgetrack.boxes import clip_xywh
from edgetrack.crops import CropWindow

__all__ = ["TargetRules", "TargetState"]

Float32Array = npt.NDArray[np.float32]

# OSTrack keeps this much of a box inside the frame.
_CLIP_MARGIN_PX = 10
_MIN_SIDE_PX = 2.0
_GOLDEN_ANGLE_RAD = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True, kw_only=True)
class TargetRules:
    """How answers of the network become the state of a target.

    Attributes:
        centre_smoothing: Share of the last centre that is kept, in [0, 1); 0 is off.
        size_smoothing: Share of the last size that is kept, in [0, 1); 0 is off.
        max_size_change: Largest factor by which width or height may change in one frame, at least
            1; infinity is off.
        unsure_score: A frame with a lower score is unsure; 0 is off, and with it all that follows.
        patience: Unsure frames in a row before the tracker looks wider.
        search_growth: Factor on the side of the search window from then on, at least 1.
        size_hold: Share of the last size that is kept in an unsure frame, in [0, 1]; the centre
            still follows the answer, which is how a target that left is found again.
        lost_after: Unsure frames in a row before the target counts as lost.
        found_score: A lost target counts as found again at this score, not before.
        look_around: While the target is lost, every second look goes beside the last place, by
            this share of the window's side and further each time; such a look counts only if it
            finds the target. 0 is off.
    """

    centre_smoothing: float = 0.0
    size_smoothing: float = 0.0
    max_size_change: float = math.inf
    unsure_score: float = 0.0
    patience: int = 2
    search_growth: float = 1.0
    size_hold: float = 0.0
    lost_after: int = 10
    found_score: float = 0.0
    look_around: float = 0.0

    def __post_init__(self) -> None:
        """Refuse rules that mean nothing."""
        shares = (
            "centre_smoothing",
            "size_smoothing",
            "unsure_score",
            "size_hold",
            "found_score",
            "look_around",
        )
        limits = dict.fromkeys(shares, (0.0, 1.0))
        limits |= dict.fromkeys(("max_size_change", "search_growth"), (1.0, math.inf))
        limits |= dict.fromkeys(("patience", "lost_after"), (1, math.inf))
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")

    @classmethod
    def off(cls) -> "TargetRules":
        """OSTrack's plain loop: the answer is the state."""
        return cls()

    @classmethod
    def of(cls, values: Mapping[str, float]) -> "TargetRules":
        """Rules from names and numbers, as a manifest holds them.

        Raises:
            ValueError: There is no such rule, or a value is out of range.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"rules: expected names among {sorted(names)}, got {unknown}")
        return cls(**values)  # type: ignore[arg-type]  # whole numbers may be written as 2.0


class TargetState:
    """A target's box, how sure the tracker is of it, and where to look next.

    Args:
        bbox_xywh: The target in the first frame, pixels, ``(4,)``.
        frame_shape: ``(H, W, …)`` of all frames.
        rules: How answers become state.
        geometry: ``bundle.CropSpec.geometry``; OSTrack's settles no side below 10 px.

    Attributes:
        bbox_xywh: The target, float32 ``(4,)``, pixels.
        num_unsure: Unsure frames in a row.
        is_lost: Whether the target counts as lost.
    """

    def __init__(
        self,
        bbox_xywh: Float32Array,
        *,
        frame_shape: tuple[int, ...],
        rules: TargetRules,
        geometry: str = "edgetrack",
    ) -> None:
        self.bbox_xywh = bbox_xywh
        self.num_unsure = 0
        self.is_lost = False
        self._height_px, self._width_px = frame_shape[:2]
        self._rules, self._geometry = rules, geometry

    def search_window(self, factor: float) -> CropWindow:
        """Where to look in the next frame; ``factor`` is the bundle's ``search_factor``."""
        rules, bbox_xywh = self._rules, self.bbox_xywh
        if rules.unsure_score and self.num_unsure >= rules.patience:
            factor *= rules.search_growth
        if self._looks_beside:
            bbox_xywh = self._beside(factor)
        return CropWindow.around(bbox_xywh, factor=factor, geometry=self._geometry)

    def settle(self, answer_xywh: Float32Array, score: float) -> bool:
        """Take in what the network said of the window that ``search_window`` gave.

        Args:
            answer_xywh: Float32 ``(4,)``, frame pixels; one with a NaN or infinity counts as
                unsure and changes nothing else.
            score: In [0, 1].

        Returns:
            Whether box and score are finite.
        """
        rules = self._rules
        is_sane = bool(np.isfinite(answer_xywh).all()) and math.isfinite(score)
        is_unsure = not is_sane or score < rules.unsure_score
        is_found = is_sane and score >= max(rules.found_score, rules.unsure_score)
        is_taken = is_sane and (is_found or not self._looks_beside)
        self.num_unsure = self.num_unsure + 1 if is_unsure else 0
        if self.is_lost:
            self.is_lost = not is_found
        else:
            self.is_lost = self.num_unsure >= rules.lost_after
        if is_taken:
            hold = max(rules.size_smoothing, rules.size_hold if is_unsure else 0.0)
            self.bbox_xywh = self._in_frame(self._smoothed(answer_xywh, size_smoothing=hold))
        return is_sane

    @property
    def _looks_beside(self) -> bool:
        return self.is_lost and self._rules.look_around > 0 and self.num_unsure % 2 == 1

    def _smoothed(self, answer_xywh: Float32Array, *, size_smoothing: float) -> Float32Array:
        rules, last = self._rules, self.bbox_xywh
        size = answer_xywh[2:]
        if math.isfinite(rules.max_size_change):
            size = np.clip(size, last[2:] / rules.max_size_change, last[2:] * rules.max_size_change)
        size = size + size_smoothing * (last[2:] - size)
        centre = answer_xywh[:2] + answer_xywh[2:] / 2
        centre = centre + rules.centre_smoothing * (last[:2] + last[2:] / 2 - centre)
        return np.concatenate([centre - size / 2, size]).astype(np.float32)

    def _in_frame(self, bbox_xywh: Float32Array) -> Float32Array:
        """A box near the frame and of a size that can be cropped."""
        clipped = clip_xywh(
            bbox_xywh,
            width_px=self._width_px,
            height_px=self._height_px,
            margin_px=_CLIP_MARGIN_PX,
            min_side_px=_CLIP_MARGIN_PX if self._geometry == "ostrack" else 0,
        )
        clipped[2:] = np.maximum(clipped[2:], _MIN_SIDE_PX)
        return clipped.astype(np.float32)

    def _beside(self, factor: float) -> Float32Array:
        """The box moved along a spiral around the last place, kept in the frame."""
        turn = max(self.num_unsure - self._rules.lost_after, 0) // 2 + 1
        x, y, w, h = self.bbox_xywh.tolist()
        reach = self._rules.look_around * factor * math.sqrt(w * h) * math.sqrt(turn)
        angle = turn * _GOLDEN_ANGLE_RAD
        centre_x = min(max(x + w / 2 + reach * math.cos(angle), 0.0), self._width_px)
        centre_y = min(max(y + h / 2 + reach * math.sin(angle), 0.0), self._height_px)
        return np.array([centre_x - w / 2, centre_y - h / 2, w, h], np.float32)
