"""Drawing on frames, and plots of training and of exits: pure functions."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetrack.errors import BackendUnavailableError, DataError, package_missing

try:
    import cv2
except ImportError as error:
    raise package_missing("cv2", error) from error

__all__ = [
    "draw_result",
    "exit_colour",
    "plot_curves",
    "plot_losses",
    "plot_training",
    "select_bbox",
    "show_frame",
]

Frame = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

# From Okabe and Ito's palette, told apart by the colour-blind too; BGR.
_FIRST_EXIT, _MIDDLE_EXIT, _LAST_EXIT = (115, 158, 0), (0, 159, 230), (167, 121, 204)
_TRUTH_COLOUR = (255, 255, 255)
_LOST_COLOUR = (0, 0, 235)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_AXIS_KEYS = {"stage", "step", "samples"}
_WINDOW = "edgetrack"
_MAX_CURVES_BELOW_A_LEGEND = 6  # more of them and it stands beside the panel


def exit_colour(exit_index: int, *, num_exits: int) -> Colour:
    """The colour of an exit, BGR: green for the first, over orange, to purple for the last."""
    position = exit_index / max(num_exits - 1, 1)
    blend = np.interp(position, (0, 0.5, 1), (0, 1, 2))
    stops = np.array([_FIRST_EXIT, _MIDDLE_EXIT, _LAST_EXIT])
    blue, green, red = (round(float(np.interp(blend, (0, 1, 2), c))) for c in stops.T)
    return blue, green, red


def draw_result(
    frame: Frame,
    *,
    bbox_xywh: npt.ArrayLike,
    exit_index: int,
    num_exits: int,
    score: float,
    uncertainty: float,
    latency_ms: float,
    truth_xywh: npt.ArrayLike | None = None,
    lost: bool = False,
) -> Frame:
    """Draw a box and a bar of text over a copy of a frame.

    Lines and letters grow with the frame.

    Args:
        frame: ``(H, W, 3)`` uint8 BGR.
        bbox_xywh: The box ``(4,)``, pixels; it may reach outside.
        exit_index: The exit that was taken, from 0; gives the box its colour.
        num_exits: How many there are.
        score: Confidence in [0, 1].
        uncertainty: What the exit was judged by.
        latency_ms: Time of the update.
        truth_xywh: A second box in thin white; nothing is drawn where it holds a NaN.
        lost: Draw the box in red and say so.

    Returns:
        The drawn copy, ``(H, W, 3)`` uint8 BGR.
    """
    canvas: Frame = np.array(frame, np.uint8)
    colour = _LOST_COLOUR if lost else exit_colour(exit_index, num_exits=num_exits)
    thickness = max(round(min(canvas.shape[:2]) / 240), 2)
    if truth_xywh is not None:
        _draw_box(canvas, truth_xywh, colour=_TRUTH_COLOUR, thickness=1)
    _draw_box(canvas, bbox_xywh, colour=colour, thickness=thickness)
    fields = [
        "LOST" if lost else f"exit {exit_index}",
        f"unc {uncertainty:.2f}",
        f"score {score:.2f}",
        f"{latency_ms:.1f} ms",
    ]
    _draw_bar(canvas, "  ".join(fields), colour=colour)
    return canvas


def _draw_box(canvas: Frame, bbox_xywh: npt.ArrayLike, *, colour: Colour, thickness: int) -> None:
    x, y, w, h = np.asarray(bbox_xywh, np.float64).tolist()
    if not math.isfinite(x + y + w + h):
        return
    # The first and last pixel of the box; far ones are cut to what cv2 can take.
    corners = np.clip([x, y, x + w - 1, y + h - 1], -(2**14), 2**14)
    left, top, right, bottom = np.round(corners).astype(int).tolist()
    for shade, width_px in (((0, 0, 0), thickness + 2), (colour, thickness)):
        cv2.rectangle(canvas, (left, top), (right, bottom), shade, width_px)


def _draw_bar(canvas: Frame, text: str, *, colour: Colour) -> None:
    """A dark bar at the bottom with a swatch of the colour and the text."""
    height, width = canvas.shape[:2]
    bar = max(round(height / 18), 20)
    pad = bar // 4
    scale, weight = _fit_text(text, height_px=bar * 0.55, width_px=width - bar - 3 * pad)
    region = canvas[height - bar :]
    region[...] = region // 4
    cv2.rectangle(canvas, (pad, height - bar + pad), (bar - pad, height - pad), colour, -1)
    baseline = height - round(bar * 0.3)
    origin = (bar + pad, baseline)
    cv2.putText(canvas, text, origin, _FONT, scale, (255, 255, 255), weight, cv2.LINE_AA)


def _fit_text(text: str, *, height_px: float, width_px: float) -> tuple[float, int]:
    """Font scale and stroke with which a line of text fits a height and a width."""
    (unit_width, unit_height), _ = cv2.getTextSize(text, _FONT, 1.0, 1)
    scale = min(height_px / unit_height, width_px / unit_width)
    return scale, max(round(scale * 1.4), 1)


def plot_training(log_path: str | os.PathLike[str], out_png: str | os.PathLike[str]) -> None:
    """Plot a training log, one panel per logged number, over samples (or steps) seen.

    Args:
        log_path: JSON lines, each an object with ``step``, perhaps ``samples`` and ``stage`` (a
            line for each), and numbers such as ``loss``. A last line that was cut off by a kill
            is passed over.
        out_png: Where to write the picture.

    Raises:
        DataError: The log is missing, empty, or a line is no object.
        BackendUnavailableError: matplotlib is not installed.
    """
    entries = _read_log(Path(log_path))
    x_key = "samples" if any("samples" in e for e in entries) else "step"
    curves: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for entry in entries:
        for name in entry.keys() - _AXIS_KEYS if x_key in entry else ():
            if isinstance(entry[name], (int, float)):
                stage = curves.setdefault(name, {}).setdefault(entry.get("stage", 0), [])
                stage.append((entry[x_key], entry[name]))
    if not curves:
        raise DataError(f"{log_path}: expected numbers such as loss, got none; wait for a step")
    num_columns = min(len(curves), 3)
    num_rows = math.ceil(len(curves) / num_columns)
    figure = _new_figure(3.6 * num_columns, 2.6 * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel, (name, stages) in zip(panels, sorted(curves.items()), strict=False):
        for stage_number, points in sorted(stages.items()):
            panel.plot(*zip(*points, strict=True), linewidth=1.2, label=f"stage {stage_number}")
        panel.set_title(name, fontsize=9)
        panel.set_xlabel(x_key, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
        if len(stages) > 1:
            panel.legend(fontsize=8)
    figure.savefig(out_png, dpi=120)


def plot_curves(
    curves: Mapping[str, Points],
    out_png: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
) -> None:
    """Plot named curves of (x, y) points in one panel, such as accuracy over mean depth.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        ValueError: There is no curve.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    figure = _new_figure(6.0, 4.0)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    if len(curves) > _MAX_CURVES_BELOW_A_LEGEND:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend()
    figure.savefig(out_png, dpi=120, bbox_inches="tight")


def plot_losses(
    losses: Mapping[str, float],
    out_png: str | os.PathLike[str],
    *,
    in_float: Collection[str] = (),
    title: str = "",
) -> None:
    """Plot what quantising each layer alone costs, the worst on top.

    Args:
        losses: Layer → loss, at least 0, the worst first.
        out_png: Where the picture goes.
        in_float: The layers that stay in float; told by their colour.
        title: Above the bars.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
        ValueError: There is no layer.
    """
    if not losses:
        raise ValueError("losses: expected at least one layer, got none")
    figure = _new_figure(8.0, 1.2 + 0.19 * len(losses))
    axes = figure.subplots()
    for label, colour, is_float in (
        ("INT8", "#0072b2", False),
        ("stays in float", "#d55e00", True),
    ):
        chosen = [(k, v) for k, (n, v) in enumerate(losses.items()) if (n in in_float) == is_float]
        if chosen:
            axes.barh(*zip(*chosen, strict=True), color=colour, label=label)
    axes.set_yticks(range(len(losses)), list(losses), fontsize=7)
    axes.set_ylim(len(losses) - 0.4, -0.6)
    axes.set(xlabel="loss: mean of 1 - IoU and of uncertainty's error, summed", title=title)
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(out_png, dpi=120)


def _new_figure(width_in: float, height_in: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise package_missing("matplotlib", error) from error
    return Figure(figsize=(width_in, height_in), layout="constrained")


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: expected a training log, got no such file; train first")
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        elif number < len(lines):
            raise DataError(
                f"{path}:{number}: expected a JSON object, got {line[:40]!r}; remove the line"
            )
    return entries


def select_bbox(frame: Frame) -> tuple[float, float, float, float]:
    """Let a person draw the target in a window.

    Args:
        frame: ``(H, W, 3)`` uint8 BGR.

    Returns:
        x, y, w, h in pixels.

    Raises:
        BackendUnavailableError: This OpenCV has no windows, or there is no display.
        ValueError: Nothing was drawn.
    """
    with _window_errors():
        x, y, w, h = cv2.selectROI(_WINDOW, frame, showCrosshair=False)
        cv2.destroyWindow(_WINDOW)
    if w <= 0 or h <= 0:
        raise ValueError(
            "select: expected a box drawn in the window, got none; draw it, press Enter"
        )
    return float(x), float(y), float(w), float(h)


def show_frame(frame: Frame) -> bool:
    """Show a frame in a window.

    Returns:
        ``False`` once the person presses q or Escape.

    Raises:
        BackendUnavailableError: This OpenCV has no windows, or there is no display.
    """
    with _window_errors():
        cv2.imshow(_WINDOW, frame)
        return cv2.waitKey(1) & 0xFF not in (ord("q"), 27)


@contextlib.contextmanager
def _window_errors() -> Iterator[None]:
    # Without a display Qt does not raise: it ends the process.
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        raise BackendUnavailableError(
            "window: expected a display, got none; use --bbox and --save instead of a window"
        )
    try:
        yield
    except cv2.error as error:
        raise BackendUnavailableError(
            "window: expected OpenCV with windows, got one without; run: pip uninstall "
            "opencv-python-headless && pip install opencv-python"
        ) from error
