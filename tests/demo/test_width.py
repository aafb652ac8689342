"""The models of the benchmark of merges of different width."""

import depth
import width
from alignment import load

import lewis_hub
from tests.demo.test_depth import logits


def test_a_model_with_more_units_and_blocks_has_the_outputs_that_it_had(tmp_path):
    base = load(lewis_hub.zoo_folder() / "base")

    grown = width.wider(depth.deeper(base), width.ALL)

    assert (grown.config.num_hidden_layers, grown.config.hidden_size) == (8, 192)
    apart = (logits(grown) - logits(base)).abs().max()
    assert apart < 0.01  # `rms_norm_eps` beside a mean over more units; logits go to 10
    grown.save_pretrained(tmp_path / "grown")
    own = dict(base.named_parameters())
    for name, tensor in width.of_first_units(tmp_path, "grown", 1.0).named_parameters():
        assert (tensor - own[name]).abs().max() < 1e-6, name
