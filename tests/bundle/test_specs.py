import pytest

from edgetrack.bundle import CropSpec


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_crops_of_no_size_are_refused(value: float) -> None:
    sizes = {"template_size_px": 64, "search_size_px": 128, "search_factor": 4.0}

    with pytest.raises(ValueError, match=r"^crops: expected positive sizes and factors"):
        CropSpec(**sizes, template_factor=value)  # type: ignore[arg-type]  # sizes are whole


def test_an_unknown_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^crops: expected a geometry among .*got 'square'"):
        CropSpec(
            template_size_px=64,
            template_factor=2.0,
            search_size_px=128,
            search_factor=4.0,
            geometry="square",
        )
