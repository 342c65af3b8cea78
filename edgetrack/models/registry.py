"""The families by name, and models made from a name and a configuration."""

import importlib
from collections.abc import Mapping
from typing import Any

from edgetrack.models.segmented import SegmentedModel

__all__ = ["create_model", "list_models"]

_FAMILIES = ("early_exit_vit",)


def list_models() -> tuple[str, ...]:
    """Names of the families and their configurations, such as ``early_exit_vit-tiny``."""
    names = []
    for family in _FAMILIES:
        configs = importlib.import_module(f"edgetrack.models.{family}").CONFIGS
        names += [f"{family}-{variant}" for variant in configs]
    return tuple(names)


def create_model(name: str, config: Mapping[str, Any] | None = None) -> SegmentedModel:
    """Make a model with random weights.

    Args:
        name: ``<family>-<variant>``; with ``config``, only the family counts.
        config: A configuration as ``SegmentedModel.config_dict`` gives it, instead of the variant's.

    Raises:
        ValueError: There is no such family or variant, or the configuration does not fit it.
    """
    family, _, variant = name.partition("-")
    if family not in _FAMILIES:
        raise ValueError(f"model: expected one of {list_models()}, got {name!r}")
    module = importlib.import_module(f"edgetrack.models.{family}")
    if config is None and variant not in module.CONFIGS:
        raise ValueError(f"model: expected one of {list_models()}, got {name!r}")
    model: SegmentedModel = module.create(variant if config is None else config)
    return model
