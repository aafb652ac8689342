"""AIM channel by channel after the merge, as in its paper: its effect on merges.

    python benchmarks/aim.py MODELS DATA RESULTS VARIANT ... [--skills NAME ...] [--split test]

Column j of every Linear's merged task vector is multiplied by 1 - (1 - omega) a_j / max a. Here a
is the mean of |activation| in the base (arXiv 2502.02421), over all experts' calibration texts. A
guide decides for whole modules, so the package's guide `aim` uses the mean of this factor over j.
MODELS, DATA, RESULTS and VARIANT are those of `guidance.py`. t is for the paired differences in
loss from the merge without omega, which is the first row; it is negative if the loss is lower.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from answers import SIZES, Scored, Text, fill, load, read_items, score, texts
from guidance_merge import make
from guidance_tables import paired_t
from guidance_variants import SEEDS, Bench, variants
from torch import Tensor, nn

OMEGAS = (0.0, 0.4, 0.8)
SAMPLES = 64  # calibration texts of each expert


def main() -> None:
    """Merge, scale the columns, score each merge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("models", "data", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--skills", nargs="*", default=["math", "strings"])
    parser.add_argument("--split", default="test", choices=tuple(SIZES))
    parser.add_argument("--dtype", default="bfloat16")
    told = parser.parse_args()
    bench = Bench(told.models.resolve(), told.data.resolve(), tuple(told.skills))
    asked = {s: _texts(bench, s, told.split)[: SIZES[told.split]] for s in bench.skills}
    base, merged = load(bench.models / "base", "float32"), load(bench.models / "base", told.dtype)
    channels = _activations(base, [text for s in bench.skills for text in _drawn(bench, s)])
    columns = [f"{what}, {skill}" for what in ("loss", "exact") for skill in bench.skills]
    print(f"| merge | omega | {' | '.join(columns)} | t |")
    print("|---|---:|" + "---:|" * len(columns) + "---|")
    for name in told.variants:
        with TemporaryDirectory() as folder:
            recipe = variants(bench)[name].recipe(bench, SEEDS[0])
            store = told.results.resolve() / "+".join(bench.skills) / "measured"
            make(recipe, store, Path(folder) / "merged")
            fill(merged, Path(folder) / "merged")
        for line in _rows(name, asked, base, merged, channels):
            print(line, flush=True)


def _rows(
    name: str, asked: Mapping[str, Sequence[Text]], base: Any, merged: Any, a: Mapping[str, Tensor]
) -> Iterator[str]:
    whole = {module: merged.get_submodule(module).weight.float().clone() for module in a}
    own = {skill: score(merged, items) for skill, items in asked.items()}
    yield _row(name, "", own, own)
    for omega in OMEGAS:
        for module, channel in a.items():
            still = base.get_submodule(module).weight.detach()
            factor = 1 - (1 - omega) * channel / channel.max()
            shrunk = still + (whole[module] - still) * factor
            merged.get_submodule(module).weight.data.copy_(shrunk)
        found = {skill: score(merged, items) for skill, items in asked.items()}
        yield _row(name, str(omega), found, own)


def _row(name: str, omega: str, found: Mapping[str, Scored], own: Mapping[str, Scored]) -> str:
    losses = [f"{fmean(one.losses):.3f}" for one in found.values()]
    right = [f"{fmean(one.right):.3f}" for one in found.values()]
    t = [paired_t(one.losses, own[skill].losses) for skill, one in found.items()]
    told = " / ".join(f"{x:+.1f}" for x in t) if omega else ""
    return f"| {' | '.join([name, omega, *losses, *right, told])} |"


@torch.inference_mode()
def _activations(base: Any, run: Sequence[Text]) -> dict[str, Tensor]:
    """The sum of |activation| by input channel, of each Linear in a block."""
    sums: dict[str, Tensor] = {}
    linears = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }

    def counting(name: str) -> Any:
        def count(_: nn.Module, given: tuple[Tensor]) -> None:
            sums[name] = sums.get(name, 0) + given[0].abs().flatten(0, -2).sum(0)

        return count

    hooks = [module.register_forward_pre_hook(counting(name)) for name, module in linears.items()]
    for text in run:
        base.base_model(input_ids=torch.tensor([text.tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


def _drawn(bench: Bench, skill: str) -> list[Text]:
    return random.Random(f"{SEEDS[0]} {skill}").sample(_texts(bench, skill, "train"), SAMPLES)


def _texts(bench: Bench, skill: str, split: str) -> list[Text]:
    return texts(bench.models / "base", read_items(bench.data, skill, split))


if __name__ == "__main__":
    main()
