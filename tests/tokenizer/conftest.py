"""Small tokenizers of every kind, made with the tokenizers library."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lewis_hub.tokenizer import read_vocabulary


def byte_level(merges=(), added=(), *, first=()):
    """Byte-level BPE: special tokens, the alphabet, one token a merge, then added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*first, *letters, *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, added)


def unigram(scores, added=()):
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_added(tokenizer, added)


def word_level(words, added=()):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(tokenizer, added)


def _with_added(tokenizer, added):
    for token in added:
        is_plain = isinstance(token, AddedToken)
        one = token if is_plain else AddedToken(token, normalized=False, special=True)
        tokenizer.add_tokens([one])
    return tokenizer


def read(label, tokenizer, **config):
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    if config:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return read_vocabulary(label, files)
