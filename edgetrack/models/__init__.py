"""Tracker families, authored in torch: one file each."""
