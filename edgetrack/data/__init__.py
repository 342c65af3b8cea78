"""Data sets: reading what others published, and rendering our own."""
