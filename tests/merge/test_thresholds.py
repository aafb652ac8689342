"""A tensor is trimmed at its exact threshold, however that is found."""

import pytest
import torch

from lewis_hub.kernels.selection import Bracket
from lewis_hub.merge import tensor as trimming
from lewis_hub.merge.runners import Runner


def rows_unlike(n_rows, n_columns):
    """Half of the rows are as in the base: what fine-tuning leaves of rarely seen tokens."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n_rows, n_columns, generator=generator) * 0.02
    change = torch.randn(n_rows, n_columns, generator=generator) * 0.001
    change[:: n_rows // 64] = 0
    return base.bfloat16(), (base + change).bfloat16(), (base - 2 * change).float()


@pytest.mark.parametrize("density", [0.001, 0.3, 0.62, 0.9999])
def test_a_tensor_that_is_sampled_is_trimmed_as_the_definition_says(zoo, density):
    base, *experts = (
        zoo.source(str(i), {"a": tensor}, {"density": density} if i else {})
        for i, tensor in enumerate(rows_unlike(1031, 1030))
    )
    assert trimming.SAMPLED < 1031 * 1030
    asked = zoo.settings("ties", base, experts)

    merged = [
        zoo.merge(asked, f"out-{n}", runner=runner)
        for n, runner in enumerate((Runner(), Runner(3, large_elements=1000)))
    ]

    defined = zoo.by_definition(merged[0].plan)["a"]
    assert torch.equal(merged[0].tensors["a"].view(torch.uint8), defined.view(torch.uint8))
    assert merged[1].bytes == merged[0].bytes


def test_a_sample_that_misleads_costs_a_pass_and_no_byte(zoo, monkeypatch):
    monkeypatch.setattr(trimming.selection, "bracket", lambda *_: Bracket(1, 2, 0.01))
    base, expert, _ = rows_unlike(1031, 1030)
    sources = [zoo.source("base", {"a": base}), zoo.source("x", {"a": expert}, {"density": 0.4})]

    merged = zoo.merge(zoo.settings("ties", sources[0], sources[1:]))

    defined = zoo.by_definition(merged.plan)["a"]
    assert torch.equal(merged.tensors["a"].view(torch.uint8), defined.view(torch.uint8))
