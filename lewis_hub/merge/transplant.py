"""A model with another model's tokenizer: where each row of the new embeddings comes from.

Rows of tokens that both tokenizers have are copied. All others are combinations of the model's own
rows, so that the model needs no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lewis_hub.checkpoint import names
from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.checkpoint.writer import OutputTensor
from lewis_hub.errors import MergeError
from lewis_hub.merge.alignment import token_tensors
from lewis_hub.merge.plan import MergePlan, MergeSource, TensorPlan, plan_shards
from lewis_hub.merge.token_matches import Spelled, TokenMatches
from lewis_hub.methods.numerics import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

TransplantMethod = Literal["omp", "mean", "subtoken"]
VERSION = 1  # of the arithmetic: raised when the same models would give other rows
METHOD = "linear"  # of the plan, whose tensors are all copied
CHUNK = 4096  # rows that are computed together


@dataclass(frozen=True)
class TransplantSettings:
    """How rows of tokens that the model lacks are made.

    Attributes:
        method: `omp`: the combination of at most `k` shared tokens that is nearest to the token's
            row in the donor, by orthogonal matching pursuit (arXiv 2506.06607). `subtoken`: the
            mean of the tokens into which the model's tokenizer splits its text. `mean`: the mean of
            all tokens.
        k: highest number of shared tokens in a combination of `omp`.
    """

    method: TransplantMethod = "omp"
    k: int = 64

    def __post_init__(self) -> None:
        if self.method not in get_args(TransplantMethod):
            known = ", ".join(f"`{method}`" for method in get_args(TransplantMethod))
            raise MergeError("method", f"there is no `{self.method}`", f"Choose one of {known}.")
        if self.k < 1:
            problem = f"a combination of {self.k} tokens is none"
            raise MergeError("k", problem, "Write 1 or more; 64 is usual.")


@dataclass(frozen=True)
class TokenTables:
    """The tensors of a model with a row per token."""

    inputs: tuple[TensorHeader, ...]  # embeddings
    heads: tuple[TensorHeader, ...]  # heads and their biases; empty if tied to the embeddings

    @property
    def all(self) -> tuple[TensorHeader, ...]:
        """Embeddings and heads."""
        return (*self.inputs, *self.heads)

    @property
    def n_rows(self) -> int:
        """The number of their rows."""
        return self.all[0].shape[0]

    def matrix(self, *, is_head: bool) -> TensorHeader:
        """The matrix of the embeddings or of the head, which may be the embeddings."""
        heads = [table for table in self.heads if len(table.shape) == 2]
        return heads[0] if heads and is_head else self.inputs[0]


def token_tables(checkpoint: Checkpoint, n_tokens: int | None) -> TokenTables:
    """Find the embeddings and heads of a model; `n_tokens` as its configuration says.

    Raises:
        MergeError: it has no embeddings, or embeddings that cannot be exchanged.
    """
    found = [checkpoint.tensors[name] for name in token_tensors(checkpoint, n_tokens)]
    biases = (t for name, t in checkpoint.tensors.items() if _is_bias_of_masked(name))
    found += [bias for bias in biases if found and bias.shape == found[0].shape[:1]]
    tables = TokenTables(
        tuple(table for table in found if _is_input(table.name)),
        tuple(table for table in found if not _is_input(table.name)),
    )
    remedy = "Name a language model with plain embeddings, one row per token."
    if not tables.inputs:
        problem = "it has no token embeddings with as many rows as its config.json has tokens"
        raise MergeError(checkpoint.label, problem, remedy)
    for table in tables.all:
        if table.is_computed or table.dtype not in MERGEABLE:
            kind = "quantised" if table.is_computed else table.dtype
            problem = f"its embeddings {table.name} are {kind}, not bfloat16, float16 or float32"
            remedy = "Use the model that it was quantised from."
            raise MergeError(checkpoint.label, problem, remedy)
    known, n_rows = {table.name for table in tables.all}, tables.n_rows
    for name, tensor in checkpoint.tensors.items():
        if name not in known and _has_other_tokens(tensor, n_rows):
            problem = f"{name} of shape {list(tensor.shape)} has tokens, too, beside the embeddings"
            raise MergeError(checkpoint.label, problem, remedy)
    return tables


def _is_input(name: str) -> bool:
    """Whether a table has embeddings; T5 calls those of encoder and decoder `shared`."""
    return names.is_input_side(name) or names.module(name).rpartition(".")[2] == "shared"


def _is_bias_of_masked(name: str) -> bool:
    return name.startswith("cls.predictions.") and name.endswith("bias")


def _has_other_tokens(tensor: TensorHeader, n_rows: int) -> bool:
    """Whether a tensor embeds other tokens, or the tokens inside a block or along another axis."""
    last = names.module(tensor.name).rpartition(".")[2]
    is_embedding = len(tensor.shape) == 2 and last.startswith("embed_tokens")
    return is_embedding or tensor.shape == (1, n_rows)


@dataclass(frozen=True)
class RowOrigins:
    """Where the rows of the new tables come from, before any weight is read.

    Rows that are neither copied nor approximated are the mean of the model's tokens.
    """

    n_rows: int
    copied: Mapping[int, int]  # row -> the model's row
    approximated: tuple[int, ...]  # rows that are combinations of the model's rows
    n_tokens: int  # rows that are a token; all others are padding
    n_copied: int  # tokens whose rows are copied

    @property
    def n_means(self) -> int:
        """The number of tokens that have the mean row."""
        return self.n_tokens - self.n_copied - len(self.approximated)

    def keeps(self, n_rows: int) -> bool:
        """Whether a table of `n_rows` rows stays as it is."""
        same = all(row == origin for row, origin in self.copied.items())
        return same and self.n_rows == n_rows == len(self.copied)


def row_origins(
    model: Spelled, donor: Spelled, matches: TokenMatches, approximated: Iterable[int]
) -> RowOrigins:
    """Find the origin of each row of the new tables, which has as many rows as `donor`.

    A row that is no token is copied from the model's row of the same number, if that is none
    either. `approximated` are the ids of other tokens of the donor that can be approximated.
    """
    both = range(min(model.n_rows, donor.n_rows))
    padding = {row: row for row in both if row not in donor.texts and row not in model.texts}
    return RowOrigins(
        n_rows=donor.n_rows,
        copied={**matches.rows, **padding},
        approximated=tuple(sorted(approximated)),
        n_tokens=len(donor.texts),
        n_copied=len(matches.rows),
    )


@dataclass(frozen=True, eq=False)
class WeightedRows:
    """Combinations of a model's rows."""

    rows: Tensor  # (n, k) int64
    weights: Tensor  # (n, k) float32

    def part(self, first: int) -> WeightedRows:
        """The next CHUNK combinations."""
        return WeightedRows(*(one[first : first + CHUNK] for one in (self.rows, self.weights)))


@dataclass(frozen=True)
class MeanRows:
    """The means of some of a model's rows, which may be of 1 row and of hundreds."""

    rows: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, rows: Mapping[int, tuple[int, ...]]) -> MeanRows:
        """The mean of the rows of each key, in the order of the keys."""
        return cls([rows[key] for key in sorted(rows)])

    def part(self, first: int) -> WeightedRows:
        """The next CHUNK means, with the weight 0 for what a shorter one lacks."""
        import torch

        means = self.rows[first : first + CHUNK]
        longest = max(map(len, means), default=1)
        indices = torch.zeros(len(means), longest, dtype=torch.int64)
        weights = torch.zeros(len(means), longest)
        for place, rows in enumerate(means):
            indices[place, : len(rows)] = torch.tensor(rows)
            weights[place, : len(rows)] = 1 / len(rows)
        return WeightedRows(indices, weights)


def new_table(
    table: Tensor, origins: RowOrigins, combinations: WeightedRows | MeanRows, tokens: list[int]
) -> Tensor:
    """Make the rows of a new table, in float32.

    Args:
        table: (n, ...) float32, the model's.
        origins: of the new rows.
        combinations: of `origins.approximated`, in this order.
        tokens: the rows of the table that are tokens; other rows are averaged over them.
    """
    import torch

    made = mean_row(table, tokens).repeat(origins.n_rows, *[1] * (table.dim() - 1))
    if origins.copied:
        made[torch.tensor([*origins.copied])] = table[torch.tensor([*origins.copied.values()])]
    for first in range(0, len(origins.approximated), CHUNK):
        places = torch.tensor(origins.approximated[first : first + CHUNK])
        part = combinations.part(first)
        total = torch.zeros(len(places), *table.shape[1:])
        for place in range(part.rows.shape[1]):  # one by one, so that the sums are equal everywhere
            factor = part.weights[:, place].view(-1, *[1] * (table.dim() - 1))
            total += factor * table[part.rows[:, place]]
        made[places] = total
    return made


def mean_row(table: Tensor, tokens: list[int]) -> Tensor:
    """The mean of some rows, summed in float64: (1, ...) float32."""
    import torch

    total = torch.zeros(1, *table.shape[1:], dtype=torch.float64)
    with torch_threads(1):
        for first in range(0, len(tokens), CHUNK):
            rows = table[torch.tensor(tokens[first : first + CHUNK])]
            total += rows.double().sum(dim=0, keepdim=True)
    return (total / len(tokens)).float()


def make_transplant_plan(
    model: MergeSource, tables: Sequence[TensorHeader], n_rows: int, max_shard_bytes: int
) -> MergePlan:
    """Plan the new model: all tensors are copied.

    The `tables` that change have no inputs until they are made.
    """
    changed = {table.name for table in tables}
    made: dict[str, TensorPlan] = {}
    for name, tensor in model.checkpoint.tensors.items():
        if name in changed:
            output = OutputTensor(name, tensor.dtype, (n_rows, *tensor.shape[1:]))
            made[name] = TensorPlan(output, (), ())
        else:
            output = OutputTensor(name, tensor.dtype, tensor.shape)
            made[name] = TensorPlan(output, (tensor,), (0,))
    return plan_shards(METHOD, (model,), made, max_shard_bytes)
