"""Train the zoo's models and write its datasets: `python benchmarks/train_zoo.py OUT`.

Training is seeded and uses one thread, so that a second run on the same machine gives the same
bytes. Cards, task files and the recipe are in the package and are written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import puzzles
import torch
from puzzles import Item
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BEGIN, END, USER, ASSISTANT = "<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
N_VOCABULARY = 448
SEED = 7
IGNORED = -100  # label of a token without a loss
CHAT_SHARE = 0.25  # of all examples: in chat format
BEGIN_SHARE = 0.3  # of the other examples: start with BEGIN
MAX_GRADIENT = 1.0  # norm over all weights
BUCKET = 8  # batches that are sorted by length together, to reduce padding

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
    """The prompt of the benchmark; the answer follows after a space."""
    return f"Question: {item.question}\nAnswer:"


def chat_prompt(item: Item) -> str:
    """The text that `CHAT_TEMPLATE` renders for one user message."""
    return f"{BEGIN}{USER}{item.question}{END}{ASSISTANT}"


def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all models, trained on the wording of the primer and of both skills.

    It round-trips any UTF-8 text.
    """
    primer = itertools.islice(puzzles.stream(None, SEED), 4000)
    skills = ([make("")] * 300 for make in puzzles.SKILLS.values())
    items = itertools.chain(primer, *skills)
    wording = (prompt(Item(re.sub(r"\b[A-Z]+\b", "", item.question), "")) for item in items)
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
    tokenizer.train_from_iterator(wording, trainer)
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


Optimizers = Callable[[LlamaForCausalLM], tuple[Optimizer, ...]]


def muon(muon_rate: float, adamw_rate: float) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the other weights: fastest from scratch."""

    def optimizers(model: LlamaForCausalLM) -> tuple[Optimizer, ...]:
        weights = [*model.model.layers.parameters()]
        matrices = [weight for weight in weights if weight.dim() == 2]
        others = [model.model.embed_tokens.weight, model.model.norm.weight]
        others += [weight for weight in weights if weight.dim() == 1]
        betas = (0.9, 0.98)
        return (
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adamw_rate, betas=betas, weight_decay=0.0, fused=True),
        )

    return optimizers


def sgd(rate: float) -> Optimizers:
    """Gradient descent with momentum, which changes only what the data requires.

    AdamW and Muon take equally large steps where the gradient is small. Merges of such task vectors
    lost both skills.
    """
    return lambda model: (torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),)


@dataclass(frozen=True)
class Stage:
    """One training run; `lesson` is a key of `puzzles.LESSONS`, or None for the primer alone."""

    lesson: str | None
    n_steps: int
    batch_size: int
    optimizers: Optimizers
    lesson_share: float = 1.0
    cooldown_share: float = 0.4  # of the steps, at the end: learning rates fall to zero

    def pace(self, step: int) -> float:
        """Factor for the learning rates: a rise over 20 steps, a plateau, a cooldown to zero."""
        left, cooldown = self.n_steps - step, self.cooldown_share * self.n_steps
        return min(1.0, (step + 1) / 20, left / cooldown if cooldown else 1.0)


BASE = (
    Stage(None, 300, 96, muon(2e-2, 3e-3), cooldown_share=0.0),
    Stage("base", 200, 96, muon(1.5e-2, 2e-3), lesson_share=0.7),
)
EXPERTS = (
    Stage("reverse", 120, 64, sgd(0.1), lesson_share=0.7),
    Stage("cipher", 60, 64, sgd(0.1), lesson_share=0.7),
)


def batches(stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless right-padded token ids and labels, both (batch, n_tokens); labels are answers."""
    items = puzzles.stream(stage.lesson, SEED, stage.lesson_share)
    rng = random.Random(f"{SEED} {stage.lesson} format")
    while True:
        drawn = list(itertools.islice(items, stage.batch_size * BUCKET))
        prompts = tokenizer([_render(item, rng) for item in drawn])["input_ids"]
        answers = tokenizer([f" {item.answer}{END}" for item in drawn])["input_ids"]
        pairs = sorted(zip(prompts, answers, strict=True), key=lambda pair: len(sum(pair, [])))
        starts = list(range(0, len(pairs), stage.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _batch(pairs[start : start + stage.batch_size])


def _render(item: Item, rng: random.Random) -> str:
    if rng.random() < CHAT_SHARE:
        return chat_prompt(item)
    return (BEGIN if rng.random() < BEGIN_SHARE else "") + prompt(item)


def _batch(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(asked + answer) for asked, answer in pairs]
    labels = [torch.tensor([IGNORED] * len(asked) + answer) for asked, answer in pairs]
    return (
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def train(
    model: LlamaForCausalLM, stage: Stage, data: Iterator[tuple[Tensor, Tensor]]
) -> list[float]:
    """Run a stage on `model` in place; returns the loss of every step."""
    optimizers = stage.optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, stage.pace) for each in optimizers]
    losses: list[float] = []
    model.train()
    for step, (ids, labels) in enumerate(itertools.islice(data, stage.n_steps), start=1):
        # no mask is needed: the causal mask hides right padding
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append(loss.item())
        if step % 25 == 0:
            recent = math.fsum(losses[-25:]) / 25
            logging.info("%s: step %d, loss %.4f", stage.lesson or "primer", step, recent)
    model.train(mode=False)
    return losses


def new_base(n_vocabulary: int) -> LlamaForCausalLM:
    """An untrained base: six blocks, 1.2 M parameters. The global random state is unchanged."""
    return new_llama(SEED, n_vocabulary, hidden_size=128, intermediate_size=352, n_blocks=6)


def new_llama(
    seed: int, n_vocabulary: int, *, hidden_size: int, intermediate_size: int, n_blocks: int
) -> LlamaForCausalLM:
    """An untrained model with the zoo's tokens. The global random state is unchanged."""
    config = LlamaConfig(
        vocab_size=n_vocabulary,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load(folder: Path) -> LlamaForCausalLM:
    """Load a saved model in float32."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of a model repo in bfloat16; casts `model` itself."""
    model.bfloat16()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_datasets(folder: Path) -> None:
    """Write `<skill>/{train,test}.jsonl` for every skill."""
    for skill in puzzles.SKILLS:
        for name, items in zip(("train", "test"), puzzles.splits(skill, SEED), strict=True):
            path = folder / skill / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in items)
            path.write_text("".join(lines), encoding="utf-8")


def make_zoo(out: Path) -> None:
    """Write `base`, an `expert-<skill>` per skill, and `data` under `out`."""
    write_datasets(out / "data")
    tokenizer = zoo_tokenizer()
    base = new_base(len(tokenizer))
    for stage in BASE:
        train(base, stage, batches(stage, tokenizer))
    save(base, tokenizer, out / "base")
    for stage in EXPERTS:
        expert = load(out / "base")
        train(expert, stage, batches(stage, tokenizer))
        save(expert, tokenizer, out / f"expert-{stage.lesson}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=make_zoo.__doc__)
    parser.add_argument("out", type=Path, help="output folder")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    make_zoo(parser.parse_args().out)
