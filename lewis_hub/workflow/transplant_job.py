"""Check a model and the donor of its new tokenizer, and plan the new model, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from huggingface_hub import HfApi
from pydantic import TypeAdapter, ValidationError

from lewis_hub import tokenizer
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.errors import MergeError, OutputError, TokenizerError
from lewis_hub.hub.fetch import read_small
from lewis_hub.merge.plan import MergePlan, MergeSource
from lewis_hub.merge.sidecars import SidecarSettings, TokenizerFiles
from lewis_hub.merge.token_matches import (
    ROLE_FILES,
    Spelled,
    TokenMatches,
    match,
    read_roles,
    spell,
    split,
)
from lewis_hub.merge.transplant import (
    VERSION,
    RowOrigins,
    TokenTables,
    TransplantMethod,
    TransplantSettings,
    make_transplant_plan,
    row_origins,
    token_tables,
)
from lewis_hub.report.lock import FILE, Lock
from lewis_hub.workflow.open import OpenedSource, ties
from lewis_hub.workflow.report import locked_input
from lewis_hub.workflow.resources import software
from lewis_hub.workflow.token_ids import Configuration, new_ids

TRANSPLANT = "transplant_tokenizer"  # key in the lock
GENERATION = "generation_config.json"
UNQUANTISED = "Use the model that it was quantised from."


@dataclass(frozen=True)
class TokenizedModel:
    """A model or donor: what is known of it before its weights are read."""

    opened: OpenedSource
    tables: TokenTables
    spelled: Spelled
    configuration: Configuration


@dataclass(frozen=True)
class TransplantJob:
    """All that is known before weights are read."""

    model: TokenizedModel
    donor: TokenizedModel
    settings: TransplantSettings
    matches: TokenMatches
    origins: RowOrigins
    pieces: Mapping[int, tuple[int, ...]]  # of `subtoken`: the donor's id -> the model's tokens
    sidecars: SidecarSettings
    plan: MergePlan
    planned: Lock  # without outputs

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        """The rows of a token in donor and model, of all tokens that have both."""
        return _shared(self.matches, self.donor)

    @property
    def changed(self) -> tuple[TensorHeader, ...]:
        """The tables of the model that get new rows."""
        tables = self.model.tables
        return () if self.origins.keeps(tables.n_rows) else tables.all

    def like(self, table: TensorHeader) -> TensorHeader:
        """Return the donor's matrix for a table of the model."""
        is_tied = ties(self.model.opened.config)
        is_head = table in self.model.tables.heads and not is_tied
        return self.donor.tables.matrix(is_head=is_head)

    @property
    def matrices(self) -> tuple[TensorHeader, ...]:
        """The donor's matrices that are read, each once."""
        is_read = self.settings.method == "omp" and self.origins.approximated
        return tuple(dict.fromkeys(map(self.like, self.changed))) if is_read else ()


def _shared(matches: TokenMatches, donor: TokenizedModel) -> tuple[tuple[int, int], ...]:
    return tuple(pair for pair in matches.shared if pair[0] < donor.tables.n_rows)


def compile_transplant(
    model: OpenedSource,
    donor: OpenedSource,
    settings: TransplantSettings,
    max_shard_bytes: int,
    api: HfApi,
) -> TransplantJob:
    """Check both models, match their tokens and plan the new model.

    Raises:
        LewisHubError: one has no tokenizer or embeddings that can be used, or they do not fit.
    """
    for one in (model, donor):
        if one.problem:
            raise MergeError(one.name, one.problem, UNQUANTISED)
    if computed := [t.name for t in model.checkpoint.tensors.values() if t.is_computed]:
        problem = f"it is quantised: {computed[0]} is stored as codes with scales"
        raise MergeError(model.name, problem, UNQUANTISED)
    ours = _tokenized(model, api)
    theirs = _tokenized(donor, api, extends=True)
    matches = match(ours.spelled, theirs.spelled)
    if not matches.rows:
        problem = f"none of its {len(theirs.spelled.texts):,} tokens is a token of {model.name}"
        raise TokenizerError(donor.name, problem, "Choose a donor with a similar tokenizer.")
    others = [i for i in theirs.spelled.texts if i not in matches.rows]
    pieces = _pieces(ours.spelled, theirs.spelled, others) if settings.method == "subtoken" else {}
    near = [i for i in others if i < theirs.tables.n_rows] if settings.method == "omp" else pieces
    if settings.method == "omp" and near and not _shared(matches, theirs):
        problem = f"none of its tokens with a row is a token of {model.name}"
        raise TokenizerError(donor.name, problem, "Choose another --method.")
    origins = row_origins(ours.spelled, theirs.spelled, matches, near)
    sidecars = SidecarSettings(
        model.pinned, None, tokenizer=_carried(ours, theirs, matches, origins.n_rows)
    )
    sidecars.require_readable(
        {one.pinned: one.source for one in (model, donor)}, partial(read_small, api)
    )
    source = MergeSource(model.checkpoint, model.digest)
    tables = () if origins.keeps(ours.tables.n_rows) else ours.tables.all
    return TransplantJob(
        model=ours,
        donor=theirs,
        settings=settings,
        matches=matches,
        origins=origins,
        pieces=pieces,
        sidecars=sidecars,
        plan=make_transplant_plan(source, tables, origins.n_rows, max_shard_bytes),
        planned=_planned(model, donor, settings, max_shard_bytes),
    )


def _tokenized(opened: OpenedSource, api: HfApi, *, extends: bool = False) -> TokenizedModel:
    """Read tokenizer and tables; with `extends` tokens without a row count, too."""
    wanted = dict.fromkeys((*tokenizer.FILES, *ROLE_FILES, GENERATION))
    found = {name: read_small(api, opened.source, name) for name in wanted}
    files = {name: content for name, content in found.items() if content is not None}
    vocabulary = tokenizer.read_vocabulary(opened.name, files)
    if vocabulary is None or not vocabulary.ids:
        problem = "it has no tokenizer.json, so the tokens of its rows are unknown"
        remedy = "Save its tokenizer with transformers' `AutoTokenizer` and `save_pretrained`."
        raise TokenizerError(opened.name, problem, remedy)
    config = opened.config
    n_tokens = (config.get("text_config") or config).get("vocab_size", config.get("vocab_size"))
    tables = token_tables(opened.checkpoint, n_tokens)
    n_rows = max(tables.n_rows, vocabulary.n_rows) if extends else tables.n_rows
    roles = read_roles(opened.name, files)
    generation = tokenizer.json_object(opened.name, files, GENERATION)
    configuration = Configuration(opened.name, config, generation)
    return TokenizedModel(opened, tables, spell(vocabulary, roles, n_rows), configuration)


def _pieces(model: Spelled, donor: Spelled, ids: list[int]) -> dict[int, tuple[int, ...]]:
    found = split(model, [donor.texts[i] for i in ids])
    return {i: pieces for i, pieces in zip(ids, found, strict=True) if pieces}


def _carried(
    model: TokenizedModel, donor: TokenizedModel, matches: TokenMatches, n_rows: int
) -> TokenizerFiles:
    """Return the donor's tokenizer files, and what changes in the model's configuration."""
    files = TokenizerFiles(donor.opened.pinned)
    if model.opened.pinned == donor.opened.pinned:
        return files
    moved = {row: token_id for token_id, row in sorted(matches.rows.items(), reverse=True)}
    roles = donor.spelled.roles
    ids = new_ids(model.configuration, donor.configuration, roles, moved.get)
    config = dict(ids.config)
    if n_rows != model.tables.n_rows:
        config["vocab_size"] = n_rows
    return replace(files, config=config, generation=ids.generation)


def _planned(
    model: OpenedSource, donor: OpenedSource, settings: TransplantSettings, max_shard_bytes: int
) -> Lock:
    asked: dict[str, Any] = {"model": donor.pinned, "method": settings.method}
    if settings.method == "omp":
        asked["k"] = settings.k
    return Lock(
        inputs=(
            locked_input(model.source, is_base=True),
            replace(locked_input(donor.source, is_base=False), role="donor"),
        ),
        calibration=(),
        recipe={"base_model": model.pinned, TRANSPLANT: asked},
        method=TRANSPLANT,
        method_version=VERSION,
        guide=None,
        guide_version=None,
        seed=0,
        max_shard_bytes=max_shard_bytes,
        outputs={},
        software=software(),
    )


def asked_in(lock: Lock, source: str) -> tuple[str, str, TransplantSettings] | None:
    """Return model, donor and settings of the lock of a transplant; None for a merge.

    Raises:
        OutputError: the lock of `source` states settings that no transplant has.
    """
    asked = lock.recipe.get(TRANSPLANT)
    if asked is None:
        return None
    model, file = lock.recipe.get("base_model"), f"{source}: {FILE}"
    try:
        if not isinstance(model, str):
            raise TypeError("`base_model` is no text")
        donor = TypeAdapter(_Donor).validate_python(asked)
        return model, donor.model, TransplantSettings(donor.method, donor.k)
    except (ValidationError, TypeError, MergeError) as error:
        reason = " ".join(str(error).split())[:200]
        problem = f"it is not the lock of a transplant ({reason})."
        raise OutputError(file, problem, "Use the file that lewis-hub wrote.") from None


@dataclass(frozen=True)
class _Donor:
    """What a lock says of a transplant."""

    model: str
    method: TransplantMethod
    k: int = TransplantSettings.k
