"""A calibration of the bundle that ships, shared by the tests of what is made from it."""

from typing import Any

import pytest
from recorded import record_inputs

from edgetrack.bundle import Bundle
from edgetrack.quantize.cache import CalibrationCache
from edgetrack.quantize.calibrate import calibrate

NamedCrops = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def crops(shipped_bundle: Bundle) -> NamedCrops:
    """Ten crops of a rendered clip."""
    recorded = record_inputs(shipped_bundle.crops, num_frames=10, seed=3)
    return [(f"clip/{index:06d}", inputs) for index, inputs in enumerate(recorded, start=1)]


@pytest.fixture(scope="session")
def cache(shipped_bundle: Bundle, crops: NamedCrops) -> CalibrationCache:
    """What the default method makes of them."""
    return calibrate(shipped_bundle, crops)
