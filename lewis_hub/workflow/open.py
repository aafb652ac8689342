"""Open sources: read configuration and headers, and dequantise or refuse quantised tensors."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from huggingface_hub import HfApi

from lewis_hub.calibration.profile import Role
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.checkpoint.header import ReadRange, TensorHeader, Transposed, read_header
from lewis_hub.checkpoint.lora import adapt, read_config
from lewis_hub.checkpoint.quantisation import read_quantisation
from lewis_hub.checkpoint.quantised import dequantise, quantised_tensor
from lewis_hub.checkpoint.reader import INDEX, Checkpoint, read_headers
from lewis_hub.documents import read_json
from lewis_hub.errors import CheckFailedError
from lewis_hub.hub.facts import quantised_from
from lewis_hub.hub.fetch import read_small, replace_damaged, weight_files
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.recipe.reference import REPO
from lewis_hub.tokenizer import Translation
from lewis_hub.workflow.resolve import Inputs

CALLED = {  # codes of quantised tensors
    "F8_E4M3": "8-bit floats",
    "I8": "8-bit integers",
    "INT8": "8-bit integers",
    "I4": "4-bit integers",
    "NF4": "4-bit normal floats",
    "FP4": "4-bit floats",
    "MXFP4": "4-bit floats",
}
RESCALED = (
    " was quantised by AWQ, which first scales the columns of its matrices and divides the layers "
    "before them, such as norms, by the same factors. Beside models without these factors they "
    "count as task vectors. Use the unquantised model if there is one."
)
KEPT = "but in peft only with `ensure_weight_tying`"  # of embeddings that are saved whole
MODELOPT = "hf_quant_config.json"
TYPES: Mapping[str, tuple[type, str]] = {  # of keys of a `config.json` that are read everywhere
    "model_type": (str, "text"),
    "text_config": (dict, "object"),
    "vocab_size": (int, "whole number"),
}


@dataclass(frozen=True)
class OpenedSource:
    """A pinned source with its configuration and headers."""

    source: Source
    role: Role
    # a commit sha, or a digest over the files of a folder; an adapter's digest is `base+adapter`
    digest: str
    # the headers as merged: quantised tensors in float32, without scales. An adapter has those of
    # its base, changed. Pickles that are not converted yet have no tensors.
    checkpoint: Checkpoint
    config: Mapping[str, Any]  # `config.json`; an adapter has that of its base
    problem: str | None = None  # the reason why it cannot be merged, if there is one
    trained_on: str | None = None  # the base that an adapter's configuration names
    # from the token ids of the texts to its own; None: they are the same
    translation: Translation | None = None
    # stored copies of tensors that are left out of `checkpoint`, each with what it is tied to
    copies: tuple[tuple[TensorHeader, TensorHeader], ...] = ()

    @property
    def pinned(self) -> str:
        """The source as `repo@sha`, or the folder as it is written."""
        return self.source.pinned

    @property
    def name(self) -> str:
        """The source as the recipe names it."""
        return self.source.name


@dataclass(frozen=True)
class MergeSources:
    """The models of a merge: the base, if the method takes one, and the experts in order."""

    base: OpenedSource | None
    experts: tuple[OpenedSource, ...]

    @property
    def models(self) -> tuple[OpenedSource, ...]:
        """Base first, then the experts."""
        return (self.base, *self.experts) if self.base else self.experts

    @property
    def distinct(self) -> tuple[OpenedSource, ...]:
        """The models without duplicates."""
        found: dict[str, OpenedSource] = {}
        for one in self.models:
            found.setdefault(one.pinned, one)
        return tuple(found.values())

    @property
    def donor(self) -> OpenedSource:
        """The source whose configuration and tokenizer the merge carries."""
        return self.models[0]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The headers of each model, once."""
        return tuple(one.checkpoint for one in self.distinct)

    @property
    def are_read(self) -> bool:
        """Whether the tensors of all sources are known."""
        return all(one.checkpoint.tensors for one in self.models)

    def replaced(self, change: Callable[[OpenedSource], OpenedSource]) -> MergeSources:
        """Return the models, each as `change` returns it."""
        return MergeSources(self.base and change(self.base), tuple(map(change, self.experts)))


def open_model(api: HfApi, source: Source, role: Role = "expert") -> OpenedSource:
    """Read configuration and headers of a whole model; a repo is read by byte ranges."""

    def read(tensor: TensorHeader) -> bytes:
        return read_range(api, source, tensor.shard, tensor.start, tensor.start + tensor.n_bytes)

    config = _config(api, source)
    checkpoint = Checkpoint(source.pinned, {}) if source.is_pickled else _headers(api, source)
    n_stored, beside = len(checkpoint.tensors), read_small(api, source, MODELOPT)
    found = read_quantisation(config, _document(source, MODELOPT, beside) if beside else None)
    if found is None or found.is_read:
        checkpoint = dequantise(checkpoint, found, read)
    require_buildable(source.pinned, config, None if source.is_pickled else n_stored)
    how = found.method if found and not found.is_read else None
    if how is None and (sign := quantised_tensor(checkpoint)):
        how = f"it holds {sign}"
    problem = _refusal(api, source, how, config) if how else None
    return OpenedSource(source, role, source.commit_sha, checkpoint, config, problem)


def quantised_notes(sources: MergeSources, dtype: str | None) -> list[str]:
    """Return notes on how quantised tensors are read and written."""
    notes = []
    for one in sources.distinct:
        is_read = not (one.source.is_adapter or one.problem)
        tensors = [*one.checkpoint.tensors.values()] if is_read else []
        for codes, n in Counter(tensor.scaled.codes for tensor in tensors if tensor.scaled).items():
            text = f"{one.name} holds {n} tensors as {CALLED[codes]} with scales: they are read "
            text += "as float32, each value times its scale"
            if one.pinned == sources.donor.pinned and dtype is None:
                text += (
                    ", and merged tensors are written as bfloat16, because the recipe has no dtype"
                )
            notes.append(f"{text}.")
        if any(isinstance(t.scaled, Transposed) and t.scaled.layout == "AWQ" for t in tensors):
            notes.append(f"{one.name}{RESCALED}")
    return notes


def pickle_notes(sources: MergeSources) -> list[str]:
    """Return notes that the content of pickles is unknown until they are converted."""
    return [
        f"{one.name} has only pickled weights. Their content is known once they are downloaded "
        "and converted to safetensors, so this check cannot say whether they fit; the sizes "
        "shown are those of the files."
        for one in sources.distinct
        if one.source.is_pickled
    ]


def _refusal(api: HfApi, source: Source, how: str, config: Mapping[str, Any]) -> str:
    text = f"{source.name} is quantised ({how}), which this version does not read. "
    named = [
        (quantised_from(api, source), "its card"),
        (config.get("base_model"), "its config.json"),
    ]
    named.append((config.get("_name_or_path"), "its config.json"))
    for name, where in named:
        if isinstance(name, str) and REPO.fullmatch(name) and name != source.name:
            return f"{text}Use the model that it was quantised from: {where} names {name}."
    return f"{text}Use the model that it was quantised from."


def _headers(api: HfApi, source: Source) -> Checkpoint:
    weights = set(weight_files(source))
    sizes = {file.path: file.size_bytes for file in source.files if file.path in weights}
    index = read_small(api, source, INDEX)
    return read_headers(source.pinned, sizes, _reader(api, source), index)


def _reader(api: HfApi, source: Source) -> ReadRange:
    """Read ranges of its weights, but not of a damaged file, which a download would replace."""
    if source.local_folder is None:
        weights = source.matching([*map(glob.escape, weight_files(source))])
        replace_damaged(api, source, weights)
    return partial(read_range, api, source)


def _config(api: HfApi, source: Source) -> Mapping[str, Any]:
    text = read_small(api, source, "config.json")
    if text is None:
        raise CheckFailedError((f"{source.name} has no config.json, so it cannot be loaded.",))
    config = _document(source, "config.json", text)
    for part in (config, config.get("text_config")):
        for key, (kind, expected) in TYPES.items():
            if isinstance(part, dict) and not isinstance(part.get(key), (kind, type(None))):
                problem = f"{source.name}: `{key}` of its config.json is no {expected}."
                raise CheckFailedError((problem,))
    return config


def _document(source: Source, path: str, text: bytes) -> Mapping[str, Any]:
    try:
        found = read_json(text)
    except ValueError as error:
        raise CheckFailedError((f"{source.name}: {path} is not JSON: {error}.",)) from None
    if not isinstance(found, dict):
        raise CheckFailedError((f"{source.name}: {path} is not a JSON object.",))
    return found


def _open_adapter(api: HfApi, source: Source, base: OpenedSource) -> OpenedSource:
    """Read an adapter's configuration and header; a repo is read by byte ranges."""
    checkpoint, trained_on = Checkpoint(source.pinned, {}), None
    if base.checkpoint.tensors:
        settings, weights = ADAPTERS
        content = read_small(api, source, settings) or b""
        config = read_config(f"{source.pinned}: {settings}", content)
        n_bytes = source.size_bytes([weights])
        stored = read_header(source.pinned, weights, n_bytes, _reader(api, source))
        checkpoint = adapt(source.pinned, base.checkpoint, stored, config)
        trained_on = config.base_model_name_or_path
    digest = f"{base.digest}+{source.commit_sha}"
    return OpenedSource(source, "expert", digest, checkpoint, base.config, trained_on=trained_on)


def adapter_notes(sources: MergeSources, is_base: Callable[[str], bool]) -> list[str]:
    """Return notes on adapters that are used differently than in their training."""
    notes, base = [], sources.donor
    for adapter in (one for one in sources.distinct if one.source.is_adapter):
        if adapter.trained_on and not is_base(adapter.trained_on):
            notes.append(
                f"{adapter.name} was trained on {adapter.trained_on!r} but is put on {base.name}. "
                "Every tensor fits, but an adapter works best on the model that it was trained on."
            )
        changed = [(n, t.adapted) for n, t in adapter.checkpoint.tensors.items() if t.adapted]
        embeddings = [one for one in changed if names.is_token_embedding(one[0])]
        if embeddings and (ties(base.config) or has_tied_head(base.config, base.checkpoint)):
            name, change = embeddings[0]
            in_peft = "as it does in peft's `merge_and_unload`"
            notes.append(
                f"{adapter.name} changes {name}, which is the head of {base.name} as well: the "
                f"merged head changes with it, {in_peft if change.update else KEPT}."
            )
    return notes


def open_sources(inputs: Inputs, api: HfApi) -> MergeSources:
    """Read configurations and headers; adapters are applied to the base."""
    whole = {source.pinned: source for source in inputs.models if not source.is_adapter}
    opened = {pinned: open_model(api, source) for pinned, source in whole.items()}
    adapters = dict.fromkeys(source for source in inputs.models if source.is_adapter)
    problems = tuple(one.problem for one in opened.values() if one.problem)
    if problems and adapters:
        raise CheckFailedError(problems)
    for source in adapters:
        opened[source.pinned] = _open_adapter(api, source, opened[inputs.donor.pinned])

    def as_role(source: Source, role: Role) -> OpenedSource:
        return replace(opened[source.pinned], source=source, role=role)

    base = as_role(inputs.base, "base") if inputs.base else None
    return MergeSources(base, tuple(as_role(expert, "expert") for expert in inputs.experts))


def ties(config: Mapping[str, Any]) -> bool | None:
    """Return whether a model ties head and embeddings; None if its configuration does not say."""
    text_config = config.get("text_config") or config
    found = config.get("tie_word_embeddings", text_config.get("tie_word_embeddings"))
    return None if found is None else bool(found)


def has_tied_head(config: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Return whether a model with a head stores none: its head is tied to the embeddings."""
    named = config.get("architectures")
    kinds = map(str, named if isinstance(named, list) else ())
    has_head = any("ForCausalLM" in kind or "ForConditional" in kind for kind in kinds)
    is_stored = any(map(names.is_head, checkpoint.tensors))
    return has_head and not is_stored and ties(config) is not False
