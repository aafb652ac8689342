"""Open: a source's configuration and headers. What is quantised becomes float32, or is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import TensorHeader, Transposed, read_header
from lewis_hub.checkpoint.lora import AdapterConfig, adapt, own_tensors, read_config
from lewis_hub.checkpoint.quantised import dequantise, quantised_tensor, read_quantisation
from lewis_hub.checkpoint.reader import INDEX, Checkpoint, read_headers
from lewis_hub.errors import CheckFailedError
from lewis_hub.hub.facts import quantised_from
from lewis_hub.hub.fetch import read_small, weight_files
from lewis_hub.hub.ranges import read_range
from lewis_hub.hub.source import ADAPTERS, Source
from lewis_hub.recipe.schema import REPO, Recipe
from lewis_hub.workflow.resolve import Inputs

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
    " was quantised by AWQ, which first multiplies columns of its matrices and divides what feeds "
    "them, norms too: beside models that it was not done to, these factors count as task vectors. "
    "Use the model that it was quantised from where there is one."
)
MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True)
class Opened:
    """What is known of a whole model before its weights are read.

    Attributes:
        checkpoint: as it is merged: what is quantised in float32, without scales. It has no
            tensors where the weights are pickles, which nobody has looked into yet.
        problem: why it cannot be merged; None: it can.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint
    problem: str | None


def open_model(api: HfApi, source: Source) -> Opened:
    """Read configuration and headers of a whole model: by byte ranges where it is a repo.

    Args:
        api: the Hub.
        source: no adapter.

    Raises:
        CheckFailedError: it has no configuration that can be read.
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


def ties(config: Mapping[str, Any]) -> bool | None:
    """Whether a model's head is its embeddings; None where its configuration is silent."""
    text_config = config.get("text_config") or config
    found = config.get("tie_word_embeddings", text_config.get("tie_word_embeddings"))
    return None if found is None else bool(found)


def quantised_notes(recipe: Recipe, inputs: Inputs, opened: Mapping[str, Opened]) -> list[str]:
    """What becomes of quantised tensors; `opened` is by pinned source."""
    notes = []
    for source in dict.fromkeys(inputs.models):
        model = opened.get(source.pinned)
        tensors = model.checkpoint.tensors.values() if model and not model.problem else ()
        for codes, n in Counter(tensor.scaled.codes for tensor in tensors if tensor.scaled).items():
            text = f"{source.name} holds {n} tensors as {CALLED[codes]} with scales: they are read "
            text += "as float32, each value times its scale"
            if source is inputs.donor and recipe.output_dtype is None:
                text += ", and merged ones are written as bfloat16, as the recipe asks for no dtype"
            notes.append(f"{text}.")
        if any(isinstance(t.scaled, Transposed) and t.scaled.layout == "AWQ" for t in tensors):
            notes.append(f"{source.name}{RESCALED}")
    return notes


def pickle_notes(inputs: Inputs) -> list[str]:
    """What cannot be told of pickles before they are downloaded and converted."""
    return [
        f"{source.name} has pickled weights alone: what they hold shows only once they are "
        "downloaded and converted to safetensors, so nothing here says whether it fits; its sizes "
        "are those of its files."
        for source in dict.fromkeys(inputs.models)
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
        raise CheckFailedError((f"{source.name} has no config.json, so nothing can load it.",))
    return _document(source, "config.json", text)


def _document(source: Source, path: str, text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckFailedError((f"{source.name}: {path} is not JSON: {error}.",)) from None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Adapter:
    """An adapter on the recipe's base.

    Attributes:
        checkpoint: all tensors of the base, those that the adapter changes in float32.
    """

    config: AdapterConfig
    checkpoint: Checkpoint

    @property
    def own(self) -> tuple[TensorHeader, ...]:
        """What its file holds."""
        return own_tensors(self.checkpoint)


def open_adapter(api: HfApi, source: Source, base: Checkpoint) -> Adapter:
    """Read an adapter's configuration and header: by byte ranges where it is a repo.

    Raises:
        AdapterError: it cannot be put on the base, or asks for what is not computed here.
        BrokenCheckpointError: its file is broken.
    """
    settings, weights = ADAPTERS
    told = read_small(api, source, settings)
    file = source.file(weights)
    assert told is not None  # an adapter has both files
    assert file
    config = read_config(f"{source.pinned}: {settings}", told)
    stored = read_header(
        source.pinned,
        weights,
        file.size_bytes,
        lambda path, start, stop: read_range(api, source, path, start, stop),
    )
    return Adapter(config, adapt(source.pinned, base, stored, config))


def adapter_notes(
    recipe: Recipe, inputs: Inputs, adapters: Mapping[str, Adapter], *, tied: bool
) -> list[str]:
    """What may make an adapter something else than it was in training.

    Args:
        recipe: knows where local folders lie.
        inputs: pinned.
        adapters: by pinned source; those that are not there say nothing yet.
        tied: whether the base's embeddings are its head as well.
    """
    notes = []
    for source in inputs.adapters:
        if source.pinned not in adapters:
            continue
        adapter, base = adapters[source.pinned], inputs.base
        assert base  # an adapter without one does not resolve
        trained_on = adapter.config.base_model_name_or_path
        if trained_on and not _is(recipe, base, trained_on):
            notes.append(
                f"{source.name} was trained on {trained_on!r} and is put on {base.name}: every "
                "tensor fits, but a task vector means most on the model that it was learnt on."
            )
        changed = (t.name for t in adapter.checkpoint.tensors.values() if t.adapted)
        embeddings = [name for name in changed if names.is_input_side(name)]
        if embeddings and tied:
            notes.append(
                f"{source.name} changes {embeddings[0]}, which is the head of {base.name} as well: "
                "the merged head changes with it, as it does in peft's `merge_and_unload`."
            )
    return notes


def _is(recipe: Recipe, base: Source, name: str) -> bool:
    """Whether a name in an adapter's configuration is the base's, or that of the same folder."""
    if base.folder:
        return Path(recipe.locate(name)).resolve() == base.folder.resolve()
    return name == base.name
