"""`config.json` of a stack: the donor's, with as many blocks as the output has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import MergeError

COUNTS = (  # what transformers calls the number of blocks, by architecture
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
)
TEXT = "text_config"  # of the language part of a model of several parts
NOT_BY_BLOCK = ("architectures", "token_id")  # parts of names of lists that count something else


@dataclass(frozen=True)
class Model:
    """A source's configuration, and how many blocks its weights have."""

    label: str
    config: Mapping[str, Any]
    n_blocks: int


@dataclass(frozen=True)
class Origin:
    """What a block of the output is made from: this block of this model, before others."""

    model: Model
    block: int


def stacked_config(donor: Model, origins: Sequence[Origin]) -> dict[str, Any]:
    """Say the new number of blocks wherever the donor's configuration says its own.

    Lists of one entry a block, such as `layer_types`, follow the blocks.

    Args:
        donor: whose configuration it is otherwise.
        origins: one a block of the output.

    Raises:
        MergeError: it says nowhere how many blocks there are, or such a list cannot follow.
    """
    if not any(_counts(part, donor.n_blocks) for part in _parts(donor.config)):
        problem = f"its config.json says nowhere that there are {donor.n_blocks} blocks"
        remedy = f"One of {', '.join(COUNTS)} has to: mend it, or use another `base_model`."
        raise MergeError(donor.label, problem, remedy)
    found = _stacked(donor, donor.config, origins, ())
    if isinstance(text := donor.config.get(TEXT), Mapping):
        found[TEXT] = _stacked(donor, text, origins, (TEXT,))
    return found


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get(TEXT)
    return [config, text] if isinstance(text, Mapping) else [config]


def _counts(config: Mapping[str, Any], n_blocks: int) -> list[str]:
    return [key for key in COUNTS if type(config.get(key)) is int and config[key] == n_blocks]


def _stacked(
    donor: Model, config: Mapping[str, Any], origins: Sequence[Origin], path: tuple[str, ...]
) -> dict[str, Any]:
    found = dict(config) | dict.fromkeys(_counts(config, donor.n_blocks), len(origins))
    for key, value in config.items():
        named = any(part in key for part in NOT_BY_BLOCK)
        if isinstance(value, list) and len(value) == donor.n_blocks and not named:
            found[key] = [_entry(value, origin, (*path, key)) for origin in origins]
    return found


def _entry(donors: list[Any], origin: Origin, path: tuple[str, ...]) -> Any:
    """A list's entry for one block: its own model's, or the donor's where all are alike."""
    own: Any = origin.model.config
    for key in path:
        own = own.get(key) if isinstance(own, Mapping) else None
    if isinstance(own, list) and len(own) == origin.model.n_blocks:
        return own[origin.block]
    if all(entry == donors[0] for entry in donors):
        return donors[0]
    problem = f"its config.json has no `{'.'.join(path)}` of one entry a block, the base's has"
    raise MergeError(origin.model.label, problem, "Stack models of one architecture.")
