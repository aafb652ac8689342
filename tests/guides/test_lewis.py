from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lewis_hub.errors import GuideError
from lewis_hub.guides.lewis import dominance, importance_shifts, lewis
from lewis_hub.guides.registry import Measurements, find

Q, DOWN = "self_attn.q_proj", "mlp.down_proj"


def named(component: str, values: list[float]) -> dict[str, float]:
    return {f"model.layers.{b}.{component}": value for b, value in enumerate(values)}


def statistics(base: dict[str, float], expert: dict[str, float]) -> Measurements:
    return Measurements(matrices=(), base={"lewis": base}, expert={"lewis": expert})


def shifted(shifts: dict[str, float]) -> Measurements:
    """An expert that differs by `shifts` from a base without any importance: sign and size kept."""
    return statistics(dict.fromkeys(shifts, 0.0), shifts)


WORKED = statistics(
    base=named(Q, [10, 20, 30]) | named(DOWN, [1, 1, 1]),
    expert=named(Q, [11, 17, 36]) | named(DOWN, [1.5, 1, 0.5]),
)


def test_a_worked_example():
    # q_proj: |Δ| = 1 3 6, sum 10: .1 .3 .6     down_proj: |Δ| = .5 0 .5, sum 1: .5 0 .5
    assert importance_shifts(WORKED) == pytest.approx(
        named(Q, [0.1, 0.3, 0.6]) | named(DOWN, [0.5, 0, 0.5])
    )
    # min 0 to .3, max .6 to .8: density = .3 + .5 * share / .6, to four decimals
    assert lewis(WORKED, 0.3, 0.8) == (
        named(Q, [0.3833, 0.55, 0.8]) | named(DOWN, [0.7167, 0.3, 0.7167])
    )


def test_a_components_mean_share_is_one_in_the_number_of_blocks_however_many_it_has_of_it():
    shifts = named(Q, [1, 3]) | {
        "model.layers.0.mlp.experts.0.up_proj": 1.0,
        "model.layers.0.mlp.experts.1.up_proj": 2.0,
        "model.layers.1.mlp.experts.0.up_proj": 5.0,
        "model.layers.1.mixer.in_proj": 7.0,  # not in every block
    }

    # experts: |Δ| = 1 2 5, sum 8, one and a half a block; in_proj: half a one a block
    assert importance_shifts(shifted(shifts)) == named(Q, [0.25, 0.75]) | {
        "model.layers.0.mlp.experts.0.up_proj": 1 / 8 * 1.5,
        "model.layers.0.mlp.experts.1.up_proj": 2 / 8 * 1.5,
        "model.layers.1.mlp.experts.0.up_proj": 5 / 8 * 1.5,
        "model.layers.1.mixer.in_proj": 0.5,
    }


def test_blocks_that_differ_equally_get_the_midpoint():
    same = shifted(named(Q, [3, 3, 3]) | named(DOWN, [7, 7, 7]))

    assert lewis(same, 0.2, 0.6) == named(Q, [0.4] * 3) | named(DOWN, [0.4] * 3)


def test_an_expert_that_equals_the_base_gets_the_midpoint():
    base = named(Q, [1, 2, 3])

    assert lewis(statistics(base, dict(base)), 0.3, 0.8) == named(Q, [0.55] * 3)


def test_a_component_that_did_not_change_lies_at_gamma():
    mixed = shifted(named(Q, [0, 0, 0]) | named(DOWN, [1, 1, 2]))

    densities = lewis(mixed, 0.3, 0.8)

    assert {m: densities[m] for m in named(Q, [0, 0, 0])} == named(Q, [0.3] * 3)
    assert densities[f"model.layers.2.{DOWN}"] == 0.8


def test_gamma_equal_to_epsilon_is_that_density_everywhere():
    assert set(lewis(WORKED, 0.7, 0.7).values()) == {0.7}


def test_towers_are_apart():
    """A block's number and component may occur in an encoder and a decoder."""
    both = shifted(
        {"encoder.block.0.wo": 1, "encoder.block.1.wo": 3}
        | {"decoder.block.0.wo": 50, "decoder.block.1.wo": 50}
    )

    assert importance_shifts(both) == {
        "encoder.block.0.wo": 0.25,
        "encoder.block.1.wo": 0.75,
        "decoder.block.0.wo": 0.5,
        "decoder.block.1.wo": 0.5,
    }


blocks = st.integers(2, 6)
shift = st.floats(0, 1e6, allow_subnormal=False)
bounds = st.tuples(st.floats(0.01, 1, exclude_min=True), st.floats(0.01, 1, exclude_min=True)).map(
    lambda pair: (min(pair), max(pair))
)


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, float]:
    n = draw(blocks)
    return {
        f"model.layers.{b}.{component}": draw(shift) for component in (Q, DOWN) for b in range(n)
    }


@settings(deadline=None, max_examples=40)
@given(profiles(), bounds)
@example(  # the middle came out above the top
    {
        "model.layers.0.mlp.up": 110439.0,
        "model.layers.1.mlp.up": 157375.0,
        "model.layers.2.mlp.up": 319464.0,
    },
    (0.9999999999999999, 1.0),
)
def test_densities_span_exactly_gamma_to_epsilon(shifts, span):
    gamma, epsilon = span
    shares = importance_shifts(shifted(shifts))

    densities = lewis(shifted(shifts), gamma, epsilon)

    if len(set(shares.values())) == 1:
        assert set(densities.values()) == {(gamma + epsilon) / 2}
    else:
        assert min(densities.values()) == gamma
        assert max(densities.values()) == epsilon
    ranked = sorted(shares, key=lambda m: shares[m])
    assert all(densities[a] <= densities[b] for a, b in zip(ranked, ranked[1:], strict=False))


@settings(deadline=None, max_examples=40)
@given(profiles(), st.randoms(use_true_random=False))
def test_reordering_the_blocks_reorders_the_densities(shifts, random):
    n = len(shifts) // 2
    order = list(range(n))
    random.shuffle(order)
    move = {
        f"model.layers.{b}.{c}": f"model.layers.{order[b]}.{c}" for c in (Q, DOWN) for b in range(n)
    }

    moved = lewis(shifted({move[m]: shift for m, shift in shifts.items()}), 0.3, 0.8)

    plain = lewis(shifted(shifts), 0.3, 0.8)
    assert {move[m]: d for m, d in plain.items()} == moved


@settings(deadline=None, max_examples=40)
@given(profiles(), st.floats(1e-3, 1e3))
def test_the_scale_of_a_component_does_not_matter(shifts, scale):
    assume(all(s == 0 or s > 1e-100 for s in shifts.values()))
    scaled = {m: s * scale if m.endswith(Q) else s for m, s in shifts.items()}
    shares, again = importance_shifts(shifted(shifts)), importance_shifts(shifted(scaled))

    assert again == pytest.approx(shares, rel=1e-12)


def test_base_and_expert_of_different_architecture_are_refused():
    with pytest.raises(GuideError) as caught:
        lewis(statistics(named(Q, [1, 2]), named(Q, [1, 2, 3])), 0.3, 0.8)

    assert str(caught.value) == (
        "guide `lewis`: importance of model.layers.2.self_attn.q_proj is known for the"
        " expert only.\n"
        "Base and expert must be of one architecture."
    )


def test_a_block_that_sets_the_range_alone_is_named():
    massive = shifted(named(Q, [1, 1, 1, 1, 1, 1]) | named(DOWN, [1, 94, 1, 1, 2, 1]))

    [found] = dominance(massive)

    # q_proj lies at 1/6 everywhere, between 0.01 and 0.94: (.1667 - .01) / .93 = 17 %
    assert found == (
        "model.layers.1.mlp.down_proj alone sets the range: all other blocks lie in the lowest 17% "
        "of [gamma, epsilon]. A block with massive activations does this; the schedule then is "
        "close to gamma everywhere else."
    )


def test_a_schedule_that_several_blocks_span_has_no_warning():
    assert dominance(WORKED) == []
    assert dominance(shifted(named(Q, [2, 2, 2]))) == []
    assert dominance(shifted(named(Q, [1]) | named(DOWN, [0]))) == []  # one block only


def test_the_registered_guide_needs_importance():
    guide = find("lewis")

    assert guide.needs == ("lewis",)
    assert guide.decide(WORKED, 0.3, 0.8) == lewis(WORKED, 0.3, 0.8)
