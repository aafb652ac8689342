"""The numbers per item that stand behind a correlation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.embeddings import correlation_parts
from lewis_hub.evaluate.tasks import TaskSelection
from lewis_hub.tune.objective import Search, choose_split


def noisy(n, seed):
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=n)
    return expected, 0.6 * expected + generator.normal(size=n)


def test_the_parts_of_a_correlation_have_it_as_their_mean():
    expected, found = noisy(50, 1)
    expected[:10] = expected[0]  # ties

    parts = correlation_parts(expected, found)

    assert len(parts) == 50
    assert np.mean(parts) == pytest.approx(spearmanr(expected, found).statistic, abs=1e-12)


def test_their_standard_error_is_that_of_the_correlation():
    """The spread of the correlation over samples of the same population."""
    samples = [noisy(200, seed) for seed in range(300)]
    spread = np.std([spearmanr(*sample).statistic for sample in samples])

    errors = [np.std(correlation_parts(*sample), ddof=1) / np.sqrt(200) for sample in samples]

    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


def test_a_constant_has_no_correlation():
    assert correlation_parts([1.0, 1.0, 1.0], [0.1, 0.2, 0.3]) == []


def test_a_search_needs_a_language_model():
    with pytest.raises(EvaluationError) as caught:
        choose_split(Search(), TaskSelection(("STS12",), library="mteb"))

    assert str(caught.value) == (
        "evaluate: `backend: mteb` scores embeddings, but a search needs answers of a language "
        "model.\nGive the parameters yourself."
    )
