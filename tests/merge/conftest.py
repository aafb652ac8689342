"""Small checkpoints on disk, and a merge of them in one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lewis_hub.checkpoint.header import read_header
from lewis_hub.checkpoint.lora import AdapterConfig, adapt
from lewis_hub.checkpoint.reader import TensorReader, read_headers
from lewis_hub.merge.engine import run
from lewis_hub.merge.plan import (
    Gram,
    MergeSettings,
    MergeSource,
    Statistics,
    make_plan,
    with_statistics,
)
from lewis_hub.merge.readers import open_source
from lewis_hub.merge.runners import Backend, Runner
from lewis_hub.merge.slices import make_stacked_plan
from lewis_hub.methods import registry

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def read_range(folder):
    def read(path, start, stop):
        with (folder / path).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    return read


def open_folder(folder, label=""):
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    found = index.read_bytes() if index.exists() else None
    return read_headers(label or folder.name, sizes, read_range(folder), found)


class Outcome:
    def __init__(self, folder, plan, results) -> None:
        self.folder, self.plan, self.results = folder, plan, results

    @property
    def tensors(self):
        return {
            name: tensor
            for path in sorted(self.folder.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    @property
    def bytes(self):
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("*.index.json")]
        return {path.name: path.read_bytes() for path in files}

    @property
    def index(self):
        return json.loads((self.folder / "model.safetensors.index.json").read_text())


class Zoo:
    """Writes checkpoints, merges them, reads the result."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, Path] = {}
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}

    def settings(self, method, base, experts, **more):
        return MergeSettings(method, base, tuple(experts), **more)

    def open(self, folder):
        return open_folder(folder)

    def source(self, label, tensors, parameters=None):
        folder = self.root / label
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.folders[label], self.tensors[label] = folder, tensors
        return MergeSource(open_folder(folder, label), f"digest of {label}", parameters or {})

    def mixed(self, seed):
        """Tensors of several kinds: what is merged, counts and flags."""
        generator = torch.Generator().manual_seed(seed)
        blocks = (f"model.layers.{i}.q.weight" for i in range(5))
        names = ["model.embed_tokens.weight", *blocks, "z"]
        floats = {n: torch.randn(64, 33, generator=generator).bfloat16() for n in names}
        counts = torch.arange(70_000, dtype=torch.int64) * seed
        return floats | {"counts": counts, "flag": torch.tensor([True, False, True])}

    def adapter(self, label, base, tensors, parameters=None, **config):
        folder = self.root / label
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "adapter_model.safetensors"
        save_file(tensors, path)
        stored = read_header(label, path.name, path.stat().st_size, read_range(folder))
        told = AdapterConfig(peft_type="LORA", **config)
        self.folders[label] = folder
        checkpoint = adapt(label, base.checkpoint, stored, told)
        return MergeSource(checkpoint, f"digest of {label}", parameters or {})

    def files(self, label):
        return TensorReader(self.folders[label], label)

    def reader(self, label, base=None):
        """Of a source, or of an adapter on `base`, as the merge reads them."""
        return open_source(label, base, self.files)

    def statistics(self, label, grams, transposed=()):
        folder = self.root / label
        folder.mkdir(parents=True, exist_ok=True)
        save_file(grams, folder / "model.safetensors")
        found = open_folder(folder, label).tensors
        self.folders[label], self.tensors[label] = folder, grams
        known = {name: Gram(stored, name in transposed) for name, stored in found.items()}
        return Statistics(label, f"digest of {label}", known)

    def merge(
        self, settings, output="out", *, shard=10**9, runner=None, schedule=None, statistics=()
    ):
        folder = self.root / output
        folder.mkdir(exist_ok=True)
        plan = with_statistics(make_plan(settings, shard, schedule), statistics)
        results = run(plan, self.folders, folder, Backend(runner or Runner()), lambda _: None)
        return Outcome(folder, plan, results)

    def stack(self, settings, output="out", *, shard=10**9, runner=None):
        folder = self.root / output
        folder.mkdir(exist_ok=True)
        plan = make_stacked_plan(settings, shard)
        results = run(plan, self.folders, folder, Backend(runner or Runner()), lambda _: None)
        return Outcome(folder, plan, results)

    def by_definition(self, plan):
        """What the method's own function makes of each tensor, in the output's dtype."""
        return {
            tensor.output.name: self._defined(shard, tensor)
            for shard in plan.shards
            for tensor in shard.tensors
            if not tensor.is_copied
        }

    def _defined(self, shard, plan):
        method, name = registry.find(shard.method), plan.output.name
        stacked = torch.stack([self.tensors[label][name].float() for label in shard.labels])
        given = {
            "weights": torch.tensor(plan.weights),
            "densities": plan.densities,
            "streams": plan.streams,
            "grams": [
                self.tensors[label][name] if gram else None
                for label, gram in zip(shard.statistics, plan.grams, strict=True)
            ]
            if plan.grams
            else [None] * len(plan.weights),
            "transposed": plan.is_transposed,
            **plan.own,
        }
        keywords = {key: value for key, value in given.items() if method.takes(key)}
        keywords |= {method.keyword(key): value for key, value in plan.options.items()}
        sources = (stacked,)
        if method.takes_base:
            base, others = stacked[0], stacked[1:]
            if len(stacked) == len(plan.weights):
                base, others = torch.zeros_like(base), stacked
            sources = (base, others - base if method.takes_task_vectors else others)
        return method.function(*sources, **keywords).to(DTYPES[plan.output.dtype])


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path)


@pytest.fixture(scope="session")
def zoo_class():
    return Zoo


@pytest.fixture
def settings(zoo):
    """Of a merge of two sources, a part of whose entries is dropped at random."""
    base, *experts = (
        zoo.source(label, zoo.mixed(i), {"density": 0.4} if i else {})
        for i, label in enumerate(("base", "x", "y"))
    )
    return zoo.settings("dare_ties", base, experts)
