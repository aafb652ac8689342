"""How close to the experts' own a merge without training comes: refinements of `regmean`, tried.

    python benchmarks/refinements.py MODELS DATA RESULTS [PATTERN ...] [--split tune] [--items 250]

Merges are made in memory, block by block, of Llama-shaped models: a Linear's new weight W minimises
the squares of W x - y over the tokens of all experts' calibration texts. What x and y are is what a
refinement changes:

    own      x: the input that the expert itself sees; y: its output (this is `regmean`)
    mean     x as in the average of the experts; y: what the expert makes of that x
    merged   x as the expert's block sees it after the blocks that are merged already; y likewise
             (RegMean++, arXiv 2508.03121)
    cross    x: the input in the model that is being merged; y: the output in the expert itself,
             or, in part, what the expert makes of x

RESULTS keeps the scores, and the table is of all that it holds.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from answers import TEXT, Scored, load, score, texts
from guidance_tables import paired_t
from torch import Tensor
from transformers import AutoTokenizer

SEED, RIDGE = 42, 1e-6
SIZES = {"tune": 250, "test": 1000}
GROUPS = (  # Linears that are handed the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Refinement:
    """What is done otherwise than by `regmean` with `off_diagonal: 0.5`.

    Attributes:
        alpha: `off_diagonal`; `down` the same of mlp.down_proj where that differs.
        samples: calibration texts of each expert.
        faithful: of `cross`: how far y is the output in the expert itself, 0 to 1.
        pull: ridge towards the mean of the task vectors, in mean diagonals of the moments.
        answers: how often a token counts whose next is the answer's.
        norm: what each expert's moments are divided by.
    """

    name: str
    inputs: Literal["own", "mean", "merged", "cross"] = "own"
    alpha: float = 0.5
    down: float | None = None
    samples: int = 64
    faithful: float = 1.0
    pull: float = 0.0
    answers: float = 1.0
    norm: Literal["none", "trace"] = "none"
    scale: float = 1.0


def refinements() -> dict[str, Refinement]:
    """All that were tried, by name."""
    told: list[Refinement] = []
    for alpha in (0.3, 0.5, 0.7, 0.9):
        told.append(Refinement(f"own {alpha}", alpha=alpha))
        told.append(
            Refinement(f"own {alpha} down {alpha + 0.2:.1f}", alpha=alpha, down=alpha + 0.2)
        )
        for samples in (64, 256):
            more = f" samples {samples}" if samples != 64 else ""
            told.append(Refinement(f"mean {alpha}{more}", "mean", alpha, samples=samples))
            told.append(Refinement(f"merged {alpha}{more}", "merged", alpha, samples=samples))
            for faithful in (0.0, 0.5, 1.0):
                name = f"cross {alpha} faithful {faithful}{more}"
                one = Refinement(name, "cross", alpha, samples=samples, faithful=faithful)
                told.append(one)
        told.append(Refinement(f"own {alpha} samples 256", alpha=alpha, samples=256))
    told += [Refinement(f"own 0.5 scale {x}", scale=x) for x in (0.95, 1.05, 1.1)]
    told += [Refinement(f"own 0.5 answers {x}", answers=x) for x in (3.0, 10.0)]
    told += [Refinement(f"own 0.5 pull {x}", pull=x) for x in (0.001, 0.01, 0.1)]
    told += [Refinement("own 0.5 trace", norm="trace")]
    return {one.name: one for one in told}


class Merging:
    """Base and experts in float32, and one more model that merges are put into."""

    def __init__(self, models: Path, data: Path, skills: Sequence[str]) -> None:
        self.models, self.data, self.skills = models, data, skills
        self.experts = {skill: load(models / f"expert-{skill}", "float32") for skill in skills}
        self.merged, self.base = load(models / "base", "float32"), load(models / "base", "float32")

    @torch.inference_mode()
    def make(self, asked: Refinement) -> None:
        """Put the merge into `merged`."""
        batches = {skill: self._texts(skill, asked) for skill in self.skills}
        self._average()
        # hidden states: in the expert, and in the merge
        own = {s: self.experts[s].model.embed_tokens(one.ids) for s, one in batches.items()}
        seen = {s: self.merged.model.embed_tokens(one.ids) for s, one in batches.items()}
        for number in range(len(self.base.model.layers)):
            self._block(number, asked, batches, own, seen)

    def _block(  # noqa: PLR0913
        self,
        number: int,
        asked: Refinement,
        batches: Mapping[str, Batch],
        own: dict[str, Tensor],
        seen: dict[str, Tensor],
    ) -> None:
        block = self.merged.model.layers[number]
        experts = {skill: self.experts[skill].model.layers[number] for skill in self.skills}
        after, before = {}, {}
        for skill in self.skills:
            before[skill], after[skill] = self._inputs(experts[skill], own[skill])
        if asked.inputs == "cross":
            for place in range(len(GROUPS)):
                inside = {s: self._inputs(block, seen[s])[0] for s in self.skills}
                self._solve(number, place, asked, batches, inside, before)
        else:
            inside = before
            if asked.inputs == "mean":
                inside = {s: self._inputs(block, seen[s])[0] for s in self.skills}
                seen.update({s: self._inputs(block, seen[s])[1] for s in self.skills})
            if asked.inputs == "merged":
                inside = {s: self._inputs(experts[s], seen[s])[0] for s in self.skills}
            for place in range(len(GROUPS)):
                self._solve(number, place, asked, batches, inside, inside)
        own.update(after)
        if asked.inputs in ("merged", "cross"):
            seen.update({s: self._inputs(block, seen[s])[1] for s in self.skills})

    def _solve(  # noqa: PLR0913
        self,
        number: int,
        place: int,
        asked: Refinement,
        batches: Mapping[str, Batch],
        inside: Mapping[str, Sequence[Tensor]],
        before: Mapping[str, Sequence[Tensor]],
    ) -> None:
        """The weights of one group; `inside`: x of each skill, `before`: x in the expert."""
        down = place == len(GROUPS) - 1 and asked.down is not None
        alpha = asked.down if down and asked.down is not None else asked.alpha
        base = self.base.model.layers[number]
        total, wanted = 0, [0] * len(GROUPS[place])
        for skill in self.skills:
            kept, counts = batches[skill].kept, batches[skill].counts.sqrt()
            x = inside[skill][place][kept] * counts[:, None]
            z = x
            if asked.inputs == "cross":
                z = before[skill][place][kept] * counts[:, None]
                z = asked.faithful * z + (1 - asked.faithful) * x
            size = float(counts.square().sum())
            gram = _shrunk(x.T @ x / size, alpha)
            crossed = _shrunk(z.T @ x / size, alpha)
            if asked.norm == "trace":
                mean = gram.diagonal().mean()
                gram, crossed = gram / mean, crossed / mean
            total = total + gram
            expert = self.experts[skill].model.layers[number]
            for i, name in enumerate(GROUPS[place]):
                # W_e z - W_0 x, which the update has to make of x
                w, w0 = expert.get_submodule(name).weight, base.get_submodule(name).weight
                wanted[i] = wanted[i] + w @ crossed - w0 @ gram
        assert isinstance(total, Tensor)
        mean = total.diagonal().mean()
        ridge = (RIDGE + asked.pull) * mean
        total.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(total)
        for name, rows in zip(GROUPS[place], wanted, strict=True):
            w0 = base.get_submodule(name).weight
            average = self._mean_vector(number, name)
            update = torch.cholesky_solve((rows + ridge * average).T, factor).T
            self.merged.model.layers[number].get_submodule(name).weight.copy_(
                w0 + asked.scale * update
            )

    def _mean_vector(self, number: int, name: str) -> Tensor:
        weights = [e.model.layers[number].get_submodule(name).weight for e in self.experts.values()]
        base = self.base.model.layers[number].get_submodule(name).weight
        return torch.stack(list(weights)).mean(0) - base

    def _average(self) -> None:
        """Embeddings and norms stay so; the Linears of the blocks come one after the other."""
        states = [expert.state_dict() for expert in self.experts.values()]
        mean = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
        self.merged.load_state_dict(mean)

    def _inputs(self, block: Any, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the first Linear of each group is handed, and what the block makes of it all."""
        seen: list[Tensor] = []
        hooks = [
            block.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, args: seen.append(args[0])
            )
            for group in GROUPS
        ]
        places = torch.arange(hidden.shape[1])[None]
        rotary = self.base.model.rotary_emb(hidden, places)
        made = block(hidden, position_embeddings=rotary, position_ids=places)
        for hook in hooks:
            hook.remove()
        return seen, made[0] if isinstance(made, tuple) else made

    def _texts(self, skill: str, asked: Refinement) -> Batch:
        lines = (self.data / f"{skill}_train.jsonl").read_text(encoding="utf-8").splitlines()
        drawn = random.Random(f"{SEED} {skill}").sample(lines, asked.samples)
        items = [json.loads(line) for line in drawn]
        tokenizer = AutoTokenizer.from_pretrained(self.models / "base")
        rows = tokenizer([TEXT.format(**item) for item in items])["input_ids"]
        starts = [text.start for text in texts(self.models / "base", items)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        kept = torch.tensor([[n < len(row) for n in range(longest)] for row in rows])
        answer = torch.tensor([[n >= start - 1 for n in range(longest)] for start in starts])
        counts = torch.where(answer, asked.answers, 1.0)[kept]
        return Batch(ids, kept, counts)


@dataclass(frozen=True)
class Batch:
    """Texts padded on the right; which tokens are theirs, and how much each of these counts."""

    ids: Tensor
    kept: Tensor
    counts: Tensor


def _shrunk(matrix: Tensor, alpha: float) -> Tensor:
    """Drawn to its diagonal."""
    diagonal = matrix.diagonal().clone()
    found = alpha * matrix
    found.diagonal().copy_(diagonal)
    return found


def main() -> None:
    """Make and score what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("models", "data", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--skills", nargs="*", default=["math", "strings"])
    parser.add_argument("--split", default="tune", choices=tuple(SIZES))
    parser.add_argument("--dtype", default="bfloat16")
    told = parser.parse_args()
    known, n_items = refinements(), SIZES[told.split]
    asked = {}
    for skill in told.skills:
        lines = (told.data / f"{skill}_{told.split}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines[:n_items]]
        asked[skill] = texts(told.models / "base", items)
    folder = told.results / "+".join(told.skills) / f"refinements-{told.split}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = dict.fromkeys(n for p in told.patterns for n in fnmatch.filter(known, p))
    left = [name for name in chosen if not _file(folder, name).exists()]
    if left:
        merging, scored = (
            Merging(told.models, told.data, told.skills),
            load(told.models / "base", told.dtype),
        )
        for name in left:
            started = time.perf_counter()
            merging.make(known[name])
            made_s = time.perf_counter() - started
            scored.load_state_dict(merging.merged.state_dict())
            found = {skill: asdict(score(scored, items)) for skill, items in asked.items()}
            _file(folder, name).write_text(json.dumps(found))
            whole_s = time.perf_counter() - started
            print(f"{name}: made in {made_s:.0f} s, {whole_s:.0f} s", flush=True)
    for line in _table(folder, known, told.skills):
        print(line)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.json"


def _table(folder: Path, known: Mapping[str, Refinement], skills: Sequence[str]) -> Iterator[str]:
    found = {
        name: {skill: Scored(**one) for skill, one in json.loads(file.read_text()).items()}
        for name in known
        if (file := _file(folder, name)).exists()
    }
    own = found.get("own 0.5")
    columns = [f"{what}, {skill}" for what in ("loss", "exact") for skill in skills]
    yield f"| refinement | {' | '.join(columns)} | t against `own 0.5` |"
    yield "|---|" + "---:|" * (len(columns) + 1)
    for name, scores in found.items():
        losses = [f"{statistics.fmean(scores[skill].losses):.4f}" for skill in skills]
        right = [f"{statistics.fmean(scores[skill].right):.3f}" for skill in skills]
        t = [paired_t(scores[s].losses, own[s].losses) for s in skills] if own else []
        yield f"| {' | '.join([name, *losses, *right, ' / '.join(f'{x:+.1f}' for x in t)])} |"


if __name__ == "__main__":
    main()
