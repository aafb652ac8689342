"""Merge Llama-shaped models in memory, block by block, for `refinements.py`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from answers import TEXT, load, read_items, texts
from torch import Tensor
from transformers import AutoTokenizer

SEED, RIDGE = 42, 1e-6
GROUPS = (  # Linears that are handed the same input
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Refinement:
    """The differences from `regmean` with `off_diagonal: 0.5`.

    Attributes:
        alpha: `off_diagonal`; `down` is that of mlp.down_proj if it differs.
        samples: calibration texts of each expert.
        faithful: for `cross`: the share of the output in the expert itself in y, 0 to 1.
        pull: ridge towards the mean of the task vectors, in mean diagonals of the moments.
        answers: weight of the tokens that predict the answer.
        norm: divisor of each expert's moments.
        corrected: for `cross`: whether the last Linear of a block also compensates the error of the
            hidden states; `scaled` multiplies this update by the factor that minimises the error.
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
    corrected: Literal["no", "unscaled", "scaled"] = "no"


class Merging:
    """Base and experts in float32, and a model that receives the merges."""

    def __init__(self, models: Path, data: Path, skills: Sequence[str]) -> None:
        self.models, self.data, self.skills = models, data, skills
        self.experts = {skill: load(models / f"expert-{skill}", "float32") for skill in skills}
        self.merged, self.base = load(models / "base", "float32"), load(models / "base", "float32")

    @torch.inference_mode()
    def make(self, asked: Refinement) -> None:
        """Write the merge into `merged`."""
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
                ran = {s: self._inputs(block, seen[s]) for s in self.skills}
                inside = {s: inputs for s, (inputs, _) in ran.items()}
                gaps: dict[str, Tensor] = {}
                if asked.corrected != "no" and place == len(GROUPS) - 1:
                    for s, (inputs, made) in ran.items():
                        wanted = after[s] - experts[s].mlp.down_proj(before[s][place])
                        gaps[s] = wanted - (made - block.mlp.down_proj(inputs[place]))
                self._solve(number, place, asked, batches, inside, before, gaps)
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
        gaps: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Solve for the weights of one group.

        Args:
            inside: x of each skill, in the merge.
            before: x of each skill, in the expert.
            gaps: the additional output that the group has to give.
        """
        down = place == len(GROUPS) - 1 and asked.down is not None
        alpha = asked.down if down and asked.down is not None else asked.alpha
        base = self.base.model.layers[number]
        total, wanted = 0, [0] * len(GROUPS[place])
        missing, grams = 0, 0  # of the gaps, and not shrunk
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
            if skill in gaps:
                gap = gaps[skill][kept] * counts[:, None]
                missing, grams = missing + gap.T @ x / size, grams + x.T @ x / size
        assert isinstance(total, Tensor)
        ridge = (RIDGE + asked.pull) * total.diagonal().mean()
        total.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(total)
        for name, rows in zip(GROUPS[place], wanted, strict=True):
            w0 = base.get_submodule(name).weight
            average = self._mean_vector(number, name)
            update = torch.cholesky_solve((rows + ridge * average).T, factor).T
            if gaps:
                more = torch.cholesky_solve(missing.T, factor).T
                best = (more * missing).sum() / (more @ grams * more).sum()
                update += (best.clamp(0, 1) if asked.corrected == "scaled" else 1) * more
            self.merged.model.layers[number].get_submodule(name).weight.copy_(
                w0 + asked.scale * update
            )

    def _mean_vector(self, number: int, name: str) -> Tensor:
        weights = [e.model.layers[number].get_submodule(name).weight for e in self.experts.values()]
        base = self.base.model.layers[number].get_submodule(name).weight
        return torch.stack(list(weights)).mean(0) - base

    def _average(self) -> None:
        """Average all weights; the Linears of the blocks are replaced later, in order."""
        states = [expert.state_dict() for expert in self.experts.values()]
        mean = {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}
        self.merged.load_state_dict(mean)

    def _inputs(self, block: Any, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of the first Linear of each group, and the output of the block."""
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
        lessons = read_items(self.data, skill, "train")
        items = random.Random(f"{SEED} {skill}").sample(lessons, asked.samples)
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
    """Texts padded on the right, with a mask of their tokens and the weight of each token."""

    ids: Tensor
    kept: Tensor
    counts: Tensor


def _shrunk(matrix: Tensor, alpha: float) -> Tensor:
    """The matrix with its off-diagonal entries multiplied by alpha."""
    diagonal = matrix.diagonal().clone()
    found = alpha * matrix
    found.diagonal().copy_(diagonal)
    return found
