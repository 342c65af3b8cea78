"""Backends: what compiles the graphs of a bundle, and what runs them."""
