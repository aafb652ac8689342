"""What is fuzzed: for each kind of file valid documents, and the code that reads it.

The code may refuse a document by a LewisHubError, and by nothing else.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml

from hardening.mutation import Document
from lewis_hub import loadable, pipeline
from lewis_hub.calibration.profile import ImportanceProfile
from lewis_hub.checkpoint.configuration import require_buildable
from lewis_hub.checkpoint.header import Scaled, TensorHeader, read_header
from lewis_hub.checkpoint.lora import adapt, own_tensors, read_config
from lewis_hub.checkpoint.quantisation import read_quantisation
from lewis_hub.checkpoint.quantised import dequantise, quantised_tensor
from lewis_hub.checkpoint.reader import INDEX, Checkpoint, read_headers
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import BrokenCheckpointError, LewisHubError
from lewis_hub.evaluate import scores
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.scores import ModelResult, Scores
from lewis_hub.evaluate.tasks import read_file
from lewis_hub.export.gguf import plan_gguf
from lewis_hub.export.vocabulary import FILES as EXPORTED
from lewis_hub.guides.schedule import DensitySchedule
from lewis_hub.hub.facts import combined_licence, model_facts, quantised_from, states_a_licence
from lewis_hub.hub.source import Source, SourceFile, digest_like
from lewis_hub.merge.adapted_model import adapted_model
from lewis_hub.merge.quantised import ScaledReader
from lewis_hub.recipe.read import parse_recipe
from lewis_hub.report import lock as locks
from lewis_hub.report.difference import ChangelogEntry
from lewis_hub.report.difference import from_json as changelog_from_json
from lewis_hub.report.difference import to_json as changelog_to_json
from lewis_hub.tokenizer import (
    CONFIG,
    disagreement,
    extended_files,
    read_vocabulary,
    template_files,
    template_of,
    translation,
    unite,
)
from lewis_hub.workflow.open import open_model
from lewis_hub.workflow.resolve import hub_api, resolve_one

QuickDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
FILE = "model.safetensors"


@dataclass(frozen=True)
class Target:
    """A reader of files, and valid documents of theirs."""

    seeds: Sequence[Document]
    read: Callable[[Document], object]
    share: float  # of the cases of a run


def text_of(content: Any) -> bytes:
    """A file with a content; a text stands as it is, damaged or not."""
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode(errors="surrogatepass")


def yaml_of(content: Any) -> bytes:
    """The same for YAML, where most texts are the letters of JSON too."""
    if isinstance(content, str):
        return content.encode(errors="surrogatepass")
    try:
        return yaml.dump(content, Dumper=QuickDumper, sort_keys=False).encode()
    except (ValueError, yaml.YAMLError, TypeError):  # half a letter
        return json.dumps(content).encode()


# -- headers


def entry(dtype: str, shape: list[int], start: int, width: int) -> dict[str, Any]:
    n = width
    for size in shape:
        n *= size
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + n]}


def header(*tensors: tuple[str, str, list[int], int]) -> tuple[dict[str, Any], int]:
    """A header whose tensors follow each other, and the bytes of their values."""
    entries, position = {}, 0
    for name, dtype, shape, width in tensors:
        entries[name] = entry(dtype, shape, position, width)
        position = entries[name]["data_offsets"][1]
    return entries, position


def stored(document: Document, key: str = "header") -> tuple[TensorHeader, ...]:
    """Read the header of a virtual file whose values are zeros, or those of `states`."""
    text = text_of(document.get(key))
    length, n_data = document.get("length"), document.get("n_data")
    claimed = length if type(length) is int and 0 <= length < 2**64 else len(text)
    begin = struct.pack("<Q", claimed) + text
    n_bytes = len(begin) + (n_data if type(n_data) is int and 0 <= n_data < 2**50 else 0)

    def read(_: str, start: int, stop: int) -> bytes:
        return begin[start:stop].ljust(min(stop - start, 1 << 20), b"\0")

    return read_header("a/b", FILE, n_bytes, read)


def read_a_header(document: Document) -> None:
    tensors = {tensor.name: tensor for tensor in stored(document)}
    quantised_tensor(Checkpoint("a/b", tensors))
    for tensor in tensors.values():
        assert tensor.n_elements >= 0
        assert tensor.kept_dtype


PLAIN, N_PLAIN = header(
    ("model.embed_tokens.weight", "BF16", [8, 4], 2),
    ("model.layers.0.self_attn.q_proj.weight", "F32", [4, 4], 4),
    ("model.norm.weight", "F16", [4], 2),
    ("model.steps", "U64", [], 8),
)
HEADERS = Target(
    [
        {"header": {"__metadata__": {"format": "pt"}, **PLAIN}, "length": None, "n_data": N_PLAIN},
        {"header": {}, "length": 2, "n_data": 0},
    ],
    read_a_header,
    0.496,
)


# -- indexes


def read_an_index(document: Document) -> None:
    shards = {name: text_of(content) for name, content in document.items() if name != INDEX}
    files = {name: struct.pack("<Q", len(text)) + text for name, text in shards.items()}

    def read(name: str, start: int, stop: int) -> bytes:
        return files[name][start:stop]

    sizes = {name: len(file) + N_PLAIN for name, file in files.items()}
    index = document.get(INDEX)
    read_headers("a/b", sizes, read, None if index is None else text_of(index))


SECOND, _ = header(("lm_head.weight", "BF16", [N_PLAIN // 2], 2))
INDEXES = Target(
    [
        {
            INDEX: {
                "metadata": {"total_size": 2 * N_PLAIN},
                "weight_map": {
                    **dict.fromkeys(PLAIN, "model-00001-of-00002.safetensors"),
                    "lm_head.weight": "model-00002-of-00002.safetensors",
                },
            },
            "model-00001-of-00002.safetensors": PLAIN,
            "model-00002-of-00002.safetensors": SECOND,
        }
    ],
    read_an_index,
    0.03,
)


# -- quantised models


MAX_DECODED_BYTES = 1 << 20


def read_quantised(document: Document) -> None:
    config, modelopt = document.get("config"), document.get("modelopt")
    tensors = {tensor.name: tensor for tensor in stored(document)}
    states = document.get("states")

    def read(tensor: TensorHeader) -> bytes:
        return text_of(states.get(tensor.name)) if isinstance(states, dict) else b""

    found = read_quantisation(
        config if isinstance(config, dict) else {}, modelopt if isinstance(modelopt, dict) else None
    )
    checkpoint = dequantise(Checkpoint("a/b", tensors), found, read)
    for tensor in checkpoint.tensors.values():
        assert not tensor.is_computed or tensor.n_bytes == 4 * tensor.n_elements
        assert {int}.issuperset(map(type, tensor.shape))
        if isinstance(tensor.scaled, Scaled):  # the kernels count rows in 64 bits
            assert max(tensor.scaled.block) <= max(1, tensor.n_elements)
        if tensor.is_computed and tensor.n_bytes <= MAX_DECODED_BYTES:
            with suppress(BrokenCheckpointError):  # zeros are no `weight_shape`
                ScaledReader(Zeros()).read(tensor, 0, memoryview(bytearray(tensor.n_bytes)))


class Zeros:
    """Stored tensors whose bytes are all 0."""

    def read(self, tensor: TensorHeader, first_byte: int, into: memoryview) -> None:
        assert 0 <= first_byte <= first_byte + into.nbytes <= tensor.n_bytes
        into[:] = bytes(into.nbytes)


def quantised(method: dict[str, Any], *tensors: Any, **states: Any) -> Document:
    entries, n_data = header(*tensors)
    config = {"model_type": "llama", "quantization_config": method}
    return {
        **{"config": config, "modelopt": None, "header": entries, "length": None},
        **{"n_data": n_data, "states": {key.replace("__", "."): v for key, v in states.items()}},
    }


W = "layers.0.q_proj"
FOUR_BIT = f"{W}.weight.quant_state.bitsandbytes__nf4"
STATE = {
    **{"quant_type": "nf4", "blocksize": 64, "shape": [16, 16], "dtype": "bfloat16"},
    **{"nested_blocksize": 2, "nested_offset": 0.5},
}
GROUP = {"weights": {"num_bits": 4, "type": "int", "group_size": 8}, "targets": ["Linear"]}
QUANTISED = Target(
    [
        quantised(
            {"quant_method": "fp8", "weight_block_size": [2, 2], "fmt": "e4m3"},
            (f"{W}.weight", "F8_E4M3", [4, 4], 1),
            (f"{W}.weight_scale_inv", "F32", [2, 2], 4),
        ),
        quantised(
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "gptq"},
            (f"{W}.qweight", "I32", [2, 8], 4),
            (f"{W}.scales", "F16", [2, 8], 2),
            (f"{W}.qzeros", "I32", [2, 1], 4),
            (f"{W}.g_idx", "I32", [16], 4),
        ),
        quantised(
            {"quant_method": "awq", "bits": 4, "version": "gemm"},
            (f"{W}.qweight", "I32", [16, 2], 4),
            (f"{W}.scales", "F16", [2, 16], 2),
            (f"{W}.qzeros", "I32", [2, 2], 4),
        ),
        quantised(
            {"quant_method": "mxfp4"},
            (f"{W}_blocks", "U8", [1, 4, 1, 16], 1),
            (f"{W}_scales", "U8", [1, 4, 1], 1),
        ),
        quantised(
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            (f"{W}.weight", "U8", [128, 1], 1),
            (f"{W}.weight.absmax", "U8", [4], 1),
            (f"{W}.weight.quant_map", "F32", [16], 4),
            (f"{W}.weight.nested_absmax", "F32", [2], 4),
            (f"{W}.weight.nested_quant_map", "F32", [256], 4),
            (FOUR_BIT, "U8", [100], 1),
        )
        | {"states": {FOUR_BIT: STATE}},
        quantised(  # one block, however long it is
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            (f"{W}.weight", "U8", [128, 1], 1),
            (f"{W}.weight.absmax", "F32", [1], 4),
            (f"{W}.weight.quant_map", "F32", [16], 4),
            (FOUR_BIT, "U8", [100], 1),
        )
        | {"states": {FOUR_BIT: STATE | {"blocksize": 256}}},
        quantised(
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            (f"{W}.weight", "I8", [4, 4], 1),
            (f"{W}.SCB", "F32", [4], 4),
        ),
        quantised(
            {
                **{"quant_method": "compressed-tensors", "format": "pack-quantized"},
                "config_groups": {"group_0": GROUP},
            },
            (f"{W}.weight_packed", "I32", [4, 2], 4),
            (f"{W}.weight_scale", "BF16", [4, 2], 2),
            (f"{W}.weight_shape", "I64", [2], 8),
            (f"{W}.weight_zero_point", "I32", [1, 2], 4),
            (f"{W}.weight_g_idx", "I32", [16], 4),
        ),
    ],
    read_quantised,
    0.2,
)


# -- adapters


def read_an_adapter(document: Document) -> None:
    config = read_config("a/lora: adapter_config.json", text_of(document.get("config")))
    checkpoint = adapt("a/lora", BASE, stored(document), config)
    own_tensors(checkpoint)


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
BASE = Checkpoint(
    "a/base",
    {
        name: TensorHeader(name, "BF16", shape, FILE, 64, 2 * shape[0] * (shape + (1,))[1])
        for name, shape in {
            "model.embed_tokens.weight": (8, 4),
            "model.layers.0.self_attn.q_proj.weight": (4, 4),
            "model.layers.0.mlp.up_proj.weight": (6, 4),
            "model.norm.weight": (4,),
        }.items()
    },
)
LORA, N_LORA = header(
    (f"{MODULE}.lora_A.weight", "F32", [2, 4], 4),
    (f"{MODULE}.lora_B.weight", "F32", [4, 2], 4),
    (f"{MODULE}.lora_magnitude_vector", "F32", [4], 4),
    ("base_model.model.model.embed_tokens.weight", "BF16", [8, 4], 2),
)
ADAPTERS = Target(
    [
        {
            "config": {
                **{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True},
                **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.[kq]_proj": 4}},
                **{"bias": "none", "modules_to_save": ["embed_tokens"], "use_rslora": False},
                **{"base_model_name_or_path": "a/base", "init_lora_weights": True},
                **{"target_modules": ["q_proj"], "fan_in_fan_out": False, "lora_dropout": 0.1},
            },
            "header": LORA,
            "length": None,
            "n_data": N_LORA,
        }
    ],
    read_an_adapter,
    0.2,
)


# -- tokenizers


def read_tokenizers(document: Document) -> None:
    both = []
    for label in ("a/base", "a/other"):
        files = {
            name: text_of(content)
            for place, content in document.items()
            for owner, _, name in [place.partition(": ")]
            if owner == label and content is not None
        }
        template = template_of(label, files)
        config = json.loads(files[CONFIG]) if both == [] and CONFIG in files else {}
        found = read_vocabulary(label, files)
        template_files(template or "", config)
        both += [found] if found else []
    if len(both) == 2:
        base, other = both
        disagreement(base, other)
        translation(base, other, 8)
        assert [vocabulary.kind for vocabulary in both]
        if base.document and other.document:
            extended_files(unite(base, [other], ["<new>"]), {"added_tokens_decoder": {}})


def _token(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True}


def _tokenizer(model: dict[str, Any], *added: dict[str, Any]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added)},
        **{"normalizer": None, "pre_tokenizer": {**byte_level, "use_regex": True}},
        **{"post_processor": None, "decoder": {**byte_level, "use_regex": True}, "model": model},
    }


BPE = {
    **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
    **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False},
    **{"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
MORE = {**BPE, "vocab": {**BPE["vocab"], "aba": 3}, "merges": [["a", "b"], ["ab", "a"]]}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
CHARSMAP = base64.b64encode(bytes([4, 0, 0, 0, 0, 0, 0, 0]) + b"ab\0").decode()
STEPS = {
    "normalizer": {
        **{"type": "Sequence", "normalizers": [REPLACE, {"type": "Prepend", "prepend": "_"}]},
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": r"\s+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "Digits", "individual_digits": True},
        ],
    },
    "decoder": {"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}]},
}
PIECES = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<u>", 0.0], ["a", -1.5]]}
TOKENIZERS = Target(
    [
        {
            "a/base: tokenizer.json": _tokenizer(one, _token(4, "<s>")),
            f"a/base: {CONFIG}": {
                "added_tokens_decoder": {"4": _token(4, "<s>"), "5": _token(5, "<t>")},
                "chat_template": [{"name": "default", "template": "{{ messages }}"}],
            },
            "a/other: tokenizer.json": _tokenizer(other, _token(5, "<v>")),
            f"a/other: {CONFIG}": {"chat_template": "{{ messages }}", "bos_token": "<s>"},
        }
        for one, other in ((BPE, MORE), (UNIGRAM, {**UNIGRAM, "vocab": [["<u>", 0.0], ["b", -2]]}))
    ]
    + [
        {"a/base: tokenizer.json": {**_tokenizer(BPE, _token(4, "<s>")), **steps}}
        for steps in (STEPS, PIECES)
    ]
    + [
        {
            **{"a/base: vocab.json": {"a": 0, "b": 1}, "a/base: added_tokens.json": {"<s>": 2}},
            **{
                "a/other: vocab.json": {"b": 0},
                "a/other: chat_template.json": {"chat_template": 1},
            },
        }
    ],
    read_tokenizers,
    0.04,
)


# -- files that are read from a folder


def folder_source(folder: Path, names: Sequence[str]) -> Source:
    stored = {name: (folder / name).read_bytes() for name in names}
    files = tuple(
        SourceFile(name, len(content), digest_like("sha256:0", content))
        for name, content in stored.items()
    )
    return Source(str(folder), "model", None, "sha256:0", files, folder)


def read_a_card(document: Document) -> None:
    with TemporaryDirectory() as place:
        card = b"---\n" + yaml_of(document.get("metadata")) + b"---\n# x\n"
        (Path(place) / "README.md").write_bytes(card)
        source = folder_source(Path(place), ["README.md"])
        facts = model_facts(hub_api(), source)
        quantised_from(hub_api(), source)
        states_a_licence(card)
        combined_licence([facts, facts], None)


CARDS = Target(
    [
        {
            "metadata": {
                **{"license": "other", "license_name": "x", "license_link": "https://x"},
                **{"language": ["en", False], "pipeline_tag": "text-generation"},
                **{"base_model": ["a/b"], "base_model_relation": "quantized"},
                "widget": [{"text": "a"}, {"messages": [{"role": "user", "content": "b"}]}],
            }
        }
    ],
    read_a_card,
    0.006,
)


def read_a_task(document: Document) -> None:
    with TemporaryDirectory() as place:
        (Path(place) / "task.yaml").write_bytes(yaml_of(document.get("task")))
        read_file(Path(place) / "task.yaml")


TASKS = Target(
    [
        {
            "task": {
                **{"task": "x", "dataset_path": "a/data", "test_split": "test", "tag": ["t"]},
                **{
                    "doc_to_text": "{{q}}",
                    "doc_to_target": "{{a}}",
                    "output_type": "generate_until",
                },
                **{"metric_list": [{"metric": "exact_match", "aggregation": "mean"}]},
                **{"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}},
            }
        }
    ],
    read_a_task,
    0.005,
)


# -- recipes


def read_a_recipe(document: Document) -> None:
    parse_recipe(yaml_of(document.get("recipe")).decode(errors="surrogatepass"), "recipe.yaml")


ZOO_RECIPE = yaml.safe_load((zoo_folder() / "recipe.yaml").read_text(encoding="utf-8"))
SLICES = {
    "slices": [
        {"sources": [{"model": "a/b", "layer_range": [0, 4], "parameters": {"weight": [0, 1]}}]},
        {"sources": [{"model": "a/c", "layer_range": [2, 6]}]},
    ],
    **{"merge_method": "passthrough", "dtype": "float16", "tokenizer_source": "base"},
}
TOKENS = {
    **{"base_model": "a/b", "models": ["a/c", {"model": "a/d", "parameters": {"weight": 0.5}}]},
    **{
        "merge_method": "dare_ties",
        "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
    },
    "tokenizer": {
        **{"source": "union", "pad_to_multiple_of": 64},
        "tokens": {"<s>": {"source": {"kind": "model_token", "model": "a/c", "token_id": 1}}},
    },
}
MIXTURE = {
    **{"base_model": "a/b", "gate_mode": "random", "dtype": "bfloat16", "architecture": "mixtral"},
    "experts": [
        {"source_model": "a/c", "positive_prompts": ["x"], "negative_prompts": ["y"]},
        {"source_model": "a/d", "positive_prompts": ["z"]},
    ],
}
ALIGN = {"depth": "segment_wise", "width": "neuron_matching", "weight_similarity": 0.5}
ALIGNED = {
    **{"base_model": "a/b", "models": [{"model": "a/c", "align": ALIGN}]},
    **{"merge_method": "linear", "publish": {"repo": "a/d", "tag": "v1"}},
    **{"export": ["gguf:q8_0"], "calibration": {"dataset": "a/texts", "text": "{text}"}},
}
SEEDS = (ZOO_RECIPE, SLICES, TOKENS, MIXTURE, ALIGNED)
RECIPES = Target([{"recipe": recipe} for recipe in SEEDS], read_a_recipe, 0.006)


# -- what a merge wrote, and others may have changed


def read_a_lock(document: Document) -> None:
    text = text_of(document.get("lock")).decode(errors="surrogatepass")
    for one in (text, _sealed(document.get("lock"))):
        try:
            lock = locks.Lock.from_json(one)
        except LewisHubError:
            continue
        locks.provenance(lock, datetime.now(UTC), datetime.now(UTC))
        statement = text_of(document.get("provenance")).decode(errors="surrogatepass")
        locks.is_provenance_of(statement, lock)


def _sealed(content: Any) -> str:
    """A lock with a seal of its own, as a forger would make it."""
    fields = content if isinstance(content, dict) else {}
    own = {key: fields[key] for key in fields if key not in ("version", "digest", "seal")}
    try:
        lock = locks.TypeAdapter(locks.Lock).validate_python(own)
        return lock.to_json()
    except (ValueError, TypeError, KeyError, AttributeError):
        return "{}"


FILES = {"config.json": "git-sha1:" + "0" * 40, "model.safetensors": "sha256:" + "1" * 64}
LOCKED = locks.Lock(
    inputs=(
        locks.LockedInput("a/b@main", "base", "main", "a" * 40, FILES),
        locks.LockedInput("a/c", "expert", None, "sha256:" + "b" * 64, FILES),
    ),
    calibration=(locks.LockedData("a/d", None, "c" * 40, FILES, None, "train", (1, 2)),),
    recipe={**SLICES, "base_model": "a/b", "parameters": {"density": 0.5, "lambda": 1}},
    method="ties",
    method_version=1,
    guide="lewis",
    guide_version=1,
    seed=42,
    max_shard_bytes=5_000_000_000,
    outputs={"model.safetensors": locks.OutputFile("d" * 64, 100)},
    software={"torch": "2.9"},
)
LOCKS = Target(
    [
        {
            "lock": json.loads(LOCKED.to_json()),
            "provenance": json.loads(
                locks.provenance(LOCKED, datetime(2026, 1, 1), datetime(2026, 1, 2))
            ),
        }
    ],
    read_a_lock,
    0.006,
)


READERS: Mapping[str, Callable[[str], object]] = {
    "importance.json": ImportanceProfile.from_json,
    "density.json": DensitySchedule.from_json,
    "scores.json": lambda text: Scores.from_json(text).table,
    "items.json": ModelResult.from_json,
    "gate.json": GateVerdict.from_json,
    "changelog.json": changelog_from_json,
}


def read_results(document: Document) -> None:
    for name, content in document.items():
        READERS[name](text_of(content).decode(errors="surrogatepass"))


IMPORTANCE = {
    **{"source": "a/b", "commit_sha": "a" * 40, "role": "base", "n_tokens": 5},
    **{"calibration": {"measure": "lewis"}, "modules": {"layers.0.q": 0.5}},
}
SCORED = {
    **{"n": 2, "version": "1", "models": {"base": {"acc,none": {"value": 0.5, "stderr": 0.1}}}},
    "paired": [
        {
            **{"metric": "acc,none", "against": "base", "difference": 0.1, "ci95": [0, 1]},
            **{"p": 0.5, "p_holm": 1.0},
        }
    ],
}
ITEMS = {
    **{"version": "1", "documents": ["a", "b"], "prompts": ["c", "d"]},
    "metrics": {"acc,none": {"value": 0.5, "values": [0.0, 1.0], "higher_is_better": True}},
}
GATE = Check("t", "acc,none", "uniform", 0.0, "stop", True, 0.5, 0.5, 0.0, (-0.1, 0.1))
ENTRY = ChangelogEntry(date(2026, 1, 1), "a" * 40, "b", ("weights",))
RESULTS = Target(
    [
        {
            "importance.json": {
                **{"version": 1, "guide": "lewis", "calibration": {"samples": 2}},
                "sources": [IMPORTANCE],
            }
        },
        {
            "density.json": {
                "version": 1,
                "experts": [
                    {"source": "a/c", "default_density": 1.0, "tensors": {"layers.0.q": 0.5}}
                ],
            }
        },
        {"scores.json": {"version": scores.VERSION, "tasks": {"t": SCORED}}},
        {"items.json": {"version": scores.ITEMS_VERSION, "tasks": {"t": ITEMS}}},
        {"gate.json": json.loads(GateVerdict((GATE,)).to_json())},
        {"changelog.json": json.loads(changelog_to_json([ENTRY]))},
    ],
    read_results,
    0.0068,
)


# -- whole models in folders


def _small(model: str) -> Document:
    names = ("config.json", "generation_config.json", CONFIG, "tokenizer.json")
    folder = zoo_folder() / model
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names} | {
        "special_tokens_map.json": {"bos_token": "<|begin|>"},
        "chat_template.jinja": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
        "README.md": "---\nlicense: mit\nlanguage: [en]\n---\n",
    }


@contextmanager
def hostile_base(document: Document) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with a model whose small files are those of a document, and a recipe on it."""
    with TemporaryDirectory() as place:
        base = Path(place) / "base"
        base.mkdir()
        for name, content in document.items():
            if content is not None:
                (base / name).write_bytes(text_of(content))
        shutil.copyfile(zoo_folder() / "base" / FILE, base / FILE)
        expert = str(zoo_folder() / "expert-reverse")
        yield base, {"base_model": str(base), "models": [expert], "merge_method": "linear"}


def merge_a_folder(document: Document) -> None:
    """Merge a model with hostile files beside its weights, whole: card, snippets and lock too."""
    with hostile_base(document) as (base, recipe):
        if len(document.get("README.md") or "") % 2:
            recipe["tokenizer_source"] = "union"
        parsed = parse_recipe(json.dumps(recipe), "recipe.yaml")
        pipeline.merge_models(parsed, base.with_name("merged"))


def name_an_adapter(base: Path) -> None:
    """Build a model without its weights, as an adapter is extracted from it."""
    opened = open_model(hub_api(), resolve_one(base, hub_api()))
    adapted_model(base, opened.config, opened.checkpoint, has_tied_head=True)


@patch.object(loadable, "MAX_LOAD_BYTES", 100_000_000)  # which it takes in a second
def run_a_model(document: Document) -> None:
    """Load a model with hostile files, to calibrate it, to score it and to name an adapter's."""
    with hostile_base(document) as (base, recipe):
        data = base.with_name("data.jsonl")
        data.write_text('{"messages": [{"role": "user", "content": "some text"}]}\n' * 2, "utf-8")
        calibration = {"dataset": str(data), "messages": "messages", "samples": 1, "max_tokens": 8}
        recipe |= {"merge_method": "ties", "guide": {"name": "lewis", "calibration": calibration}}
        try:
            parsed = parse_recipe(json.dumps(recipe), "recipe.yaml")
            pipeline.calibrate(parsed, base.with_name("measured"))
        finally:
            try:
                load(base, EvaluationSettings())
            finally:
                name_an_adapter(base)


def plan_an_export(document: Document) -> None:
    """Plan a GGUF file of a model with such headers, configuration and tokenizer."""
    tensors = {tensor.name: tensor for tensor in stored(document)}
    config = document.get("config.json")
    config = config if isinstance(config, dict) else {}
    require_buildable("a/b", config, len(tensors))  # as where a model is opened
    files = {name: text_of(one) for name, one in document.items() if name in EXPORTED and one}
    plan_gguf(Checkpoint("a/b", tensors), config, files)


def _zoo_header() -> Document:
    content = (zoo_folder() / "base" / FILE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return {"header": json.loads(content[8:end]), "length": None, "n_data": len(content) - end}


def _of_class(name: str, **settings: Any) -> Document:
    """A model whose tokenizer is made by a class of transformers with such settings."""
    small = _small("base")
    config = small["tokenizer_config.json"] | {"tokenizer_class": name, **settings}
    return small | {"tokenizer_config.json": config}


def _in_tekken() -> Document:
    tokens = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    special = [{"rank": i, "token_str": text} for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    tekken = {
        "config": {"pattern": "a+", "default_num_special_tokens": 3},
        "vocab": [{"rank": i, "token_bytes": token} for i, token in enumerate(tokens)],
        "special_tokens": special,
    }
    return _small("base") | {"tokenizer.json": None, "tekken.json": tekken}


SMALL = [_small("base"), {**_small("base"), "README.md": "---\nlicense: mit\n---\n"}]
FOLDERS = Target(SMALL, merge_a_folder, 0.0002)
OTHER_TOKENIZERS = [_of_class("ByT5Tokenizer", extra_ids=3), _in_tekken()]
MODELS = Target([*SMALL, *OTHER_TOKENIZERS], run_a_model, 0.0001)
EXPORTS = Target([{**_small("base"), **_zoo_header()}], plan_an_export, 0.004)

TARGETS = {
    **{"headers": HEADERS, "indexes": INDEXES, "quantised": QUANTISED, "adapters": ADAPTERS},
    **{"tokenizers": TOKENIZERS, "cards": CARDS, "tasks": TASKS, "recipes": RECIPES},
    **{"locks": LOCKS, "results": RESULTS, "folders": FOLDERS, "models": MODELS},
    "exports": EXPORTS,
}
