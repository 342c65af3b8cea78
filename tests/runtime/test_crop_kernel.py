"""The crop kernel against ``Cropper``, which is OpenCV."""

import math
import platform

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from compiled_kernels import CompiledKernels

from edgetrack.crops import Cropper, CropWindow
from edgetrack.runtime.device_state import FORMATS, RING, SOURCE, TARGET

UInt8Array = npt.NDArray[np.uint8]

# Grey levels. The kernel rounds as OpenCV's resize does on x86; elsewhere it may have its own way.
FROM_CROPPER = 1
MAX_UNEQUAL_SHARE = 0.0 if platform.machine() == "x86_64" else 1.0
# Huge windows that leave the frame go through warpAffine. OpenCV 4 rounds positions to 1 / 32
# pixel, which is up to 255 / 64 grey levels on either axis.
FROM_WARP = 1 if int(cv2.__version__.split(".")[0]) >= 5 else 8
FROM_CONVERTED = 2
GUARD = 77
FRAME_NUMBER = 6


def textured(height: int, width: int, *channels: int, seed: int = 3) -> UInt8Array:
    """Edges and noise: what a wrong tap or rounding shows in."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, *channels))
    fine = rng.integers(-40, 41, (height, width, *channels))
    coarse = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.clip(coarse + fine, 0, 255).astype(np.uint8)


def with_pitch(plane: UInt8Array, padding_bytes: int) -> UInt8Array:
    """The rows of an image as bytes, each with padding behind it that must not show."""
    rows = plane.reshape(plane.shape[0], -1)
    return np.pad(rows, [(0, 0), (0, padding_bytes)], constant_values=GUARD)


def windows(shape: tuple[int, ...], num_windows: int, *, max_side_px: int) -> list[CropWindow]:
    """Windows inside, at borders and outside of a frame; the smallest sides are among them."""
    rng = np.random.default_rng(num_windows)
    height, width = shape[:2]
    found = []
    for k in range(num_windows):
        side = int(rng.integers(1, 8) if k % 8 == 0 else rng.integers(1, max_side_px))
        left = int(rng.integers(-side - 5, width + 5))
        top = int(rng.integers(-side - 5, height + 5))
        if k % 3 == 0 and side <= min(height, width):  # wholly inside
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        found.append(CropWindow(left, top, side))
    return found


class KernelCropper:
    """Cuts crops out of one frame with the kernel.

    Args:
        kernels: Where to run it.
        planes: Rows of bytes, pitch included: the frame, and for NV12 its chroma.
        frame_format: A name of ``FORMATS``.
        shape: ``(H, W)``.
    """

    def __init__(
        self,
        kernels: CompiledKernels,
        *planes: UInt8Array,
        frame_format: str,
        shape: tuple[int, ...],
    ) -> None:
        self._kernels, self._planes = kernels, planes
        self._sources = np.zeros(RING, SOURCE)  # the other slots hold no frame
        self._target = np.zeros((), TARGET)
        self._target["frame_index"] = FRAME_NUMBER - 1
        source = self._sources[FRAME_NUMBER % RING]
        source["pixels"], source["pitch_bytes"] = planes[0].ctypes.data, planes[0].strides[0]
        if len(planes) > 1:
            source["chroma"] = planes[1].ctypes.data
            source["chroma_pitch_bytes"] = planes[1].strides[0]
        source["format"] = FORMATS[frame_format]
        source["height_px"], source["width_px"] = shape[:2]
        self._sources[FRAME_NUMBER % RING] = source

    def crop(self, window: CropWindow, size_px: int) -> UInt8Array:
        self._target["window"] = (window.left_px, window.top_px, window.side_px)
        guarded = np.full(3 * size_px**2 + 64, GUARD, np.uint8)
        num_blocks = math.ceil(size_px / 16)
        self._kernels.launch(
            "edgetrack_crop",
            *(self._sources, self._target, guarded[32:-32], np.int32(size_px)),
            grid=(num_blocks, num_blocks, 1),
            block=(16, 16, 1),
        )
        assert (guarded[:32] == GUARD).all()
        assert (guarded[-32:] == GUARD).all()
        return guarded[32:-32].reshape(size_px, size_px, 3)


def cut(frame: UInt8Array, window: CropWindow, size_px: int) -> UInt8Array:
    out = np.zeros((size_px, size_px, 3), np.uint8)
    Cropper(size_px).crop(frame, window, out=out)
    return out


def unequal(crop: UInt8Array, expected: UInt8Array, *, within: int) -> int:
    """How many values differ; none may by more than some grey levels."""
    difference = np.abs(crop.astype(int) - expected)
    assert difference.max() <= within, np.argwhere(difference > within)[:5]
    return int(np.count_nonzero(difference))


FRAMES = {
    "bgr8": textured(120, 161, 3),
    "rgb8": textured(120, 161, 3),
    "gray8": textured(120, 161),
    "bgra8": textured(120, 161, 4),
    "rgba8": textured(120, 161, 4),
}


def as_opencv(frame: UInt8Array, frame_format: str) -> UInt8Array:
    """A frame in the order of channels that ``Cropper`` takes."""
    if frame_format.startswith("rgb"):
        return np.ascontiguousarray(frame[..., [2, 1, 0, 3][: frame.shape[2]]])
    return frame


@pytest.mark.parametrize("size_px", [50, 128])
@pytest.mark.parametrize("frame_format", FRAMES)
def test_a_crop_equals_the_host_s(
    kernels: CompiledKernels, frame_format: str, size_px: int
) -> None:
    frame = FRAMES[frame_format]
    cropper = KernelCropper(
        kernels, with_pitch(frame, 13), frame_format=frame_format, shape=frame.shape
    )
    cases = windows(frame.shape, 100, max_side_px=240)
    num_unequal = sum(
        unequal(
            cropper.crop(window, size_px),
            cut(as_opencv(frame, frame_format), window, size_px),
            within=FROM_CROPPER,
        )
        for window in cases
    )

    assert num_unequal <= MAX_UNEQUAL_SHARE * len(cases) * size_px**2 * 3


@pytest.mark.parametrize(
    "window",
    [
        CropWindow(0, 0, 120),
        CropWindow(0, 0, 128),
        CropWindow(-128, 10, 128),
        CropWindow(161, 10, 128),
        CropWindow(10, -128, 128),
        CropWindow(10, 120, 128),
        CropWindow(-3000, 9000, 64),
        CropWindow(160, 119, 1),
        CropWindow(161, 119, 1),
        CropWindow(-47, -67, 256),
    ],
)
def test_windows_at_the_very_border(kernels: CompiledKernels, window: CropWindow) -> None:
    frame = FRAMES["bgr8"]
    cropper = KernelCropper(kernels, with_pitch(frame, 0), frame_format="bgr8", shape=frame.shape)

    unequal(cropper.crop(window, 128), cut(frame, window, 128), within=FROM_CROPPER)


@pytest.mark.parametrize("frame_format", ["bgr8", "gray8"])
def test_a_huge_window_of_a_large_frame(kernels: CompiledKernels, frame_format: str) -> None:
    frame = textured(1300, 1500, *FRAMES[frame_format].shape[2:])
    cropper = KernelCropper(
        kernels, with_pitch(frame, 5), frame_format=frame_format, shape=frame.shape
    )
    inside = [CropWindow(7, 9, 1250), CropWindow(100, 100, 1025)]
    leaving = [CropWindow(-700, -500, 2600), CropWindow(900, 700, 1100), CropWindow(-9, 3, 1301)]
    for window in inside:
        unequal(cropper.crop(window, 128), cut(frame, window, 128), within=FROM_CROPPER)
    for window in leaving:
        unequal(cropper.crop(window, 128), cut(frame, window, 128), within=FROM_WARP)


def test_only_the_slot_of_the_frame_at_work_is_read(kernels: CompiledKernels) -> None:
    frame = FRAMES["bgr8"]
    cropper = KernelCropper(kernels, with_pitch(frame, 0), frame_format="bgr8", shape=frame.shape)
    window = CropWindow(5, 5, 64)
    expected = cut(frame, window, 64)

    for frame_index in (FRAME_NUMBER - 1, FRAME_NUMBER - 1 + RING, 2**31 - 3):
        cropper._target["frame_index"] = frame_index
        np.testing.assert_array_equal(cropper.crop(window, 64), expected)
    cropper._target["frame_index"] = FRAME_NUMBER
    assert not cropper.crop(window, 64).any()


def nv12(height: int, width: int) -> tuple[UInt8Array, UInt8Array]:
    """Luma ``(H, W)`` and interleaved chroma ``(H / 2, W / 2, 2)``, over all bytes."""
    return textured(height, width, seed=4), textured(height // 2, width // 2, 2, seed=5)


def bgr_of_bt601(luma: UInt8Array, chroma: UInt8Array) -> UInt8Array:
    rows = np.concatenate([luma, chroma.reshape(luma.shape[0] // 2, -1)])
    return np.asarray(cv2.cvtColor(rows, cv2.COLOR_YUV2BGR_NV12), np.uint8)


def bgr_of_bt709(luma: UInt8Array, chroma: UInt8Array) -> UInt8Array:
    """ITU-R BT.709, limited range: Kr 0.2126, Kb 0.0722; luma from 16 to 235, chroma to 240."""
    kr, kb = 0.2126, 0.0722
    kg = 1 - kr - kb
    light = np.maximum((luma.astype(float) - 16) / 219, 0)
    cb, cr = ((chroma.astype(float) - 128) / 224).repeat(2, 0).repeat(2, 1).transpose(2, 0, 1)
    red, blue = light + 2 * (1 - kr) * cr, light + 2 * (1 - kb) * cb
    green = (light - kr * red - kb * blue) / kg
    return np.clip(np.rint(np.stack([blue, green, red], -1) * 255), 0, 255).astype(np.uint8)


CONVERSIONS = {"nv12-bt601": bgr_of_bt601, "nv12-bt709": bgr_of_bt709}


@pytest.mark.parametrize("frame_format", CONVERSIONS)
def test_nv12_is_converted_and_then_cropped(kernels: CompiledKernels, frame_format: str) -> None:
    luma, chroma = nv12(120, 162)
    bgr = CONVERSIONS[frame_format](luma, chroma)
    planes = with_pitch(luma, 30), with_pitch(chroma, 14)
    cropper = KernelCropper(kernels, *planes, frame_format=frame_format, shape=luma.shape)
    cases = windows(luma.shape, 100, max_side_px=240)

    num_unequal = sum(
        unequal(cropper.crop(window, 96), cut(bgr, window, 96), within=FROM_CONVERTED)
        for window in cases
    )

    assert num_unequal <= MAX_UNEQUAL_SHARE * len(cases) * 96**2 * 3


@pytest.mark.parametrize("frame_format", CONVERSIONS)
def test_every_colour_of_nv12_is_converted(kernels: CompiledKernels, frame_format: str) -> None:
    u, v = np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 5))
    chroma = np.stack([u, v], -1).astype(np.uint8)
    size_px = 2 * chroma.shape[0]
    for value in (0, 15, 16, 17, 90, 128, 200, 235, 236, 255):
        luma = np.full((size_px, size_px), value, np.uint8)
        cropper = KernelCropper(
            kernels, luma, with_pitch(chroma, 0), frame_format=frame_format, shape=luma.shape
        )

        crop = cropper.crop(CropWindow(0, 0, size_px), size_px)

        unequal(crop[..., ::-1], CONVERSIONS[frame_format](luma, chroma), within=1)


def test_the_two_ranges_of_nv12_differ(kernels: CompiledKernels) -> None:
    luma, chroma = nv12(64, 64)
    crops = [
        KernelCropper(
            kernels, luma, with_pitch(chroma, 0), frame_format=name, shape=luma.shape
        ).crop(CropWindow(0, 0, 64), 64)
        for name in CONVERSIONS
    ]

    assert np.abs(crops[0].astype(int) - crops[1]).max() > 20
