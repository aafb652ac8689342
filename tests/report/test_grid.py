from __future__ import annotations

from math import isnan, nan

from lewis_hub.report.profiles import arrange, clip, relative_change


def test_modules_stand_by_component_in_model_order_and_block():
    grid = arrange(
        {
            "model.embed_tokens.weight": 9.0,
            "model.layers.2.attn.q.weight": 3.0,
            "model.layers.2.mlp.up.weight": 4.0,
            "model.layers.10.attn.q.weight": 5.0,
        }
    )

    assert grid
    assert grid.components == ("attn.q", "mlp.up")
    assert grid.blocks == (2, 10)
    assert grid.values[0] == (3.0, 5.0)
    assert grid.values[1][0] == 4.0
    assert isnan(grid.values[1][1])
    assert grid.top == "model.layers.10.attn.q.weight"
    assert grid.known == (3.0, 4.0, 5.0)


def test_routed_experts_of_a_block_stand_together_with_their_mean():
    grid = arrange({f"layers.0.mlp.experts.{i}.up_proj": float(i) for i in range(4)})

    assert grid
    assert grid.components == ("mlp.experts.*.up_proj",)
    assert grid.values == ((1.5,),)
    assert grid.top == "layers.0.mlp.experts.3.up_proj"


def test_nothing_in_a_block_gives_no_grid():
    assert arrange({"lm_head.weight": 1.0, "layers.0.q.weight": nan}) is None


def test_too_many_components_or_blocks_to_draw_give_no_grid():
    """They would take a cell for each pair: 10^8 for these tensors."""
    assert arrange({f"layers.{i}.c{i}.weight": 1.0 for i in range(10_000)}) is None
    assert arrange({f"layers.{i}.q.weight": 1.0 for i in range(1001)}) is None
    grid = arrange({f"layers.{i}.q.weight": 1.0 for i in range(1000)})
    assert grid
    assert len(grid.blocks) == 1000


def test_change_is_relative_to_the_base_in_percent():
    change = relative_change({"layers.0.q": 12.0, "layers.1.q": 9.0}, {"layers.0.q": 10.0})

    assert change == {"layers.0.q": 20.0}


def test_change_from_nothing_is_unknown():
    assert isnan(relative_change({"layers.0.q": 1.0}, {"layers.0.q": 0.0})["layers.0.q"])


def test_without_a_base_importance_is_relative_to_the_components_mean():
    expert = {"layers.0.q": 1.0, "layers.1.q": 3.0, "layers.0.up": 50.0, "layers.1.up": 50.0}

    assert relative_change(expert, None) == {
        "layers.0.q": 50.0,
        "layers.1.q": 150.0,
        "layers.0.up": 100.0,
        "layers.1.up": 100.0,
    }


def test_the_scale_ends_at_the_highest_ordinary_value_and_names_what_lies_above():
    values = {f"layers.{i}.q": 1.0 + i / 100 for i in range(98)}
    grid = arrange(values | {"layers.98.q": 40.0, "layers.99.q": 90.0})

    assert grid
    found = clip(grid)

    assert found
    assert found.limit == 1.97
    assert found.percentile == 98.0
    assert (found.n_above, found.top, found.top_value) == (2, "layers.99.q", 90.0)


def test_values_of_one_magnitude_are_not_clipped():
    for values in ([1.0], [0.0, 0.0], [1.0, 2.0, 2.4], [float(i) for i in range(1, 60)]):
        grid = arrange({f"layers.{i}.q": value for i, value in enumerate(values)})
        assert grid
        assert clip(grid) is None
