"""The families by name, and models made from a name and a configuration."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from edgetrack.bundle import WEIGHTS_NAME, Bundle
from edgetrack.errors import CheckpointError
from edgetrack.models.adapt import adapt_weights
from edgetrack.models.segmented import SegmentedModel
from edgetrack.models.units import narrow, read_widths

__all__ = ["create_model", "list_models", "load_fitting_weights", "load_model"]

# Family → its models; of several, the one whose configuration has the keys is made.
_FAMILIES = {
    "dytrack": ("DyTrack",),
    "early_exit_vit": ("EarlyExitViT",),
    "fartrack": ("FARTrack",),
    "loretrack": ("LoReTrack", "LoReTrackTiny"),
    "ostrack": ("OSTrack",),
    "siamese_cnn": ("SiameseCNN",),
}


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
        config: What ``SegmentedModel.config_dict`` gave, in the place of the variant's; its
            ``widths`` narrow the model.

    Raises:
        ValueError: There is no such family or variant, or the configuration does not fit it.
    """
    family, _, variant = name.partition("-")
    if family not in _FAMILIES:
        raise ValueError(f"model: expected one of {list_models()}, got {name!r}")
    module = importlib.import_module(f"edgetrack.models.{family}")
    kinds = [getattr(module, kind) for kind in _FAMILIES[family]]
    if config is None:
        if variant not in module.CONFIGS:
            raise ValueError(f"model: expected one of {list_models()}, got {name!r}")
        config = dataclasses.asdict(module.CONFIGS[variant])
    architecture = {k: v for k, v in config.items() if k != "widths"}
    model = _made_of(kinds, architecture, family=family)
    if widths := read_widths(config.get("widths", {})):
        narrow(model, widths)
        model.widths = widths
    return model


def _made_of(
    kinds: Sequence[type[SegmentedModel]], values: Mapping[str, Any], *, family: str
) -> SegmentedModel:
    """The model whose configuration, a dataclass, knows most keys of what JSON holds."""

    def known(kind: type[SegmentedModel]) -> set[str]:
        return {field.name for field in dataclasses.fields(kind.config_class)}

    kind = min(kinds, key=lambda kind: len({*values} - known(kind)))
    if unknown := sorted({*values} - known(kind)):
        raise ValueError(f"{family}: expected keys among {sorted(known(kind))}, got {unknown}")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(kind.config_class(**config))


def load_model(bundle: Bundle) -> SegmentedModel:
    """The trainable model of a bundle, from its ``weights.safetensors``, in eval mode.

    Raises:
        CheckpointError: The bundle carries no weights, or they do not fit its configuration.
    """
    file = bundle.path / WEIGHTS_NAME
    if not file.is_file():
        raise CheckpointError(
            f"{bundle.path}: expected {WEIGHTS_NAME}, got none; this bundle can track but not train"
        )
    model = create_model(bundle.family, bundle.config)
    try:
        model.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected weights of {bundle.name}, got: {error}") from error
    return model.eval()


def load_fitting_weights(model: SegmentedModel, bundle: Bundle) -> list[str]:
    """Start a model from another one's weights, where names and shapes fit.

    Weights of another resolution are resized, and a last exit stays one (see ``adapt``).

    Args:
        model: Written.
        bundle: Of the same family, or of one with parameters of the same names; its configuration
            may differ.

    Returns:
        The names that kept their own values.

    Raises:
        CheckpointError: The bundle carries no readable weights, or nothing fits.
    """
    file = bundle.path / WEIGHTS_NAME
    try:
        theirs = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: expected weights, got: {error}") from error
    ours = model.state_dict()
    theirs = adapt_weights(theirs, ours)
    fitting = {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape}
    if not fitting:
        raise CheckpointError(
            f"{file}: expected weights that fit {model.family}, got none of the same name and shape"
        )
    model.load_state_dict(fitting, strict=False)
    return sorted(set(ours) - set(fitting))
