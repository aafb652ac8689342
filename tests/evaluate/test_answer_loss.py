"""Loss on right answers against a loop over one text at a time."""

from math import fsum, isclose

import pytest
import torch

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import load
from lewis_hub.evaluate.items import AnswerLoss, Question, answer_losses, loss_metric


@pytest.fixture(scope="module")
def lm():
    return load(zoo_folder() / "expert-reverse", EvaluationSettings())


def asked(*pairs):
    return [Question("task", prompt, answer) for prompt, answer in pairs]


PAIRS = [
    ("Question: abc\nAnswer:", " cba"),
    ("Question: abcdefgh\nAnswer: ", "hgfedcba"),
    ("Question: a\nAnswer:", ""),
    ("", "Question: ab"),
    ("Question: zyx\nAnswer:", " x y z and more"),
]


def by_hand(lm, prompt, answer):
    """The definition: token by token, one forward pass a token."""
    if not answer:
        return AnswerLoss(0.0, 0)
    first, second = ([lm.prefix_token_id], lm.tok_encode(answer))
    if prompt:
        first, second = lm._encode_pair(prompt, answer)
    nats = []
    for i, token in enumerate(second):
        logits = lm.model(input_ids=torch.tensor([[*first, *second[:i]]])).logits[0, -1]
        nats.append(-float(logits.log_softmax(-1)[token]))
    return AnswerLoss(fsum(nats), len(second))


def test_losses_in_batches_are_those_of_each_text_alone(lm):
    counted = []

    found = answer_losses(lm, asked(*PAIRS), counted.append)

    with torch.inference_mode():
        for loss, pair in zip(found, PAIRS, strict=True):
            expected = by_hand(lm, *pair)
            assert loss.n_tokens == expected.n_tokens
            assert loss.nats == pytest.approx(expected.nats, rel=1e-5)
    assert sum(counted) == len(PAIRS)


def test_losses_are_lm_evals_loglikelihoods(lm):
    from lm_eval.api.instance import Instance

    pairs = [pair for pair in PAIRS if all(pair)]
    requests = [
        Instance("loglikelihood", {}, pair, i, ("task", i, 1)) for i, pair in enumerate(pairs)
    ]
    theirs = [-found for found, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    ours = [loss.nats for loss in answer_losses(lm, asked(*pairs), lambda _: None)]

    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_text_too_long_for_the_model_loses_its_beginning(lm):
    long = "a b c d e f g h " * lm.max_length

    (cut,) = answer_losses(lm, asked((long, " hgf")), lambda _: None)

    prompt, answer = lm._encode_pair(long, " hgf")
    tokens = [*prompt, *answer][-lm.max_length - 1 :]
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([tokens[:-1]])).logits[0, -len(answer) :]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
    assert cut.n_tokens == len(answer)
    assert cut.nats == pytest.approx(-float(chosen.sum()), rel=1e-4)


def test_the_mean_over_items_is_the_mean_over_tokens():
    losses = [AnswerLoss(6.0, 3), AnswerLoss(0.0, 0), AnswerLoss(1.0, 1)]

    found = loss_metric(losses)

    assert found.value == 7 / 4
    assert found.values == (3.0, None, 0.5)  # 2 answers over 4 tokens
    assert isclose((3.0 + 0.5) / 2, found.value)
    assert found.higher_is_better is False
