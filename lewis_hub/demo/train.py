"""Train the zoo's models and write its datasets: `python -m lewis_hub.demo.train OUT`.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lewis_hub.demo import tasks
from lewis_hub.demo.tasks import Item

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


Optimizers = Callable[[LlamaForCausalLM], tuple[Optimizer, ...]]


def muon(muon_rate: float, adamw_rate: float) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the other weights: fastest from scratch."""

    def steer(model: LlamaForCausalLM) -> tuple[Optimizer, ...]:
        matrices = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
        others = [model.model.embed_tokens.weight, model.model.norm.weight]
        others += [weight for weight in model.model.layers.parameters() if weight.dim() == 1]
        return (
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0),
            torch.optim.AdamW(
                others, lr=adamw_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
        )

    return steer


def sgd(rate: float) -> Optimizers:
    """Gradient descent with momentum, which changes only what the data requires.

    AdamW and Muon take equally large steps where the gradient is small. Merges of such task vectors
    lost both skills.
    """
    return lambda model: (torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),)


@dataclass(frozen=True)
class Stage:
    """One training run; `lesson` is a key of `tasks.LESSONS`, or None for the primer alone."""

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


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and labels, both (batch, n_tokens) int64."""

    ids: Tensor
    labels: Tensor


def architecture(n_vocabulary: int) -> LlamaConfig:
    """Six Llama blocks, 1.2 M parameters; key and value heads are shared in pairs."""
    return LlamaConfig(
        vocab_size=n_vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=True,
    )


def batches(
    stage: Stage, tokenizer: PreTrainedTokenizerFast, *, seed: int = SEED
) -> Iterator[Batch]:
    """Endless training batches of a stage; the loss covers answers only."""
    items = tasks.stream(stage.lesson, seed, stage.lesson_share)
    rng = random.Random(f"{seed} {stage.lesson} format")
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


def _batch(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    width = max(len(asked) + len(answer) for asked, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (asked, answer) in enumerate(pairs):
        ids[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
        labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
    return Batch(ids, labels)


def loss_on(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over answer tokens, in nats; the causal mask hides right padding."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:]
    kept = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept])


def train(model: LlamaForCausalLM, stage: Stage, data: Iterator[Batch]) -> list[float]:
    """Run a stage on `model` in place; returns the loss of every step."""
    optimizers = stage.optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, stage.pace) for each in optimizers]
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(itertools.islice(data, stage.n_steps), start=1):
        loss = loss_on(model, batch)
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


def zoo_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all models, trained on the wording of the primer and of both skills."""
    primer = itertools.islice(tasks.stream(None, SEED), 4000)
    skills = ([make("")] * 300 for make in tasks.SKILLS.values())
    return build_tokenizer(itertools.chain(primer, *skills))


def new_base(n_vocabulary: int) -> LlamaForCausalLM:
    """An untrained base; leaves the global random state unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return LlamaForCausalLM(architecture(n_vocabulary))


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
    for skill in tasks.SKILLS:
        parts = tasks.splits(skill, SEED)
        for name, items in (("train", parts.train), ("test", parts.test)):
            path = folder / skill / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(dataclasses.asdict(item)) + "\n" for item in items)
            path.write_text("".join(lines), encoding="utf-8")


def make_zoo(out: Path, steps_scale: float = 1.0) -> None:
    """Write `base`, an `expert-<skill>` per skill, and `data` under `out`."""
    write_datasets(out / "data")
    tokenizer = zoo_tokenizer()
    base = new_base(len(tokenizer))
    for stage in BASE:
        _run(stage, base, tokenizer, steps_scale)
    save(base, tokenizer, out / "base")
    for stage in EXPERTS:
        expert = load(out / "base")
        _run(stage, expert, tokenizer, steps_scale)
        save(expert, tokenizer, out / f"expert-{stage.lesson}")


def _run(
    stage: Stage, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps_scale: float
) -> None:
    scaled = dataclasses.replace(stage, n_steps=max(1, round(stage.n_steps * steps_scale)))
    train(model, scaled, batches(scaled, tokenizer))


def main() -> None:
    """Read the command line and make the zoo."""
    parser = argparse.ArgumentParser(description=make_zoo.__doc__)
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument(
        "--steps-scale",
        type=float,
        default=1.0,
        help="factor for the number of steps; 0.01 for a quick try",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    make_zoo(arguments.out, arguments.steps_scale)


if __name__ == "__main__":
    main()
