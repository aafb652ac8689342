"""Open sources: read configuration and headers, and dequantise or refuse quantised tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lewis_hub.calibration.profile import Role
from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader, Transposed, read_header
from lewis_hub.checkpoint.lora import AdapterConfig, adapt, own_tensors, read_config
from lewis_hub.checkpoint.quantised import dequantise, quantised_tensor, read_quantisation
from lewis_hub.checkpoint.reader import INDEX, Checkpoint, read_headers
from lewis_hub.errors import CheckFailedError
from lewis_hub.hub.facts import ModelFacts, quantised_from
from lewis_hub.hub.fetch import read_range, read_small, weight_files
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.recipe.schema import REPO
from lewis_hub.tokenizer import Translation

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class Opened:
    """Configuration and headers of a whole model.

    Attributes:
        checkpoint: the headers as merged: quantised tensors in float32, without scales. Empty if
            the weights are pickles, which are not opened yet.
        problem: the reason why it cannot be merged, if there is one.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint
    problem: str | None


def open_model(api: HfApi, source: Source) -> Opened:
    """Read configuration and headers of a whole model; a repo is read by byte ranges.

    Raises:
        CheckFailedError: the configuration is missing or damaged.
        CheckpointError: a header is broken, or a scale does not fit its tensor.
    """
    config = _config(api, source)
    pickled = Checkpoint(source.pinned, {})
    checkpoint = pickled if source.is_pickled else _headers(api, source)
    beside = read_small(api, source, MODELOPT)
    found = read_quantisation(config, _document(source, MODELOPT, beside) if beside else None)
    if found is None or found.is_read:
        checkpoint = dequantise(checkpoint, found, partial(_read_tensor, api, source))
    how = found.method if found and not found.is_read else None
    if how is None and (sign := quantised_tensor(checkpoint)):
        how = f"it holds {sign}"
    return Opened(config, checkpoint, _refusal(api, source, how, config) if how else None)


def _read_tensor(api: HfApi, source: Source, tensor: TensorHeader) -> bytes:
    return read_range(api, source, tensor.shard, tensor.start, tensor.start + tensor.n_bytes)


def quantised_notes(
    sources: Sequence[Source], opened: Mapping[str, Opened], donor: Source, dtype: str | None
) -> list[str]:
    """Return notes on how quantised tensors are read and written."""
    notes = []
    for source in dict.fromkeys(sources):
        model = opened.get(source.pinned)
        tensors = model.checkpoint.tensors.values() if model and not model.problem else ()
        for codes, n in Counter(tensor.scaled.codes for tensor in tensors if tensor.scaled).items():
            text = f"{source.name} holds {n} tensors as {CALLED[codes]} with scales: they are read "
            text += "as float32, each value times its scale"
            if source is donor and dtype is None:
                text += (
                    ", and merged tensors are written as bfloat16, because the recipe has no dtype"
                )
            notes.append(f"{text}.")
        if any(isinstance(t.scaled, Transposed) and t.scaled.layout == "AWQ" for t in tensors):
            notes.append(f"{source.name}{RESCALED}")
    return notes


def pickle_notes(sources: Sequence[Source]) -> list[str]:
    """Return notes that the content of pickles is unknown until they are converted."""
    return [
        f"{source.name} has only pickled weights. Their content is known once they are downloaded "
        "and converted to safetensors, so this check cannot say whether they fit; the sizes "
        "shown are those of the files."
        for source in dict.fromkeys(sources)
        if source.is_pickled
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
    return read_headers(
        source.pinned,
        sizes,
        lambda path, start, stop: read_range(api, source, path, start, stop),
        index,
    )


def _config(api: HfApi, source: Source) -> Mapping[str, Any]:
    text = read_small(api, source, "config.json")
    if text is None:
        raise CheckFailedError((f"{source.name} has no config.json, so it cannot be loaded.",))
    return _document(source, "config.json", text)


def _document(source: Source, path: str, text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckFailedError((f"{source.name}: {path} is not JSON: {error}.",)) from None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Adapter:
    """An adapter on the recipe's base; tensors that it changes are float32."""

    config: AdapterConfig
    checkpoint: Checkpoint

    @property
    def own(self) -> tuple[TensorHeader, ...]:
        """The tensors in its file."""
        return own_tensors(self.checkpoint)


def open_adapter(api: HfApi, source: Source, base: Checkpoint) -> Adapter:
    """Read an adapter's configuration and header; a repo is read by byte ranges.

    Raises:
        AdapterError: it does not fit the base, or uses an option that is not supported.
        BrokenCheckpointError: its file is broken.
    """
    settings, weights = ADAPTERS
    content = read_small(api, source, settings)
    file = source.file(weights)
    assert content is not None  # an adapter has both files
    assert file
    config = read_config(f"{source.pinned}: {settings}", content)
    stored = read_header(
        source.pinned,
        weights,
        file.size_bytes,
        lambda path, start, stop: read_range(api, source, path, start, stop),
    )
    return Adapter(config, adapt(source.pinned, base, stored, config))


def adapter_notes(
    base: Source, adapters: Mapping[Source, Adapter], is_base: Callable[[str], bool], *, tied: bool
) -> list[str]:
    """Return notes on adapters that are used differently than in their training."""
    notes = []
    for source, adapter in adapters.items():
        trained_on = adapter.config.base_model_name_or_path
        if trained_on and not is_base(trained_on):
            notes.append(
                f"{source.name} was trained on {trained_on!r} but is put on {base.name}. Every "
                "tensor fits, but an adapter works best on the model that it was trained on."
            )
        changed = (t.name for t in adapter.checkpoint.tensors.values() if t.adapted)
        embeddings = [name for name in changed if names.is_input_side(name)]
        if embeddings and tied:
            notes.append(
                f"{source.name} changes {embeddings[0]}, which is the head of {base.name} as well: "
                "the merged head changes with it, as it does in peft's `merge_and_unload`."
            )
    return notes


@dataclass(frozen=True)
class OpenedSources:
    """Headers and configurations of all sources.

    Attributes:
        models: pinned source -> whole model, without adapters.
        checkpoints: pinned source -> headers; an adapter has those of its base, changed. Pickles
            that are not converted yet have no tensors.
        configs: pinned source -> `config.json`; an adapter has that of its base.
    """

    models: Mapping[str, Opened]
    adapters: Mapping[Source, Adapter]
    checkpoints: Mapping[str, Checkpoint]
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def problems(self) -> tuple[str, ...]:
        """The reasons why sources cannot be merged."""
        return tuple(one.problem for one in self.models.values() if one.problem)

    @property
    def is_read(self) -> bool:
        """Whether the tensors of all sources are known."""
        return all(checkpoint.tensors for checkpoint in self.checkpoints.values())


def open_sources(sources: Sequence[Source], api: HfApi) -> OpenedSources:
    """Read configurations and headers; adapters are applied to the first source.

    Raises:
        CheckFailedError: there are adapters, and their base cannot be read.
        CheckpointError: a header is broken.
    """
    models = {s.pinned: open_model(api, s) for s in sources if not s.is_adapter}
    adapters = [source for source in sources if source.is_adapter]
    base = models[sources[0].pinned]
    problems = tuple(one.problem for one in models.values() if one.problem)
    if problems and adapters:
        raise CheckFailedError(problems)
    checkpoints = {pinned: one.checkpoint for pinned, one in models.items()}
    checkpoints |= {source.pinned: Checkpoint(source.pinned, {}) for source in adapters}
    opened = {s: open_adapter(api, s, base.checkpoint) for s in adapters if base.checkpoint.tensors}
    checkpoints |= {source.pinned: adapter.checkpoint for source, adapter in opened.items()}
    configs = {pinned: one.config for pinned, one in models.items()}
    configs |= {source.pinned: base.config for source in adapters}
    return OpenedSources(models, opened, checkpoints, configs)


@dataclass(frozen=True)
class OpenedSource:
    """A source of a merge, pinned and opened.

    Attributes:
        digest: a commit sha, or a digest over the files of a folder; an adapter's digest is
            `base+adapter`.
        checkpoint: headers; an adapter has those of its base, changed.
        facts: from its card.
        translation: from the token ids of the texts to its own; None: they are the same.
    """

    source: Source
    role: Role
    digest: str
    checkpoint: Checkpoint
    config: Mapping[str, Any]
    facts: ModelFacts
    translation: Translation | None

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
        return tuple({one.pinned: one for one in reversed(self.models)}.values())[::-1]

    @property
    def donor(self) -> OpenedSource:
        """The source whose configuration and tokenizer the merge carries."""
        return self.models[0]

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Pinned source -> headers."""
        return {one.pinned: one.checkpoint for one in self.models}


def ties(config: Mapping[str, Any]) -> bool | None:
    """Return whether a model ties head and embeddings; None if its configuration does not say."""
    text_config = config.get("text_config") or config
    found = config.get("tie_word_embeddings", text_config.get("tie_word_embeddings"))
    return None if found is None else bool(found)
