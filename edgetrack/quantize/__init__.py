"""Precision lives in the graph: FP16 by casts; calibration caches and Q/DQ graphs follow."""
