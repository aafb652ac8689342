import pytest
import torch
import transformers

from lewis_hub.calibration.determinism import whole_shares
from lewis_hub.calibration.passes import measure_whole
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.methods.numerics import torch_threads

from .conftest import tokens_of


@pytest.mark.parametrize(
    ("widths", "available", "n_threads"),
    [
        ([4096, 14336], 64, 64),
        ([4096, 14336], 6, 4),
        ([576, 1536], 64, 2),  # 192 divides both: 2 torch_threads of 3 pairs
        ([896, 4864], 64, 4),
        ([100, 200], 8, 1),
        ([16], 8, 1),
        ([4096], 1, 1),
    ],
)
def test_every_thread_gets_whole_pairs_of_vectors(widths, available, n_threads):
    assert whole_shares(widths, available) == n_threads


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.fixture
def wide(saved):
    """A folder with a model that four torch_threads can share."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=390, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    return saved(transformers.LlamaForCausalLM(config))


def test_importance_is_the_same_to_the_last_bit_on_any_number_of_threads(wide):
    generator = torch.Generator().manual_seed(3)
    sets = [
        tokens_of([torch.randint(3, 390, (61,), generator=generator).tolist() for _ in range(23)])
    ]
    for folder in (zoo_folder() / "base", wide):
        found = []
        for n_threads in (1, 2, 3, 4, 5, 8):
            with torch_threads(n_threads):
                found.append(measure_whole(Snapshot("base", folder), sets, "cpu", lambda _: None))

        assert all(measured == found[0] for measured in found)
