"""Merges of models of 6 and 8 blocks: `python benchmarks/depth.py OUT`.

From one base: the zoo's base and its expert for reversing words, of 6 blocks, and an expert for the
cipher of 8, which is the base with two identity blocks, trained further. From different starts: two
models of the primer. No setting is chosen by the items that are scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import alignment
import puzzles
import torch
from alignment import batched, load, loss
from puzzles import Item
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_zoo import IGNORED, Stage, batches, new_llama, sgd, train, zoo_tokenizer
from transformers import LlamaForCausalLM

import lewis_hub
from lewis_hub.checkpoint import names

N_TEXTS, N_ITEMS = 64, 512
TRUE = (0, 1, 2, None, 3, 4, 5, None)  # the base's block in each place of the deeper expert
NAIVE = (0, 1, 2, 3, 4, 5, None, None)
REMOVED = (9, 20)
CIPHER = Stage("cipher", 60, 64, sgd(0.1), lesson_share=0.7)
STARTS = {"one": 6, "two": 8}  # models of different starts -> number of blocks
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the model that is aligned
BOTH = "{method: dual_space, depth: segment_wise, weight_similarity: 0}"
OUTPUTS = "{depth: segment_wise, weight_similarity: 0}"  # the paper's similarity
SETTINGS = """\
merge_method: linear
parameters: {{normalize: false}}
calibration:
  dataset: {texts}.jsonl
  text: "Question: {{question}}\\nAnswer: {{answer}}"
  samples: 128
"""

Weights = Mapping[str, float]  # model -> weight; the first one's blocks are the output's
Places = Sequence[int | None]


def skill_items(skill: str, split: str, n: int) -> list[Item]:
    """Questions about made-up words, no word twice."""
    rng = random.Random(f"depth {skill} {split}")
    words = dict.fromkeys(puzzles.draw_word(rng) for _ in range(2 * n))
    return [puzzles.SKILLS[skill](word) for word in [*words][:n]]


def make(out: Path, cipher: Stage = CIPHER, primer: Stage = alignment.STAGE) -> None:
    """Train the models that are not there yet, and write the calibration texts."""
    out.mkdir(parents=True, exist_ok=True)
    of_skills = [item for one in puzzles.SKILLS for item in skill_items(one, "texts", N_TEXTS)]
    for name, items in {"skills": of_skills, "primer": alignment.items("texts")}.items():
        lines = [json.dumps(dataclasses.asdict(item)) + "\n" for item in items]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_into(out / "cipher", deeper(load(lewis_hub.zoo_folder() / "base")), cipher)
    for seed, (name, n_blocks) in enumerate(STARTS.items(), start=1):
        size = {"hidden_size": 64, "intermediate_size": 176, "n_blocks": n_blocks}
        train_into(out / name, new_llama(seed, len(zoo_tokenizer()), **size), primer)


def train_into(folder: Path, model: LlamaForCausalLM, stage: Stage) -> None:
    """Train and save a model, unless the folder is there."""
    if not folder.exists():
        tokenizer = zoo_tokenizer()
        train(model, stage, batches(stage, tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def deeper(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The base with two more blocks, copies of those before, which add nothing (LLaMA Pro)."""
    sizes = {key: getattr(base.config, key) for key in ("hidden_size", "intermediate_size")}
    model = new_llama(0, base.config.vocab_size, **sizes, n_blocks=len(TRUE))
    source = 0
    for place, number in enumerate(TRUE):
        source = source if number is None else number
        block = model.model.layers[place]
        block.load_state_dict(base.model.layers[source].state_dict())
        if number is None:
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
    model.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(base.model.norm.state_dict())
    return model


def merged(
    out: Path, name: str, weights: Weights, texts: str, align: str = "segment_wise"
) -> LlamaForCausalLM:
    """Merge by a recipe; the models are folders of `out` or of the zoo."""
    if not (out / name).exists():
        lines = ["models:"]
        for number, (model, weight) in enumerate(weights.items()):
            folder = out / model if (out / model).exists() else lewis_hub.zoo_folder() / model
            lines += [f"  - model: {folder.resolve()}", f"    parameters: {{weight: {weight:g}}}"]
            lines += [f"    align: {align}"] if number else []
        recipe = out / f"{name}.yaml"
        recipe.write_text("\n".join([*lines, SETTINGS.format(texts=texts)]), encoding="utf-8")
        lewis_hub.merge_models(lewis_hub.read_recipe(recipe), out / name, progress=False)
    return load(out / name)


def places(out: Path, name: str) -> dict[str, list[int | None]]:
    """The blocks of each aligned model in the places of the first, by the model's name."""
    document = json.loads((out / name / "lewis" / "alignment.json").read_text(encoding="utf-8"))
    found = document["models"]
    return {Path(one["source"]).name: one["blocks"]["numbers"] for one in found}


def in_places(
    own: LlamaForCausalLM, reference: LlamaForCausalLM, chosen: Places
) -> dict[str, Tensor]:
    """The weights of a model with its blocks in chosen places: what `align` writes, by hand."""
    found, stored = dict(reference.state_dict()), own.state_dict()
    for name in found:
        parts = name.split(".")
        if parts[1] == "layers":
            number = chosen[int(parts[2])]
            if number is not None:
                found[name] = stored[".".join([*parts[:2], str(number), *parts[3:]])]
            elif parts[-2] in ("o_proj", "down_proj"):
                found[name] = torch.zeros_like(found[name])
        else:
            found[name] = stored[name]
    return found


def by_places(out: Path, weights: Weights, chosen: Places) -> LlamaForCausalLM:
    """The weighted sum of models, with the blocks of all but the first in chosen places."""
    first, *others = weights
    model = load(out / first)
    total = {name: weights[first] * tensor for name, tensor in model.state_dict().items()}
    for other in others:
        placed = in_places(load(lewis_hub.zoo_folder() / other), load(out / first), chosen)
        total = {name: total[name] + weights[other] * placed[name] for name in total}
    model.load_state_dict(total)
    return model


@torch.no_grad()
def exact(model: LlamaForCausalLM, asked: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of items whose whole answer is what greedy decoding gives."""
    right: list[bool] = []
    for ids, labels in asked:
        found, wanted = model(ids).logits[:, :-1].argmax(dim=-1), labels[:, 1:]
        right += ((found == wanted) | (wanted == IGNORED)).all(dim=1).tolist()
    return sum(right) / len(right)


def report_skills(models: Mapping[str, LlamaForCausalLM]) -> None:
    """Print loss and exact match of models on both skills."""
    asked = {skill: batched(skill_items(skill, "scored", N_ITEMS)) for skill in puzzles.SKILLS}
    print(f"\n| model | blocks | {' | '.join(f'{s}: loss | exact match' for s in asked)} |")
    print("|:---|---:|---:|---:|---:|---:|")
    for name, model in models.items():
        cells = [f"{loss(model, one):.3f} | {exact(model, one):.3f}" for one in asked.values()]
        print(f"| {name} | {model.config.num_hidden_layers} | {' | '.join(cells)} |")


def from_one_base(out: Path) -> None:
    """Merge experts of 6 and 8 blocks that were trained from one base."""
    zoo = lewis_hub.zoo_folder()
    models = {
        "base": load(zoo / "base"),
        "reverse": load(zoo / "expert-reverse"),
        "cipher": load(out / "cipher"),
        "zoo's cipher expert": load(zoo / "expert-cipher"),
    }
    for called, kind in (("mean", (0.5, 0.5)), ("sum minus base", (1.0, 1.0, -1.0))):
        deep, small, same = (
            dict(zip((*pair, "base"), kind, strict=False))
            for pair in (
                ("cipher", "expert-reverse"),
                ("expert-reverse", "cipher"),
                ("expert-reverse", "expert-cipher"),
            )
        )
        stem = called.split()[0]
        models |= {
            called: merged(out, stem, deep, "skills"),
            f"{called}, by outputs alone": merged(out, f"{stem}-outputs", deep, "skills", OUTPUTS),
            f"{called}, in places 0 to 5": by_places(out, deep, NAIVE),
            f"{called}, in 6 blocks": merged(out, f"{stem}-small", small, "skills"),
            f"{called}, zoo's experts": merged(out, f"{stem}-same", same, "skills"),
        }
        for name in (stem, f"{stem}-outputs", f"{stem}-small"):
            print(f"places of {name}: {places(out, name)}")
    report_skills(models)


def from_different_starts(out: Path) -> None:
    """Print the loss between models of different starts, on items of the primer."""
    found = {}
    for first, second in (("two", "one"), ("one", "two")):
        for align, called in (("segment_wise", "blocks"), (BOTH, "blocks and units")):
            name = f"{second}-in-{first}-{called.split()[-1]}"
            placed = merged(out, name, {first: 0.0, second: 1.0}, "primer", align)
            print(f"places of {name}: {places(out, name)}")
            losses = alignment.between(load(out / first), placed, "test", SHARES)
            found[f"{second} in the places of {first}, {called}"] = losses
    alone = {name: loss(load(out / name), batched(alignment.items("test"))) for name in STARTS}
    print(f"\nalone: {', '.join(f'{name} {value:.3f}' for name, value in alone.items())}")
    print(f"\n| aligned | {' | '.join(f'{share:g}' for share in SHARES)} |")
    print("|:---|---:|---:|---:|---:|---:|")
    for name, losses in found.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in losses.values())} |")


def without(source: Path, folder: Path, removed: Sequence[int]) -> None:
    """Write a model of one file without some of its blocks."""
    shutil.copytree(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = [block for block in range(config["num_hidden_layers"]) if block not in removed]
    config["num_hidden_layers"] = len(kept)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        block = names.block(name)
        if block is None or block in kept:
            place = name if block is None else names.renumbered(name, kept.index(block))
            tensors[place] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def find_removed(out: Path, base: Path, expert: Path, texts: Path) -> None:
    """Print which blocks of the base have no match in an expert without two of its blocks."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "removed").exists():
        without(expert, out / "removed", REMOVED)
    lines = itertools.islice(texts.read_text(encoding="utf-8").splitlines(keepends=True), 128)
    (out / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    pair = {str(base): 0.5, "removed": 0.5}
    for name, align in (("half", "segment_wise"), ("outputs", OUTPUTS), ("updates", BOTH)):
        merged(out, name, pair, "texts", align)
        found = places(out, name)["removed"]
        print(f"{name}: no match for {[n for n, one in enumerate(found) if one is None]}")


def main(out: Path) -> None:
    """Train, merge and print the tables."""
    make(out)
    from_one_base(out)
    from_different_starts(out)


def run(
    tables: Callable[[Path], None], removed: Callable[[Path, Path, Path, Path], None], told: str
) -> None:
    """Read the command line, and print the tables, or what was `removed` from a model."""
    parser = argparse.ArgumentParser(description=tables.__doc__)
    parser.add_argument("out", type=Path, help="output folder; finished models in it are kept")
    parser.add_argument(
        "--removed", nargs=3, type=Path, metavar=("BASE", "EXPERT", "TEXTS"), help=told
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    asked = parser.parse_args()
    if asked.removed:
        removed(asked.out, *asked.removed)
    else:
        tables(asked.out)


if __name__ == "__main__":
    run(main, find_removed, "only find blocks 9 and 20, which are removed from EXPERT, in BASE")
