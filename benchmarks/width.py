"""Merges of models of two widths, and of two depths too: `python benchmarks/width.py OUT`.

From one base: the zoo's base and its expert for reversing words, of 128 hidden units, and experts
for the cipher that are the base with units that put out nothing, trained further: in MLPs alone, in
the hidden state, MLPs and heads, or there and in two more blocks. From different starts: models of
the primer. No setting is chosen by the items that are scored.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import alignment
import puzzles
import torch
from alignment import batched, load, loss
from depth import (
    CIPHER,
    N_TEXTS,
    SHARES,
    TRUE,
    Weights,
    deeper,
    merged,
    places,
    report_skills,
    run,
    skill_items,
    train_into,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_zoo import Stage, new_llama, zoo_tokenizer
from transformers import LlamaForCausalLM

import lewis_hub
from lewis_hub.checkpoint import names

Sizes = Mapping[str, int]

MLP = {"intermediate_size": 528}
ALL = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, **MLP}
GROWN: Mapping[str, Sizes] = {"cipher": {}, "cipher-mlp": MLP, "cipher-all": ALL}
DEEPER = "cipher-deep"  # as wide as `cipher-all`, with two more blocks
STARTS: Mapping[str, Sizes] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 176},
    "wide": {
        "hidden_size": 96,
        "intermediate_size": 264,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}
LARGE: Sizes = {**STARTS["wide"], "num_hidden_layers": 6}
WIDTHS = ("neuron_matching", "neuron_zipping")
BOTH = {width: f"{{depth: segment_wise, width: {width}}}" for width in WIDTHS}
GROUPS = {  # of the units along one dimension of a matrix
    "gate_proj": ("mlp", 0),
    "up_proj": ("mlp", 0),
    "down_proj": ("mlp", 1),
    "q_proj": ("query", 0),
    "k_proj": ("key", 0),
    "v_proj": ("value", 0),
    "o_proj": ("output", 1),
}
KEPT_GROUPS, N_KEPT = (2, 0), 1024  # of SmolLM2-135M's 3 groups of heads and 1,536 MLP units


def sized(like: LlamaForCausalLM, sizes: Sizes, seed: int) -> LlamaForCausalLM:
    """An untrained model of other sizes, with heads as wide. The global random state stays."""
    config = copy.deepcopy(like.config)
    config.update({"head_dim": like.config.head_dim, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def wider(base: LlamaForCausalLM, sizes: Sizes) -> LlamaForCausalLM:
    """The base with more units, which are random but put out nothing, so that it computes the same.

    Its norms divide by a mean over more hidden units, which their scales make up for.
    """
    model = sized(base, sizes, seed=0)
    factor = (base.config.hidden_size / model.config.hidden_size) ** 0.5
    own = dict(base.named_parameters())
    for name, grown in model.named_parameters():
        n_rows, *n_columns = own[name].shape
        if "embed_tokens" in name:
            grown[:, n_columns[0] :] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            grown[n_rows:], grown[:, n_columns[0] :] = 0, 0
        inside = tuple(slice(0, size) for size in own[name].shape)
        grown[inside] = own[name] * (factor if grown.dim() == 1 else 1)
    return model


def make(out: Path, cipher: Stage = CIPHER, primer: Stage = alignment.STAGE) -> None:
    """Train the models that are not there yet, and write the calibration texts."""
    out.mkdir(parents=True, exist_ok=True)
    of_skills = [item for one in puzzles.SKILLS for item in skill_items(one, "texts", N_TEXTS)]
    for name, items in {"skills": of_skills, "primer": alignment.items("texts")}.items():
        lines = [json.dumps(dataclasses.asdict(item)) + "\n" for item in items]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    base = load(lewis_hub.zoo_folder() / "base")
    for name, sizes in GROWN.items():
        train_into(out / name, wider(base, sizes), cipher)
    train_into(out / DEEPER, wider(deeper(base), ALL), cipher)
    small = {"hidden_size": 64, "intermediate_size": 176, "n_blocks": 4}
    like = new_llama(1, len(zoo_tokenizer()), **small)
    for seed, (name, sizes) in enumerate({**STARTS, "large": LARGE}.items(), start=1):
        train_into(out / name, sized(like, sizes, seed), primer)


def placed(out: Path, name: str) -> str:
    """How many units of each kind were matched, and with the unit of the same number."""
    found = aligned(out, name)
    counts: dict[str, list[int]] = {}
    for group, order in found["orders"].items():
        total = counts.setdefault(group.rpartition(".")[2], [0, 0])
        total[0] += sum(unit >= 0 for unit in order)
        total[1] += sum(unit == place for place, unit in enumerate(order))
    scales = sorted(found["widths"]["norm_scales"].values()) or [1.0]
    shown = ", ".join(f"{kind} {same} of {n}" for kind, (n, same) in counts.items())
    return f"{name}: with the same unit: {shown}; norms times {scales[0]:.3f} to {scales[-1]:.3f}"


def aligned(out: Path, name: str) -> dict[str, Any]:
    """How the aligned model of a merge was matched."""
    document = json.loads((out / name / "lewis" / "alignment.json").read_text(encoding="utf-8"))
    [found] = document["models"]
    return cast("dict[str, Any]", found)


def of_first_units(out: Path, expert: str, share: float) -> LlamaForCausalLM:
    """The mean of the reverse expert and a larger one's first units, which were the base's."""
    model, grown = load(lewis_hub.zoo_folder() / "expert-reverse"), load(out / expert)
    factor = (grown.config.hidden_size / model.config.hidden_size) ** 0.5
    is_deep = grown.config.num_hidden_layers == len(TRUE)
    wide = dict(grown.named_parameters())
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            block = names.block(name)
            moves = is_deep and block is not None
            stored = names.renumbered(name, TRUE.index(block)) if moves else name
            first = wide[stored][tuple(slice(0, size) for size in tensor.shape)]
            tensor.lerp_(first * (factor if tensor.dim() == 1 else 1), share)
    return model


def from_one_base(out: Path) -> None:
    """Merge experts of two widths that were trained from one base."""
    zoo = lewis_hub.zoo_folder()
    models = {"base": load(zoo / "base"), "reverse": load(zoo / "expert-reverse")}
    for expert in GROWN:
        models[expert] = load(out / expert)
        narrow: Weights = {"expert-reverse": 0.5, expert: 0.5}
        wide: Weights = {expert: 0.5, "expert-reverse": 0.5}
        kinds = [("narrow", narrow, width) for width in WIDTHS] + [("wide", wide, WIDTHS[0])]
        for called, weights, width in kinds:
            name = f"{expert}-{called}-{width}"
            models[f"mean with {expert}, {called}, {width}"] = merged(
                out, name, weights, "skills", width
            )
            print(placed(out, name))
        models[f"mean with {expert}, its first units"] = of_first_units(out, expert, 0.5)
        models[f"{expert}, its first units"] = of_first_units(out, expert, 1.0)
    report_skills(models)


def of_two_sizes(out: Path) -> None:
    """Merge experts of two depths and widths that were trained from one base."""
    models = {
        DEEPER: load(out / DEEPER),
        "its first units, in 6 blocks": of_first_units(out, DEEPER, 1.0),
        "mean, small, its first units": of_first_units(out, DEEPER, 0.5),
    }
    small: Weights = {"expert-reverse": 0.5, DEEPER: 0.5}
    large: Weights = {DEEPER: 0.5, "expert-reverse": 0.5}
    kinds = [("small", small, width) for width in WIDTHS] + [("large", large, WIDTHS[0])]
    for called, weights, width in kinds:
        name = f"{DEEPER}-{called}-{width}"
        models[f"mean, {called}, {width}"] = merged(out, name, weights, "skills", BOTH[width])
        print(placed(out, name), places(out, name))
    report_skills(models)


def from_different_starts(out: Path) -> None:
    """Print the loss between models of different starts, on items of the primer."""
    found = {}
    pairs = [("wide", "narrow", WIDTHS[:1]), ("narrow", "wide", WIDTHS)]
    pairs += [("large", "narrow", WIDTHS[:1]), ("narrow", "large", WIDTHS[:1])]
    for first, second, widths in pairs:
        for width in widths:
            name = f"{second}-in-{first}-{width}"
            align = BOTH[width] if "large" in (first, second) else width
            moved = merged(out, name, {first: 0.0, second: 1.0}, "primer", align)
            print(placed(out, name))
            found[f"{second} in the places of {first}, {width}"] = alignment.between(
                load(out / first), moved, "test", SHARES
            )
    starts = (*STARTS, "large")
    alone = {name: loss(load(out / name), batched(alignment.items("test"))) for name in starts}
    print(f"\nalone: {', '.join(f'{name} {value:.3f}' for name, value in alone.items())}")
    print(f"\n| aligned | {' | '.join(f'{share:g}' for share in SHARES)} |")
    print("|:---|---:|---:|---:|---:|---:|")
    for name, losses in found.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in losses.values())} |")


def without(source: Path, folder: Path) -> dict[str, Tensor]:
    """Write a model of one file with some of its heads and MLP units, in another order.

    Returns:
        The units that are left of each group, in their new order.
    """
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    n_groups, width = config["num_key_value_heads"], config.get("head_dim", 64)
    n_queries = config["num_attention_heads"] // n_groups
    kept = torch.tensor(KEPT_GROUPS)
    config |= {"num_key_value_heads": len(kept), "num_attention_heads": n_queries * len(kept)}
    config |= {"head_dim": width, "intermediate_size": N_KEPT}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    heads = {
        n: (kept[:, None] * n * width + torch.arange(n * width)).flatten() for n in (1, n_queries)
    }
    generator, left, tensors = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        block, kind = names.block(name), names.component(name).rpartition(".")[2]
        group, dimension = GROUPS.get(kind, ("", 0))
        if group and f"{block}.{group}" not in left:
            shuffled = torch.randperm(tensor.shape[dimension], generator=generator)[:N_KEPT]
            of_heads = heads[1 if group in ("key", "value") else n_queries]
            left[f"{block}.{group}"] = shuffled if group == "mlp" else of_heads
        order = left.get(f"{block}.{group}")
        tensors[name] = (tensor if order is None else tensor.index_select(dimension, order)).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return left


def find_removed(out: Path, base: Path, expert: Path, texts: Path) -> None:
    """Print how many of the units that are left in a narrowed expert are matched with their own."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "removed", ignore_errors=True)
    left = without(expert, out / "removed")
    lines = itertools.islice(texts.read_text(encoding="utf-8").splitlines(keepends=True), 128)
    (out / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    merged(out, "half", {str(base): 0.5, "removed": 0.5}, "texts", WIDTHS[0])
    counts: dict[str, list[int]] = {}
    for group, order in aligned(out, "half")["orders"].items():
        own = left.get(group, torch.arange(len(order))).tolist()
        total = counts.setdefault(group.rpartition(".")[2], [0, 0])
        total[0] += len(own)
        total[1] += sum(unit >= 0 and own[unit] == place for place, unit in enumerate(order))
    print(", ".join(f"{kind} {right} of {n}" for kind, (n, right) in counts.items()))


def main(out: Path) -> None:
    """Train, merge and print the tables."""
    make(out)
    from_one_base(out)
    of_two_sizes(out)
    from_different_starts(out)


if __name__ == "__main__":
    told = "only match EXPERT, of which heads and MLP units are removed, with BASE"
    run(main, find_removed, told)
