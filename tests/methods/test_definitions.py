import torch

from lewis_hub.kernels.random_bits import below, halves
from lewis_hub.methods.averages import linear, task_arithmetic
from lewis_hub.methods.dare import dare_linear, dare_ties
from lewis_hub.methods.ties import ties

BASE = torch.full((3,), 10.0)
VECTORS = torch.tensor([[3.0, -1.0, 0.1], [1.0, 4.0, 0.2]])
ONES = torch.ones(2)


def test_linear_averages_the_models():
    models = torch.tensor([[1.0, 2.0], [5.0, 10.0]])

    assert linear(models, weights=torch.tensor([3.0, 1.0])).tolist() == [2.0, 4.0]


def test_linear_without_normalize_adds_them_up():
    models = torch.tensor([[1.0, 2.0], [5.0, 10.0]])
    weights = torch.tensor([3.0, 1.0])

    assert linear(models, weights=weights, normalize=False).tolist() == [8.0, 16.0]


def test_task_arithmetic_adds_the_weighted_task_vectors():
    merged = task_arithmetic(BASE, VECTORS, weights=torch.tensor([1.0, 0.5]), lambda_=2.0)

    assert torch.equal(merged, torch.tensor([17.0, 12.0, 10.0 + 2 * (0.1 + 0.1)]))


def test_task_arithmetic_normalizes_by_the_sum_of_weights():
    weights = torch.tensor([3.0, 1.0])

    merged = task_arithmetic(BASE, VECTORS * 4, weights=weights, normalize=True)

    assert merged[:2].tolist() == [20.0, 11.0]


def test_weights_that_add_up_to_nothing_are_not_divided_by():
    weights = torch.tensor([1.0, -1.0])

    merged = task_arithmetic(BASE, VECTORS, weights=weights, normalize=True)

    assert merged[:2].tolist() == [12.0, 5.0]


def test_ties_averages_only_the_sources_that_agree_with_the_elected_sign():
    merged = ties(BASE, VECTORS, weights=ONES, densities=[0.7, 0.7])

    # both positive: mean of 3 and 1 | 4 outvotes -1 | trimmed away in both sources
    assert merged.tolist() == [12.0, 14.0, 10.0]


def test_ties_weighs_votes_and_averages_by_the_weights_that_agree():
    merged = ties(BASE, VECTORS, weights=torch.tensor([6.0, 1.0]), densities=[0.7, 0.7])

    # (18 + 1) / 7 | -6 outvotes 4
    assert torch.equal(merged, BASE + torch.tensor([19.0 / 7, -1.0, 0.0]))


def test_a_drawn_vote_keeps_the_base_value():
    vectors = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])

    assert ties(BASE[:2], vectors, weights=ONES, densities=[1, 1]).tolist() == [10.0, 12.0]


def test_ties_without_normalize_adds_up_and_lambda_scales():
    options = {"normalize": False, "lambda_": 0.5}

    merged = ties(BASE, VECTORS, weights=ONES, densities=[1.0, 1.0], **options)

    assert torch.equal(merged, torch.tensor([12.0, 12.0, 10.0 + 0.5 * 0.3]))


def test_dare_rescales_what_its_bits_keep():
    base, vectors = torch.zeros(50), torch.ones(2, 50)
    kept = [torch.from_numpy((halves(s, 50) < below(0.25)).copy()) for s in (7, 8)]

    merged = dare_linear(base, vectors, weights=ONES, densities=[0.25, 0.25], streams=[7, 8])

    assert torch.equal(merged, 4.0 * kept[0] + 4.0 * kept[1])
    assert 0 < int((merged == 8).sum()) < 25


def test_dare_without_rescale_keeps_values_as_they_are():
    base, vectors = torch.zeros(50), torch.full((1, 50), 3.0)

    merged = dare_linear(
        base, vectors, weights=torch.ones(1), densities=[0.5], streams=[7], rescale=False
    )

    assert merged.unique().tolist() == [0.0, 3.0]


def test_dare_ties_elects_a_sign():
    base = torch.zeros(2)
    vectors = torch.tensor([[5.0, -1.0], [-2.0, -1.0]])

    merged = dare_ties(base, vectors, weights=ONES, densities=[1, 1], streams=[0, 1])

    assert merged.tolist() == [5.0, -2.0]


def test_density_zero_leaves_the_base():
    given = {"weights": ONES, "densities": [0.0, 0.0]}

    assert torch.equal(ties(BASE, VECTORS, **given), BASE)
    assert torch.equal(dare_ties(BASE, VECTORS, streams=[0, 1], **given), BASE)
    assert torch.equal(dare_linear(BASE, VECTORS, streams=[0, 1], **given), BASE)


def test_definitions_work_in_float64():
    base, vectors = BASE.double(), VECTORS.double() + 1e-12

    merged = ties(base, vectors, weights=ONES.double(), densities=[0.7, 0.7])

    assert merged.dtype == torch.float64
    assert merged[0] == 10.0 + (3.0 + 1e-12 + 1.0 + 1e-12) / 2
