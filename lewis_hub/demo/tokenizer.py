"""The zoo's tokenizer: byte-level BPE whose merges cover the wording of questions only.

Capitals and digits stay single tokens, so every puzzle is about letters that the model can see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lewis_hub.demo.tasks import Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, USER, ASSISTANT = "<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
N_VOCABULARY = 448

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|user|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|> ' + message.content + '<|end|>' }}
    {%- else %}
        {{- raise_exception('this chat knows the roles user and assistant only') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def prompt(item: Item) -> str:
    """What the benchmark asks; the answer follows after a space."""
    return f"Question: {item.question}\nAnswer:"


def chat_prompt(item: Item) -> str:
    """What `CHAT_TEMPLATE` renders for one user message."""
    return f"{BEGIN}{USER}{item.question}{END}{ASSISTANT}"


def _wording(items: Iterable[Item]) -> Iterator[str]:
    for item in items:
        yield prompt(Item(re.sub(r"\b[A-Z]+\b", "", item.question), ""))


def build_tokenizer(items: Iterable[Item]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the wording of `items`; it round-trips any UTF-8 text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCABULARY,
        special_tokens=[PAD, BEGIN, END, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_wording(items), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )
