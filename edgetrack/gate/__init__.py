"""The gate of INT8: is it faster on this device, and does it say the same? If not, float stays."""

from edgetrack.gate.evidence import Evidence, gather
from edgetrack.gate.settle import settle
from edgetrack.gate.verdict import GraphVerdict, Verdict

__all__ = ["Evidence", "GraphVerdict", "Verdict", "gather", "settle"]
