"""Texts that a tiny model writes: against naive loops, and equal on any number of threads."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import transformers

from lewis_hub.calibration.generate import (
    Sampling,
    end_tokens,
    n_new,
    nucleus,
    uniform,
    write_texts,
)
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.errors import CalibrationModelError

from .conftest import tiny_model

PROMPTS = ((5, 9, 3, 40, 7, 11), (8, 2, 61), (30, 31), (12,), (4, 4, 4, 4, 4, 4, 4, 4))
LIMIT = 12


def prompts_of(ids=PROMPTS, limit=LIMIT, end=None):
    rows = tuple(range(len(ids)))
    return CalibrationTokens(ids, rows, len(ids), 0, 0, "me/model", limit=limit, end=end)


def texts_of(model, prompts, sampling=None, known=()):
    found = {}
    for batch in write_texts(model, "me/model", prompts, sampling, known, lambda _: None):
        found |= batch
    return found


def naive(model, ids, ends, choose):
    """Continue one text by whole forward passes, without a cache."""
    written = []
    with torch.no_grad():
        while len(ids) + len(written) < LIMIT:
            logits = model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1]
            token = choose(logits, len(written))
            if token in ends:
                break
            written.append(token)
    return tuple(written)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_greedy_answers_are_those_of_a_naive_loop(architecture):
    model, prompts = tiny_model(architecture), prompts_of()

    found = texts_of(model, prompts)

    ends = {2}  # of the configuration
    for number, ids in enumerate(PROMPTS):
        assert found[number] == naive(model, ids, ends, lambda x, _: int(x.argmax()))
    assert sum(map(len, found.values())) > 10


def test_a_batch_needs_no_positions_that_a_model_does_not_have():
    model, prompts = tiny_model("gpt2"), prompts_of(((5,) * 60, (7,) * 59, (3,) * 50), limit=64)

    found = texts_of(model, prompts)

    alone = [texts_of(model, prompts_of((ids,), limit=64))[0] for ids in prompts.ids]
    assert [found[number] for number in range(3)] == alone


def test_samples_are_those_of_a_naive_loop():
    model, sampling = tiny_model("llama"), Sampling(0.7, 0.8, 42)

    found = texts_of(model, prompts_of(), sampling)

    for number, ids in enumerate(PROMPTS):

        def draw(logits, step, number=number):
            probabilities = (logits.double() / 0.7).softmax(0).tolist()
            order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
            sums = list(accumulate(probabilities[token] for token in order))
            n_kept = next(n for n, total in enumerate(sums, 1) if total >= 0.8)
            share = uniform(42, step, number) * sums[n_kept - 1]
            return order[next(n for n, total in enumerate(sums) if total > share)]

        assert found[number] == naive(model, ids, {2}, draw)
    assert found != texts_of(model, prompts_of(), Sampling(0.7, 0.8, 43))


def test_a_worked_example_of_the_nucleus():
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.2]]).log().repeat(4, 1)
    shares = torch.tensor([0.0, 0.7, 0.75, 0.999], dtype=torch.float64)

    # the nucleus of .6 is 1 and 2, with .7 in all: up to 5/7 of it is token 1, the rest token 2
    assert nucleus(logits, 1.0, 0.6, shares).tolist() == [1, 1, 2, 2]
    assert nucleus(logits, 0.01, 1.0, shares).tolist() == [1, 1, 1, 1]


def test_random_numbers_are_hashes_of_seed_text_and_step():
    assert uniform(42, 0, 0) == uniform(42, 0, 0) != uniform(42, 0, 1)
    numbers = [uniform(7, step, number) for step in range(20) for number in range(20)]
    assert 0 <= min(numbers) < 0.02
    assert 0.98 < max(numbers) < 1
    assert abs(sum(numbers) / 400 - 0.5) < 0.05


def test_the_tokens_are_the_same_on_any_number_of_threads_and_after_an_interruption(monkeypatch):
    monkeypatch.setattr("lewis_hub.calibration.generate.TOGETHER", 2 * LIMIT)  # two texts a batch
    model, sampling = tiny_model("llama"), Sampling(1.0, 1.0, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = texts_of(model, prompts_of(), sampling)
        torch.set_num_threads(3)
        first = next(write_texts(model, "m", prompts_of(), sampling, (), lambda _: None))
        rest = texts_of(model, prompts_of(), sampling, known=first)
    finally:
        torch.set_num_threads(before)

    assert len(first) == 2
    assert not first.keys() & rest.keys()
    assert {**first, **rest} == whole


def test_all_units_are_reported_however_early_the_texts_end():
    model, done = tiny_model("llama"), []

    batches = write_texts(model, "me/model", prompts_of(), None, (), done.append)

    assert all(len(batch) for batch in batches)
    assert sum(done) == n_new(prompts_of()) == 5 * LIMIT - 20
    assert min(done) >= 0


def test_a_prompt_that_fills_the_limit_gets_no_answer():
    found = texts_of(tiny_model("llama"), prompts_of(((7,) * LIMIT, (3,))))

    assert found[0] == ()
    assert found[1]


def test_the_end_is_that_of_the_generation_settings_and_of_the_tokenizer():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [9, 4]
    assert end_tokens(model, prompts_of(end=6)) == (4, 6, 9)
    first = naive(model, PROMPTS[0], (), lambda x, _: int(x.argmax()))
    found = texts_of(model, prompts_of(PROMPTS[:1], end=first[2]))
    assert found[0] == first[: first.index(first[2])]


def test_the_models_own_generation_settings_change_nothing():
    plain, model = texts_of(tiny_model("llama"), prompts_of()), tiny_model("llama")
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 3

    assert texts_of(model, prompts_of()) == plain


def test_models_that_cannot_write_the_texts_are_refused():
    with pytest.raises(CalibrationModelError, match="texts of 65 tokens, and has 64 positions"):
        texts_of(tiny_model("llama"), prompts_of(limit=65))
    settings = {"vocab_size": 97, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2}
    config = transformers.T5Config(**settings, num_layers=1)
    encoder_decoder = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(CalibrationModelError, match="does not continue a text"):
        texts_of(encoder_decoder, prompts_of())


@pytest.mark.parametrize(
    ("stated", "used"), [("2", (7,)), (["2", 3], (3, 7)), ([None, 3.5], (7,)), ({"a": 1}, (7,))]
)
def test_end_tokens_that_are_no_numbers_are_left_out(stated, used):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = stated

    assert end_tokens(model, prompts_of(end=7)) == used
