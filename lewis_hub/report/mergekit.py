"""`mergekit_config.yml`: the same merge as a configuration for mergekit.

mergekit reads a setting per tensor as a list of {filter, value}: the first entry whose filter is
part of the tensor's name applies; an entry without a filter applies to every tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import yaml

from lewis_hub.checkpoint import names
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.merge import settings as parameters
from lewis_hub.methods import registry
from lewis_hub.recipe.schema import Arithmetic, Conditional, Setting, Settings, Slice, SliceSource

FILE = "mergekit_config.yml"
TAG = "tag:yaml.org,2002:"
METHODS = frozenset(  # without sce, whose densities mergekit ignores, and our own methods
    {"arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della"}
    | {"della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp"}
    | {"passthrough", "ram", "ramplus_tl", "slerp", "task_arithmetic", "ties"}
)
HEADER = """\
# The same merge for mergekit, written by lewis-hub. mergekit rounds the number of kept entries
# down and draws other random masks, so its weights are close to these, but not equal.
"""


@dataclass(frozen=True)
class MergekitMerge:
    """The parts of a merge that mergekit's configuration states; sources are pinned."""

    method: str  # a member of METHODS
    base: str | None
    models: Mapping[str, Settings]  # source -> its own settings; empty for slices
    parameters: Settings  # of all models
    dtype: str | None  # of the output; None if each tensor keeps its own dtype
    schedule: DensitySchedule | None  # None if the densities are in the settings
    tensors: Collection[str]  # names of all tensors of the checkpoint
    adapters: Collection[str] = ()  # the models that are LoRA adapters of the base
    tokenizer: Mapping[str, Any] = field(default_factory=dict)  # empty: that of the base
    slices: Sequence[Slice] = ()
    arithmetic: Arithmetic = "float32"


def mergekit_config(merge: MergekitMerge) -> str:
    """Write the merge as a configuration for mergekit.

    mergekit computes in `dtype`, so that is the dtype of our arithmetic there, and the dtype of the
    output is `out_dtype`.
    """
    schedules = merge.schedule.experts if merge.schedule else ()
    scheduled = {expert.source: expert for expert in schedules}
    models = []
    for source, settings in merge.models.items():
        own = _plain_settings(settings)
        if source in scheduled and scheduled[source].tensors:
            own["density"] = conditions(scheduled[source], merge.tensors)
        if source in scheduled and scheduled[source].weights:
            weighed = _weighed(scheduled[source], settings, merge)
            own["weight"] = conditions(weighed, merge.tensors)
        models.append({"model": _model(merge, source)} | _given(own))
    document: dict[str, Any] = {"merge_method": merge.method}
    # mergekit merges a base that is not listed as one more model, but not in a slice
    names_base = registry.find(merge.method).takes_base or merge.base in merge.models
    if merge.base and (names_base or merge.slices):
        document |= {"base_model": merge.base, "tokenizer_source": "base"}
    if merge.tokenizer and (names_base or not merge.base):
        document.pop("tokenizer_source", None)
        document |= merge.tokenizer
    if merge.slices:
        firsts = accumulate((len(part.sources[0].blocks) for part in merge.slices), initial=0)
        document["slices"] = [
            _slice(merge, part, first) for part, first in zip(merge.slices, firsts, strict=False)
        ]
    else:
        document["models"] = models
    document |= _given(_plain_settings(merge.parameters))
    if merge.dtype:
        document |= {"dtype": merge.arithmetic, "out_dtype": merge.dtype}
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return HEADER + str(text)


def _model(merge: MergekitMerge, source: str) -> str:
    return f"{merge.base}+{source}" if source in merge.adapters else source


def _slice(merge: MergekitMerge, part: Slice, first: int) -> dict[str, Any]:
    """A slice that starts at block `first` of the output."""
    sources = []
    for source in part.sources:
        parameters = _plain_settings(source.parameters)
        for expert in merge.schedule.experts if merge.schedule else ():
            if expert.source == str(source.model):
                own = _unstacked(expert, source, first)
                parameters["density"] = conditions(own, own.tensors)
        own_range = {"layer_range": _Flow(source.layer_range)}
        model = {"model": _model(merge, str(source.model))}
        sources.append(model | own_range | _given(parameters))
    base = {"base_model": str(part.base_model)} if part.base_model else {}
    return base | {"sources": sources} | _given(_plain_settings(part.parameters))


def _unstacked(expert: ExpertSchedule, source: SliceSource, first: int) -> ExpertSchedule:
    """An expert's densities in a slice, by the expert's own tensor names."""
    tensors = {}
    for name, density in expert.tensors.items():
        number = names.block(name)
        if number is not None and number - first in range(len(source.blocks)):
            tensors[names.renumbered(name, source.blocks[number - first])] = density
    return replace(expert, tensors=tensors)


def _given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": parameters} if parameters else {}


def _plain_settings(settings: Settings) -> dict[str, Any]:
    return {name: _plain(setting) for name, setting in settings.items()}


def conditions(expert: ExpertSchedule, tensors: Collection[str]) -> list[dict[str, Any]]:
    """An expert's densities as mergekit's list, so that each tensor gets its own density.

    A filter is the whole name of a tensor. If a name is part of another name, the longer comes
    first, also if the longer has the default density.
    """
    scheduled = expert.tensors
    others = "\n".join(name for name in tensors if name not in scheduled)
    hit = [name for name in scheduled if name in others]
    shadowed = [t for t in others.split("\n") if any(name in t for name in hit)]
    filters = sorted([*scheduled, *shadowed], key=len, reverse=True)  # equal lengths: model order
    listed: list[dict[str, Any]] = [_Row(filter=n, value=expert.density(n)) for n in filters]
    return [*listed, _Row(value=expert.default_density)]


def _weighed(expert: ExpertSchedule, settings: Settings, merge: MergekitMerge) -> ExpertSchedule:
    """The expert's weight for every tensor, multiplied by the guide's factor, as a schedule."""
    places = (settings, merge.parameters, parameters.DEFAULTS)
    weights = {
        name: parameters.look_up("weight", places, name, depth) * expert.weights.get(name, 1.0)
        for name, depth in parameters.depths(merge.tensors).items()
    }
    return ExpertSchedule(expert.source, 1.0, weights)


def _plain(setting: Setting | Conditional) -> Any:
    if isinstance(setting, Conditional):
        value = _plain(setting.value)
        return _Row(filter=setting.filter, value=value) if setting.filter else _Row(value=value)
    return [_plain(part) for part in setting] if isinstance(setting, tuple) else setting


class _Row(dict[str, Any]):
    """A mapping that is written on one line."""


class _Flow(list[Any]):
    """A list that is written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Row, lambda dumper, row: dumper.represent_mapping(TAG + "map", row, flow_style=True)
)
_Dumper.add_representer(
    _Flow, lambda dumper, items: dumper.represent_sequence(TAG + "seq", items, flow_style=True)
)
