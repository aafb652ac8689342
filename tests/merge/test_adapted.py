"""Adapters against what PEFT's documentation says that they are, module by module."""

import math
import re

import pytest
import torch

from lewis_hub.checkpoint.reader import read_tensor
from lewis_hub.errors import NonFiniteError
from lewis_hub.merge.quantised import BLOCK
from lewis_hub.merge.readers import N_HELD
from lewis_hub.merge.runners import Runner, threads

PREFIX = "base_model.model."
R, ALPHA = 4, 6


def eighths(*shape, seed=0):
    """Values whose sums and products are exact in float32, whatever their order."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-16, 17, shape, generator=generator).float() / 8


def llama(dtype=torch.float32):
    tensors = {"model.embed_tokens.weight": eighths(30, 12), "lm_head.weight": eighths(30, 12)}
    for i in range(2):
        tensors[f"model.layers.{i}.q_proj.weight"] = eighths(12, 12, seed=i)
        tensors[f"model.layers.{i}.q_proj.bias"] = eighths(12, seed=i)
        tensors[f"model.layers.{i}.up_proj.weight"] = eighths(20, 12, seed=i)
        tensors[f"model.layers.{i}.norm.weight"] = eighths(12, seed=i)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def gpt2():
    return {  # Conv1D: (in, out); its checkpoint leaves the prefix `transformer` out
        "h.0.attn.c_attn.weight": eighths(12, 36),
        "h.0.attn.c_proj.weight": eighths(12, 12),
        "ln_f.weight": eighths(12),
    }


def linear(module, n_in, n_out, rank=R, seed=3, dora=False):
    parts = {"lora_A.weight": (rank, n_in), "lora_B.weight": (n_out, rank)}
    parts |= {"lora_magnitude_vector": (n_out,)} if dora else {}
    return {f"{PREFIX}{module}.{p}": eighths(*shape, seed=seed) for p, shape in parts.items()}


def embedding(module, n_rows, width, dora=False):
    parts = {"lora_embedding_A": (R, n_rows), "lora_embedding_B": (width, R)}
    parts |= {"lora_magnitude_vector": (width,)} if dora else {}
    return {f"{PREFIX}{module}.{p}": eighths(*shape, seed=5) for p, shape in parts.items()}


def expert(base, adapter, *, flips=False, **config):
    """The naive way: a loop over modules, whole matrices, PEFT's formulas."""
    merged = {name: tensor.float() for name, tensor in base.items()}

    def value(module, patterns, default):
        fits = [v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module)]
        return fits[0] if fits else default

    for key, tensor in adapter.items():
        if "lora_" not in key:
            merged[key.removeprefix(PREFIX).replace("base_layer.", "")] = tensor.float()
    for key in adapter:
        if not key.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        stem, embeds = key.removesuffix(".weight")[:-1], "embedding" in key
        a, b = (adapter[key.replace("_A", part)].float() for part in ("_A", "_B"))
        module = stem.removeprefix(PREFIX).rpartition(".")[0]
        rank = value(module, config.get("rank_pattern", {}), R)
        alpha = value(module, config.get("alpha_pattern", {}), ALPHA)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        name = f"{module}.weight".removeprefix("transformer.")
        weight = merged[name].T if embeds or flips else merged[name]
        weight = weight + scale * (b @ a)
        if config.get("use_dora"):
            magnitude = adapter[f"{PREFIX}{module}.lora_magnitude_vector"]
            weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
        merged[name] = weight.T if embeds or flips else weight
    return merged


Q, UP = "model.layers.0.q_proj", "model.layers.1.up_proj"
EMBED = "model.embed_tokens"
CASES = {
    "plain": (llama(), linear(Q, 12, 12) | linear(UP, 12, 20), {}),
    "bf16 base": (llama(torch.bfloat16), linear(Q, 12, 12), {}),
    "rank of one": (llama(), linear(Q, 12, 12, rank=1), {"rank_pattern": {"q_proj": 1}}),
    "rslora": (llama(), linear(Q, 12, 12), {"use_rslora": True}),
    "patterns": (
        llama(),
        linear(Q, 12, 12, rank=2) | linear(UP, 12, 20, rank=7),
        {
            "rank_pattern": {r"layers\.\d\.q_proj": 2, "up_proj": 7},
            "alpha_pattern": {"model.layers.1.up_proj": 14, "up_proj": 1},
        },
    ),
    "embedding": (llama(), embedding(EMBED, 30, 12) | linear("lm_head", 12, 30), {}),
    "embedding that was saved as well": (
        llama(),
        embedding(EMBED, 30, 12) | {f"{PREFIX}{EMBED}.base_layer.weight": eighths(30, 12, seed=9)},
        {},
    ),
    "modules to save": (
        llama(),
        linear(Q, 12, 12)
        | {f"{PREFIX}lm_head.weight": eighths(30, 12, seed=8).bfloat16()}
        | {f"{PREFIX}model.layers.1.norm.weight": eighths(12, seed=8)},
        {"modules_to_save": ["lm_head", "norm"]},
    ),
    "biases": (
        llama(),
        linear(Q, 12, 12) | {f"{PREFIX}{Q}.base_layer.bias": eighths(12, seed=8)},
        {"bias": "lora_only"},
    ),
    "conv1d": (
        gpt2(),
        linear("transformer.h.0.attn.c_attn", 12, 36)
        | linear("transformer.h.0.attn.c_proj", 12, 12),
        {"fan_in_fan_out": True},
    ),
}
DORA = {
    "dora": (llama(), linear(Q, 12, 12, dora=True) | linear(UP, 12, 20, dora=True), {}),
    "dora of an embedding": (llama(), embedding(EMBED, 30, 12, dora=True), {}),
    "dora of a conv1d": (
        gpt2(),
        linear("transformer.h.0.attn.c_attn", 12, 36, dora=True),
        {"fan_in_fan_out": True},
    ),
}


def materialised(zoo, source, adapter):
    with zoo.reader(adapter.label, source.label) as reader:
        return {
            name: read_tensor(reader, tensor) for name, tensor in adapter.checkpoint.tensors.items()
        }


@pytest.mark.parametrize("case", CASES)
def test_an_adapted_tensor_is_what_peft_says_to_the_last_bit(zoo, case):
    base, tensors, config = CASES[case]
    source = zoo.source("base", base)
    adapter = zoo.adapter("adapter", source, tensors, r=R, lora_alpha=ALPHA, **config)

    found = materialised(zoo, source, adapter)

    wanted = expert(base, tensors, flips=config.get("fan_in_fan_out", False), **config)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    untouched = set(base) - {t.name for t in adapter.checkpoint.tensors.values() if t.adapted}
    assert untouched
    assert any(not torch.equal(found[name], base[name].float()) for name in base)


@pytest.mark.parametrize("case", DORA)
def test_dora_gives_each_output_its_length(zoo, case):
    base, tensors, config = DORA[case]
    config = config | {"use_dora": True}
    source = zoo.source("base", base)
    adapter = zoo.adapter("adapter", source, tensors, r=R, lora_alpha=ALPHA, **config)

    found = materialised(zoo, source, adapter)

    for name, tensor in expert(base, tensors, flips="fan_in_fan_out" in config, **config).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    if case == "dora":
        lengths = tensors[f"{PREFIX}{Q}.lora_magnitude_vector"].abs()
        torch.testing.assert_close(found[f"{Q}.weight"].norm(dim=1), lengths, rtol=1e-6, atol=1e-6)


@pytest.fixture
def wide(zoo):
    """Tensors of several blocks, ragged, with every kind of update, of random values."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    rows, width = 300, 333
    assert rows * width > BLOCK
    base = {"embed.weight": normal(rows, width).bfloat16()}
    base |= {f"layers.{i}.q.weight": normal(rows, width).bfloat16() for i in range(2)}
    tensors = {
        f"{PREFIX}embed.lora_embedding_A": normal(5, rows),
        f"{PREFIX}embed.lora_embedding_B": normal(width, 5),
        f"{PREFIX}embed.lora_magnitude_vector": normal(width),
    }
    for i in range(2):
        tensors[f"{PREFIX}layers.{i}.q.lora_A.weight"] = normal(5, width).bfloat16()
        tensors[f"{PREFIX}layers.{i}.q.lora_B.weight"] = normal(rows, 5).half()
        tensors[f"{PREFIX}layers.{i}.q.lora_magnitude_vector"] = normal(rows)
    source = zoo.source("base", base)
    adapter = zoo.adapter("adapter", source, tensors, {"density": 0.4}, r=5, use_dora=True)
    return source, adapter


def test_the_bits_do_not_depend_on_the_pieces(zoo, wide):
    source, adapter = wide
    whole = materialised(zoo, source, adapter)

    with zoo.reader("adapter", "base") as reader:
        for header in adapter.checkpoint.tensors.values():
            for size in (4, 1000, 4 * 333, 7 * 333, 65_537 * 4, 10**6):
                held = bytearray(header.n_bytes)
                starts = range(0, header.n_bytes, size) if size > 4 else range(3, 4000, 501)
                for start in starts:
                    reader.read(header, start, memoryview(held)[start : start + size])
                    piece = whole[header.name].numpy().tobytes()[start : start + size]
                    assert held[start : start + size] == piece


def test_the_merge_is_the_same_on_every_runner_and_shard_size(zoo, wide):
    source, adapter = wide
    settings = zoo.settings("ties", source, [adapter])
    runners = [Runner(), threads(2), Runner(3, large_elements=100)]

    first, *others = (zoo.merge(settings, str(i), runner=r).bytes for i, r in enumerate(runners))
    small = zoo.merge(settings, "small", shard=1, runner=threads(2)).tensors

    assert all(other == first for other in others)
    whole = zoo.merge(settings, "0").tensors
    assert all(torch.equal(small[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("method", ["ties", "dare_ties", "task_arithmetic", "linear"])
def test_an_adapter_merges_as_its_float32_expert_does(zoo, wide, method):
    source, adapter = wide
    dense = zoo.source("dense", materialised(zoo, source, adapter), adapter.parameters)
    other = zoo.source("other", {n: t + 1 for n, t in zoo.tensors["base"].items()})
    if method in ("task_arithmetic", "linear"):
        adapter, dense = (type(one)(one.checkpoint, one.digest) for one in (adapter, dense))

    merged, expected = (
        zoo.merge(zoo.settings(method, source, [one, other]), one.label + " out")
        for one in (adapter, dense)
    )

    assert {t.dtype for t in merged.tensors.values()} == {torch.bfloat16}
    if method == "linear":  # without a base, the first source says the dtypes
        expected = zoo.merge(
            zoo.settings(method, source, [dense, other], dtype="bfloat16"), "rounded"
        )
    assert merged.bytes == expected.bytes


def test_the_plan_tells_an_adapter_from_a_model_and_one_base_from_another(zoo, wide):
    source, adapter = wide
    plan = zoo.merge(zoo.settings("ties", source, [adapter])).plan

    (shard,) = plan.shards
    assert (shard.labels, shard.bases) == (("base", "adapter"), (None, "base"))
    moved = type(adapter)(adapter.checkpoint, "digest of another")
    other = zoo.merge(zoo.settings("ties", source, [moved]), "other").plan
    assert other.digest != plan.digest


def test_the_kernels_agree_with_the_definitions_on_adapters(zoo, wide):
    source, adapter = wide
    asked = zoo.settings("ties", source, [adapter])
    zoo.tensors["adapter"] = materialised(zoo, source, adapter)

    merged = zoo.merge(asked)

    defined = zoo.by_definition(merged.plan)
    assert all(torch.equal(merged.tensors[name], tensor) for name, tensor in defined.items())


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_magnitude_vector"])
def test_what_is_not_finite_in_an_adapter_is_told_as_its_own(zoo, part):
    source = zoo.source("base", llama())
    tensors = linear(Q, 12, 12, dora=True)
    tensors[f"{PREFIX}{Q}.{part}"][0] = float("nan")
    adapter = zoo.adapter("adapter", source, tensors, r=R, use_dora=True)

    with pytest.raises(NonFiniteError) as caught:
        zoo.merge(zoo.settings("ties", source, [adapter]))

    assert str(caught.value).startswith(f"{Q}.weight holds NaN or infinity in adapter.\n")


def test_a_row_of_zeros_has_no_direction_to_give_a_length_to(zoo):
    base = llama() | {f"{Q}.weight": torch.zeros(12, 12)}
    tensors = linear(Q, 12, 12, dora=True) | {f"{PREFIX}{Q}.lora_B.weight": torch.zeros(12, R)}
    source = zoo.source("base", base)
    adapter = zoo.adapter("adapter", source, tensors, r=R, use_dora=True)

    with pytest.raises(NonFiniteError):  # a warning would be an error too
        zoo.merge(zoo.settings("ties", source, [adapter]))


def test_factors_of_more_tensors_than_are_held_are_read_again(zoo):
    n = N_HELD + 3
    base = {f"layers.{i}.q.weight": eighths(6, 6, seed=i) for i in range(n)}
    tensors = {k: t for i in range(n) for k, t in linear(f"layers.{i}.q", 6, 6).items()}
    source = zoo.source("base", base)
    adapter = zoo.adapter("adapter", source, tensors, r=R, lora_alpha=ALPHA)
    wanted = expert(base, tensors)

    with zoo.reader("adapter", "base") as reader:
        for _ in range(2):
            for name, header in adapter.checkpoint.tensors.items():
                assert torch.equal(read_tensor(reader, header), wanted[name])
