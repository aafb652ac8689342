"""What the `config.json` files of the sources disagree about; the merge has that of the donor.

Weights of two models can be merged only if they mean the same. The order of the labels says what
the rows of a classifier's head mean, and the settings of the computation what all weights mean;
names and shapes of tensors do not.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lewis_hub.display import shortened
from lewis_hub.merge.architectures import THETA
from lewis_hub.workflow.open import OpenedSource

WITH_LABELS = ("Classification", "Detection", "Segmentation")  # ends of architectures
GENERIC = re.compile(r"LABEL_\d+", re.IGNORECASE)  # that transformers writes if it knows no name
COMPUTATION = (  # names of one setting in different architectures
    ("hidden_act", "hidden_activation", "activation_function", "act_fn"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    ("sliding_window",),
)
Difference = tuple[str, str, str]  # what differs, as found in the other model, and as in the donor


def label_problems(models: Sequence[OpenedSource]) -> list[str]:
    """Return why heads cannot be merged: a label is another row of the head in another model.

    The case of letters does not count, nor do names such as `LABEL_0`, which say nothing.
    """
    named = [(one, found) for one in models if (found := _labels(one.config))]
    problems = []
    for one, found in named[1:]:
        first, known = named[0]
        moved = [
            label for label in found if known.get(label, found[label]).isdisjoint(found[label])
        ]
        if moved:
            label = min(moved)
            here, there = min(found[label]), min(known[label])
            problems.append(
                f"{one.name}: its label `{shortened(label)}` is number {here} in its config.json, "
                f"but number {there} in that of {first.name}: the rows of their heads mean "
                "different labels. Reorder the rows of its head and its labels, or leave it out."
            )
    return problems


def configuration_notes(models: Sequence[OpenedSource]) -> list[str]:
    """Return notes on other names of labels, and on other settings of the computation."""
    donor, *others = models
    notes = []
    for one in others:
        if one.source.is_adapter:  # it has the configuration of its base
            continue
        differing = [*_differing_labels(donor.config, one.config)]
        differing += _differing_computation(donor.config, one.config)
        notes += [
            f"{what} is {found} in the config.json of {one.name}, and {kept} in that of "
            f"{donor.name}, which the merge has."
            for what, found, kept in differing
        ]
    return notes


def rotary_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What fixes the frequencies of rotary positions, in older and newer configurations."""
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    found = {"rope_theta": config.get("rope_theta") or THETA}
    found |= stated if isinstance(stated, dict) else {}
    kind = found.pop("type", None)
    return found | {"rope_type": found.get("rope_type", kind) or "default"}


def _labels(config: Mapping[str, Any]) -> dict[str, set[int]]:
    """The numbers of each label that has a name, of an architecture whose head has labels."""
    names, architectures = config.get("id2label"), config.get("architectures")
    if not isinstance(names, dict) or not isinstance(architectures, list):
        return {}
    if not any(isinstance(one, str) and one.endswith(WITH_LABELS) for one in architectures):
        return {}
    found = defaultdict(set)
    for number, name in names.items():
        if isinstance(name, str) and re.fullmatch(r"[0-9]{1,9}", str(number)):
            found[name.strip().lower()].add(int(number))
    return {} if any(map(GENERIC.fullmatch, found)) else dict(found)


def _differing_labels(donor: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    kept, found = ({i: n for n, ids in _labels(c).items() for i in ids} for c in (donor, other))
    for number in sorted(kept.keys() & found.keys()):
        if kept[number] != found[number]:
            theirs, ours = (f"`{shortened(labels[number])}`" for labels in (found, kept))
            yield f"label {number}", theirs, ours
            return


def _differing_computation(
    donor: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[Difference]:
    inner = [c.get("text_config") for c in (donor, other)]
    kept, found = (
        part if isinstance(part, dict) else c for part, c in zip(inner, (donor, other), strict=True)
    )
    rotary = rotary_positions(found), rotary_positions(kept)
    by_layer = [any(isinstance(value, dict) for value in one.values()) for one in rotary]
    for key in sorted(rotary[0].keys() & rotary[1].keys()):
        if by_layer[0] == by_layer[1] and rotary[0][key] != rotary[1][key]:
            yield f"`{key}`", _shown(rotary[0][key]), _shown(rotary[1][key])
    for keys in COMPUTATION:
        key, values = keys[0], [_first_of(keys, one) for one in (found, kept)]
        if None not in values and values[0] != values[1]:
            yield f"`{key}`", _shown(values[0]), _shown(values[1])


def _first_of(keys: Sequence[str], config: Mapping[str, Any]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _shown(value: Any) -> str:
    return shortened(json.dumps(value, sort_keys=True))
