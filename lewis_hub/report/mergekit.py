"""The same merge for mergekit: `mergekit_config.yml`.

mergekit takes a setting per tensor as a list of {filter, value}: the first entry whose filter is
part of the tensor's name counts, and an entry without a filter always does.
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
from lewis_hub.recipe.schema import Conditional, Setting, Settings, Slice, SliceSource

FILE = "mergekit_config.yml"
METHODS = frozenset(  # without sce, which takes no densities there, and what mergekit has not
    {"arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della"}
    | {"della_linear", "karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp"}
    | {"passthrough", "slerp", "task_arithmetic", "ties"}
)
HEADER = """\
# The same merge in mergekit's words, written by lewis-hub. mergekit rounds the number of kept
# entries down and draws random masks of its own: its weights come out close to these, not equal.
"""


@dataclass(frozen=True)
class MergekitMerge:
    """A merge as mergekit needs to know it.

    Attributes:
        method: one of METHODS.
        base: pinned; None for a method that takes none.
        models: pinned source -> its own settings, in the recipe's order; none of a stack.
        parameters: settings of all models.
        dtype: of the output; None where each tensor keeps its own.
        schedule: densities that a guide gave; None where the settings have them.
        tensors: names of all tensors of the checkpoint.
        adapters: those of the models that are LoRA adapters of the base.
        tokenizer: what the recipe asks of it; empty where it is the base's.
        slices: of a stack, in its order, sources by their pinned names.
    """

    method: str
    base: str | None
    models: Mapping[str, Settings]
    parameters: Settings
    dtype: str | None
    schedule: DensitySchedule | None
    tensors: Collection[str]
    adapters: Collection[str] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    slices: Sequence[Slice] = ()


def mergekit_config(merge: MergekitMerge) -> str:
    """Write the merge as a configuration of mergekit's.

    mergekit computes in `dtype` and we in float32, so that is what it is told.
    """
    scheduled = {one.source: one for one in merge.schedule.experts} if merge.schedule else {}
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
    # a base that is not listed would count there as one more model; in a slice it would not
    is_told = registry.find(merge.method).takes_base or merge.base in merge.models
    if merge.base and (is_told or merge.slices):
        document |= {"base_model": merge.base, "tokenizer_source": "base"}
    if merge.tokenizer and (is_told or not merge.base):
        document.pop("tokenizer_source", None)
        document |= merge.tokenizer
    if merge.slices:
        firsts = accumulate((len(one.sources[0].blocks) for one in merge.slices), initial=0)
        document["slices"] = [
            _slice(merge, one, first) for one, first in zip(merge.slices, firsts, strict=False)
        ]
    else:
        document["models"] = models
    document |= _given(_plain_settings(merge.parameters))
    if merge.dtype:
        document |= {"dtype": "float32", "out_dtype": merge.dtype}
    told = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return HEADER + str(told)


def _model(merge: MergekitMerge, source: str) -> str:
    return f"{merge.base}+{source}" if source in merge.adapters else source


def _slice(merge: MergekitMerge, one: Slice, first: int) -> dict[str, Any]:
    """A slice whose blocks are those from `first` on in the output."""
    sources = []
    for source in one.sources:
        parameters = _plain_settings(source.parameters)
        for expert in merge.schedule.experts if merge.schedule else ():
            if expert.source == str(source.model):
                own = _unstacked(expert, source, first)
                parameters["density"] = conditions(own, own.tensors)
        own_range = {"layer_range": _Flow(source.layer_range)}
        model = {"model": _model(merge, str(source.model))}
        sources.append(model | own_range | _given(parameters))
    base = {"base_model": str(one.base_model)} if one.base_model else {}
    return base | {"sources": sources} | _given(_plain_settings(one.parameters))


def _unstacked(expert: ExpertSchedule, source: SliceSource, first: int) -> ExpertSchedule:
    """An expert's densities in one slice, by its own names."""
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
    """An expert's densities as mergekit's list: each tensor of `tensors` gets its own.

    A filter is a tensor's whole name. Where one name is part of another, the longer comes first;
    that includes names that only the default density is for.
    """
    scheduled = expert.tensors
    others = "\n".join(name for name in tensors if name not in scheduled)
    hit = [name for name in scheduled if name in others]
    shadowed = [t for t in others.split("\n") if any(name in t for name in hit)]
    filters = sorted([*scheduled, *shadowed], key=len, reverse=True)  # equal lengths: model order
    listed: list[dict[str, Any]] = [_Row(filter=n, value=expert.density(n)) for n in filters]
    return [*listed, _Row(value=expert.default_density)]


def _weighed(expert: ExpertSchedule, settings: Settings, merge: MergekitMerge) -> ExpertSchedule:
    """The expert's weight in every tensor, multiplied by the guide's factor, as `tensors`."""
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
    """Written on one line."""


class _Flow(list[Any]):
    """Written on one line too."""


class _Dumper(yaml.SafeDumper):
    pass


def _on_one_line(dumper: yaml.SafeDumper, row: _Row) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", row, flow_style=True)


def _list_on_one_line(dumper: yaml.SafeDumper, items: _Flow) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(_Row, _on_one_line)
_Dumper.add_representer(_Flow, _list_on_one_line)
