"""The divergence of next-token predictions, against loops written from its definition."""

import math

import pytest
import torch

from lewis_hub.calibration.drift import divergence, joined, likeliest, log_probabilities
from lewis_hub.calibration.model import load_model
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.demo.zoo import zoo_folder

N_VOCABULARY = 12


def distributions(n_predicted=7, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n_predicted, N_VOCABULARY, generator=draws).mul(3).log_softmax(dim=-1)


def naive(log_p, log_q, n_kept=N_VOCABULARY):
    """D(p || q) of each row, with all tokens but the `n_kept` likeliest counted as one."""
    found = []
    for p, q in zip(log_p.double().exp().tolist(), log_q.double().exp().tolist(), strict=True):
        order = sorted(range(len(p)), key=lambda token: -p[token])
        groups = [[token] for token in order[:n_kept]] + [order[n_kept:]]
        pairs = [(sum(p[t] for t in some), sum(q[t] for t in some)) for some in groups if some]
        found.append(sum(a * math.log(a / b) for a, b in pairs))
    return found


@pytest.mark.parametrize("n_kept", [1, 4, 11, 12, 50])
def test_the_drift_is_the_kl_divergence_of_the_likeliest_tokens_and_the_rest(n_kept):
    log_p, log_q = distributions(), distributions(seed=1)

    found = divergence(likeliest(log_p, n_kept), log_q)

    assert found.tolist() == pytest.approx(naive(log_p, log_q, n_kept), rel=1e-5)


def test_counting_tokens_as_one_never_makes_the_drift_larger():
    log_p, log_q = distributions(), distributions(seed=1)

    sums = [divergence(likeliest(log_p, n), log_q).sum().item() for n in range(1, N_VOCABULARY + 1)]

    assert sums == sorted(sums)
    assert sums[-1] == pytest.approx(sum(naive(log_p, log_q)), rel=1e-5)


@pytest.mark.parametrize("n_kept", [3, 12])
def test_equal_predictions_have_no_drift(n_kept):
    log_p = distributions()

    assert divergence(likeliest(log_p, n_kept), log_p).tolist() == [0.0] * len(log_p)


def test_a_token_that_the_expert_excludes_adds_nothing_and_one_that_only_the_merge_excludes_all():
    one = torch.tensor([[0.5, 0.5, 0.0]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25]]).log()

    assert divergence(likeliest(one, 3), other).tolist() == pytest.approx([0.5 * math.log(2)])
    assert divergence(likeliest(other, 3), one).tolist() == [math.inf]


def test_predictions_of_several_texts_are_joined_in_order():
    log_p = distributions()
    parts = [likeliest(log_p[:3], 4), likeliest(log_p[3:], 4)]

    whole = joined(parts)

    assert whole.tokens.tolist() == likeliest(log_p, 4).tokens.tolist()
    assert torch.equal(whole.rows(3, 7).log_rest, parts[1].log_rest)
    assert torch.equal(whole.rows(3, 7).log_probabilities, parts[1].log_probabilities)
    assert joined([likeliest(log_p, 12)]).named().keys() == {"log_probabilities"}


def test_every_token_of_a_text_but_the_first_is_predicted_whatever_it_is_batched_with():
    model = load_model(zoo_folder() / "expert-reverse", "cpu", "expert")
    texts = ((5, 6, 7, 8, 9), (7, 9), (4, 5, 6))
    tokens = CalibrationTokens(texts, (0, 1, 2), 3, 0, 0, "zoo")

    found = [*log_probabilities(model, tokens, model.config.vocab_size)]

    assert [len(one) for one in found] == [4, 2, 1]  # the longest text first
    for ids, log_p in zip(sorted(texts, key=len, reverse=True), found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
        assert torch.allclose(log_p, alone, atol=1e-5)
