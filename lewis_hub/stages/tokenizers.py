"""Tokenizers: what is read of them, and what comes out of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.hub.fetch import read_small
from lewis_hub.hub.source import Source
from lewis_hub.merge.alignment import Alignment
from lewis_hub.merge.vocabularies import rows_of
from lewis_hub.stages.sources import Inputs
from lewis_hub.vocabulary.files import CONFIG
from lewis_hub.vocabulary.tokens import FILES, Vocabulary, json_object, read_vocabulary
from lewis_hub.vocabulary.translation import Translation

if TYPE_CHECKING:
    from huggingface_hub import HfApi

FAST = "tokenizer.json"


@dataclass(frozen=True)
class Carried:
    """How the tokenizer of the merge differs from the base's; see `sidecars.TokenizerFiles`."""

    donor: str  # pinned
    written: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """What the tokenizers make of a merge.

    Attributes:
        carried: None: the base's tokenizer as it is.
        alignment: None where row i means the same in all sources.
        translations: what the base's ids are in a source; none where they mean the same there.
    """

    carried: Carried | None = None
    alignment: Alignment | None = None
    translations: Mapping[str, Translation] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sources:
    """What the tokenizers are judged by: small files, and how many rows there are."""

    inputs: Inputs
    api: HfApi
    checkpoints: Mapping[str, Checkpoint]
    configs: Mapping[str, Mapping[str, Any]]
    tensors: tuple[str, ...]  # of the base, with a row a token

    @property
    def base(self) -> Source:
        """Whose tensors and configuration the merge has."""
        return self.inputs.donor

    def rows(self, source: Source) -> int:
        """How many rows a source has for tokens."""
        return rows_of(self.checkpoints[source.pinned], self.tensors)

    def is_alike(self, source: Source) -> bool:
        """Whether a source has the base's tokens, as far as its files say, and as many rows."""
        if self.rows(source) != self.rows(self.base):
            return False
        ours, theirs = self.base.file(FAST), source.file(FAST)
        same = bool(ours and theirs and ours.digest == theirs.digest)
        return source is self.base or (same and self._later(source) == self._later(self.base))

    def read(self, source: Source, *names: str) -> dict[str, bytes]:
        """Those of some small files that a source has."""
        found = {name: read_small(self.api, source, name) for name in names}
        return {name: content for name, content in found.items() if content is not None}

    def read_json(self, source: Source, name: str) -> dict[str, Any]:
        """A small JSON file; empty where a source has none."""
        return json_object(source.name, self.read(source, name), name)

    def _later(self, source: Source) -> object:
        """The tokens that are added to those of `tokenizer.json`."""
        return self.read_json(source, CONFIG).get("added_tokens_decoder")

    def vocabulary(self, source: Source) -> Vocabulary | None:
        """A source's own; None where nothing tells it without running code."""
        return read_vocabulary(source.name, self.read(source, *FILES))
