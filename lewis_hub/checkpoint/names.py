"""Names of tensors: `model.layers.3.self_attn.q_proj.weight` is `self_attn.q_proj` of block 3.

String functions for every architecture: the first number in a name is the block.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache

LAST = chr(0x10FFFF)  # behind all letters
MAX_COMPARED = 200_000  # letters of names: 2 s if all are the same, which is the slowest
BLOCK = re.compile(r"(?:^|\.)(\d{1,9})\.")
EXPERT = re.compile(r"(experts?[._])\d+(?=\.|$)")  # `experts.3`, `experts.expert_3`
INPUT_SIDE = re.compile(r"(?:^|[._])(?:embed(?!_out)|embedding|wte|wpe|tok_emb|pos_emb)")
NO_TOKENS = re.compile(
    r"(?:^|[._])(?:wpe|pos_emb|position|patch|class_emb|token_type|score\.|classifier)"
)
HEAD = re.compile(r"(?:^|\.)lm_head(?:\.|$)|embed_out$")
WRAPPERS = frozenset({"model", "language_model", "vision_model"})
TIED = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
OTHER_HEADS = re.compile(
    r"(?:^|\.)(?:lm_head\.decoder|predictions\.decoder|generator_lm_head|vocab_projector|proj_out"
    r"|output_projection)\.weight$"
)
SHARED = re.compile(r"(?:^|(?<=\.))(?:text_)?(?:encoder|decoder)\.embed_tokens\.weight$")
FORMER = {  # ends of names in older files, which transformers reads as the others
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
OWN_BIAS = re.compile(r"(?<=(?:ions|head))\.decoder\.bias$")  # lm_head, cls.predictions


def module(name: str) -> str:
    """The module that owns a tensor: the name without `.weight` or `.bias`."""
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def block(name: str) -> int | None:
    """The block's number: 3 in `model.layers.3.mlp.experts.5.w1`; None outside the blocks."""
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def stack(name: str) -> str | None:
    """The name of the block list, such as `model.layers`; None outside the blocks.

    A model with several towers has several block lists.
    """
    found = BLOCK.search(name)
    return name[: found.start()] if found else None


def last_blocks(tensors: Iterable[str]) -> dict[str, int]:
    """The number of the last block in each stack of blocks."""
    last: dict[str, int] = {}
    for name in tensors:
        own, number = stack(name), block(name)
        if own is not None and number is not None:
            last[own] = max(number, last.get(own, 0))
    return last


def prefixes(own: Collection[str], others: Collection[str]) -> tuple[str, str]:
    """The different prefixes of the same tensors in two files: (`transformer.`, ``) for GPT-2.

    Both are empty if the names agree, or if a model has several block lists.
    """
    ours, theirs = ({stack(name) for name in found} - {None} for found in (own, others))
    if len(ours) != 1 or len(theirs) != 1:
        return "", ""
    first, second = str(*ours), str(*theirs)
    if first.endswith(f".{second}"):
        return first.removesuffix(second), ""
    return "", second.removesuffix(first) if second.endswith(f".{first}") else ""


def current(name: str) -> str:
    """The name that today's transformers gives a tensor whose end older versions called else."""
    former = next((end for end in FORMER if name.endswith(end)), None)
    return name if former is None else name.removesuffix(former) + FORMER[former]


def words(name: str) -> str:
    """What files of one architecture have in common: the current name, without wrappers."""
    return _unwrapped(current(name))


def renumbered(name: str, number: int) -> str:
    """The same tensor of block `number`; outside the blocks the name is unchanged."""
    found = BLOCK.search(name)
    return f"{name[: found.start(1)]}{number}{name[found.end(1) :]}" if found else name


def component(name: str) -> str:
    """The module without its block: `self_attn.q_proj`; outside the blocks the whole module."""
    found = BLOCK.search(name)
    return module(name[found.end() :] if found else name)


def kind(name: str) -> str:
    """The component without the number of a mixture's expert: `mlp.experts.*.up_proj`."""
    return EXPERT.sub(r"\1*", component(name))


def is_routed(name: str) -> bool:
    """Whether a tensor belongs to one of the routed experts of a mixture-of-experts block."""
    return EXPERT.search(component(name)) is not None


def is_head(name: str) -> bool:
    """Whether a tensor belongs to the output head: `lm_head.weight` or its bias."""
    return block(name) is None and HEAD.search(module(name)) is not None


def may_be_tied(name: str) -> bool:
    """Whether a tensor is the matrix of the head, which may be that of the embeddings."""
    return block(name) is None and TIED.search(name) is not None


def may_copy_table(name: str) -> bool:
    """Whether a tensor is the matrix of a head, of any architecture, which may be tied."""
    return may_be_tied(name) or (block(name) is None and OTHER_HEADS.search(name) is not None)


def shared_table(name: str) -> str | None:
    """The table that T5 and BART have for the embeddings of an encoder or decoder: `name`."""
    return SHARED.sub("shared.weight", name) if SHARED.search(name) else None


def bias_of_head(name: str) -> str | None:
    """The bias that BERT's heads have for that of their last layer: `name`."""
    return OWN_BIAS.sub(".bias", name) if OWN_BIAS.search(name) else None


def may_have_tokens(name: str) -> bool:
    """Whether a tensor may have a row for each token: no block, no positions and no labels."""
    return block(name) is None and NO_TOKENS.search(name) is None


def is_token_embedding(name: str) -> bool:
    """Whether a name says that a tensor embeds tokens, and not positions or types."""
    return is_input_side(name) and may_have_tokens(name)


def is_input_side(name: str) -> bool:
    """Whether a tensor is used before the blocks: an embedding, not a final norm or head."""
    return block(name) is None and INPUT_SIDE.search(name) is not None


def find(name: str, tensors: Collection[str]) -> list[str]:
    """The tensors that `name` of a loaded model can stand for, as `TensorNames.find`."""
    known = tensors if isinstance(tensors, TensorNames) else TensorNames(tensors)
    return known.find(name)


class TensorNames(Collection[str]):
    """The names of a checkpoint's tensors, of which many are looked up: they are sorted once."""

    def __init__(self, tensors: Collection[str]) -> None:
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def find(self, name: str) -> list[str]:
        """The tensors that `name` of a loaded model can stand for; one if it is unique.

        The model may have a prefix that its file lacks (`transformer.h.0` for `h.0`), or the file a
        prefix that the model lacks; the rest of the name must agree. Else the words count, without
        those that wrap a model of texts or images, in which versions of transformers and files
        differ (`model.language_model.layers.0` for `language_model.model.layers.0`).
        """
        parts = name.split(".")
        for start in range(len(parts) - 1):
            shorter = ".".join(parts[start:])
            if shorter in self._tensors and block(shorter) == block(name):
                return [shorter]
        first, behind = self._with_end(name)
        found = [tensor[::-1] for tensor in self._reversed[first:behind]]
        return found or self._by_words.get(_unwrapped(name), [])

    def has_end(self, name: str) -> bool:
        """Whether a name is `name`, or ends with it behind a dot."""
        first, behind = self._with_end(name)
        return name in self._tensors or first < behind

    def _with_end(self, name: str) -> tuple[int, int]:
        """The first place in `_reversed` of names that end with `.name`, and that behind them."""
        end = f".{name}"[::-1]
        return bisect_left(self._reversed, end), bisect_left(self._reversed, end + LAST)

    @cached_property
    def _reversed(self) -> list[str]:
        """Each name from its end, in order: names with one end follow each other."""
        return sorted(tensor[::-1] for tensor in self._tensors)

    @cached_property
    def _by_words(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for tensor in self._tensors:
            found.setdefault(_unwrapped(tensor), []).append(tensor)
        return found


def nearest(name: str, tensors: Collection[str], cutoff: float = 0.6) -> str | None:
    """The name that is most like another; None if there is none, or comparing them takes long."""
    if sum(map(len, tensors)) > MAX_COMPARED:
        return None
    return next(iter(difflib.get_close_matches(name, tensors, n=1, cutoff=cutoff)), None)


@lru_cache(maxsize=1 << 18)  # single names are looked up many times, among the same tensors
def _unwrapped(name: str) -> str:
    """A name without wrappers, and with one name for all heads."""
    words = ("lm_head" if word == "embed_out" else word for word in name.split("."))
    return ".".join(word for word in words if word not in WRAPPERS)
