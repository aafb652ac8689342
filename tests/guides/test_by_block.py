from __future__ import annotations

from lewis_hub.guides import activations, by_block


def nothing(_: int) -> None:
    pass


def test_block_by_block_measures_what_a_whole_model_does(model, texts, saved):
    folder = saved(model)

    whole = activations.measure(folder, "tiny", [texts], "cpu", nothing)
    blocks = by_block.measure(folder, "tiny", [texts], "cpu", nothing)

    assert [list(one) for one in blocks] == [list(one) for one in whole]
    assert blocks == whole
