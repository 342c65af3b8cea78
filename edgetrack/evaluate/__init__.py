"""Evaluation: metrics, protocols, results. Scores anything with `init` and `update`."""
