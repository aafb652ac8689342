"""Tokenizer files of a merge whose tokenizer is no source's as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lewis_hub.vocabulary.tokens import Vocabulary

# They would say something else than tokenizer.json, which has all that they say.
STALE = ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model")
TEMPLATE = "chat_template.jinja"
TEMPLATES = ("chat_template.json", "additional_chat_templates")  # others; beside the one they clash


def extended(vocabulary: Vocabulary, config: bytes | None) -> dict[str, str]:
    """The files of a tokenizer that got new tokens.

    Args:
        vocabulary: with its `tokenizer.json`.
        config: the `tokenizer_config.json` that it extends; None where there is none.
    """
    written = {"tokenizer.json": json.dumps(vocabulary.document, ensure_ascii=False, indent=2)}
    told: dict[str, Any] = json.loads(config) if config else {}
    if "added_tokens_decoder" in told:
        told["added_tokens_decoder"] = {
            str(vocabulary.ids[token]): {"content": token, **flags}
            for token, flags in vocabulary.added.items()
        }
        written["tokenizer_config.json"] = json.dumps(told, ensure_ascii=False, indent=2) + "\n"
    return written


def with_template(template: str, config: str | None) -> dict[str, str]:
    """The files that carry a chat template.

    Args:
        template: its text.
        config: the `tokenizer_config.json` beside it, from which any template is taken out.
    """
    written = {TEMPLATE: template}
    told: dict[str, Any] = json.loads(config) if config else {}
    if told.pop("chat_template", None) is not None:
        written["tokenizer_config.json"] = json.dumps(told, ensure_ascii=False, indent=2) + "\n"
    return written


def template_of(files: Mapping[str, bytes]) -> str | None:
    """A source's chat template, wherever it keeps it; None where it has none.

    Args:
        files: the content of those of `chat_template.jinja`, `tokenizer_config.json` and
            `chat_template.json` that the source has.
    """
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        told = json.loads(files.get(name, b"{}"))
        found = told.get("chat_template") if isinstance(told, dict) else None
        if isinstance(found, list):  # several with names
            named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
