"""Tokenizer files of a merge whose tokenizer is no source's as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from lewis_hub.vocabulary.tokens import Vocabulary, json_object

# They would say something else than tokenizer.json, which has all that they say.
STALE = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
KEEPERS = (TEMPLATE, CONFIG, "chat_template.json")  # of a template; the first that has one counts
TEMPLATES = ("chat_template.json", "additional_chat_templates")  # others; beside the one they clash


def extended(vocabulary: Vocabulary, config: Mapping[str, Any]) -> dict[str, str]:
    """The files of a tokenizer that got new tokens.

    Args:
        vocabulary: with its `tokenizer.json`.
        config: the `tokenizer_config.json` that it extends; empty where there is none.
    """
    written = {"tokenizer.json": _json(vocabulary.document)}
    if "added_tokens_decoder" in config:
        decoder = {
            str(vocabulary.ids[token]): {"content": token, **flags}
            for token, flags in vocabulary.added.items()
        }
        written[CONFIG] = _json({**config, "added_tokens_decoder": decoder})
    return written


def with_template(template: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The files that carry a chat template.

    Args:
        template: its text.
        config: the `tokenizer_config.json` beside it, from which any template is taken out.
    """
    kept = {key: value for key, value in config.items() if key != "chat_template"}
    return {TEMPLATE: template} | ({CONFIG: _json(kept)} if len(kept) < len(config) else {})


def built_in(name: str) -> str:
    """The text of one of `recipe_tokenizer.CHAT_TEMPLATES`."""
    place = resources.files("lewis_hub.templates").joinpath("chat", f"{name}.jinja")
    return place.read_text(encoding="utf-8")


def template_of(label: str, files: Mapping[str, bytes]) -> str | None:
    """A source's chat template, wherever it keeps it; None where it has none.

    Args:
        label: the source, for messages.
        files: the content of those of `KEEPERS` that the source has.

    Raises:
        TokenizerError: a file is broken.
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", errors="replace")
    for name in KEEPERS[1:]:
        found = json_object(label, files, name).get("chat_template")
        if isinstance(found, list):  # several with names
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
