import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AlbertConfig, AutoModelForCausalLM, AutoModelForMaskedLM, Zamba2Config

from lewis_hub.calibration import grams
from lewis_hub.calibration.grams import (
    DIAGONAL,
    WIDEST,
    GramRequest,
    part_width,
    read_grams,
    second_moments,
)
from lewis_hub.calibration.measure import gather_grams
from lewis_hub.calibration.subject import CalibrationSet, Subject
from lewis_hub.errors import OutputError

from .conftest import tiny_model


@pytest.fixture
def subject(saved, texts):
    def make(architecture="llama"):
        folder = saved(tiny_model(architecture))
        return Subject("tiny", "abc", "expert", folder, (CalibrationSet({"seed": 1}, texts),))

    return make


def wanted_of(subject, folder, widest=WIDEST):
    return GramRequest(folder, widest, subject.gram_facts(widest))


def gather(subject, folder, widest=WIDEST, advance=lambda _: None):
    return gather_grams(subject, wanted_of(subject, folder, widest), "cpu", advance)


def naive(model, texts, path):
    """One text at a time, one token at a time, in float64, at all uses of a weight."""
    seen = []
    weight = model.get_submodule(path).weight
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for module in model.modules()
        if getattr(module, "weight", None) is weight
    ]
    with torch.no_grad():
        for ids in texts.ids:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    rows = [row.double() for x in seen for row in x.reshape(-1, x.shape[-1])]
    total = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    return total / len(rows)


def stored(folder, found, module):
    gram = found.modules[module]
    return load_file(folder / gram.file)[gram.tensor]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_the_mean_outer_product_over_tokens(subject, texts, tmp_path, architecture):
    made = subject(architecture)
    model = tiny_model(architecture)

    found = gather(made, tmp_path / "grams")

    assert all(gram.n_tokens == texts.n_tokens for gram in found.modules.values())
    assert {gram.transposed for gram in found.modules.values()} == {architecture == "gpt2"}
    for module in found.modules:
        expected = naive(model, texts, module)
        (gram,) = stored(tmp_path / "grams", found, module).double()
        torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-5)


def test_modules_with_the_same_inputs_share_a_matrix_in_a_file_a_block(subject, tmp_path):
    found = gather(subject(), tmp_path)

    assert sorted(found.files) == [f"model.layers.{block}.safetensors" for block in range(3)]
    owners = {
        module.removeprefix("model.layers.1."): gram.tensor.removeprefix("model.layers.1.")
        for module, gram in found.modules.items()
        if gram.file == "model.layers.1.safetensors"
    }
    assert owners == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }


def test_several_passes_give_the_bytes_of_one(subject, tmp_path, monkeypatch):
    made, told = subject(), []
    whole = gather(made, tmp_path / "whole")
    monkeypatch.setattr(grams, "HELD_BYTES", 1)

    found = gather(made, tmp_path / "found", advance=told.append)

    assert found == whole
    assert sum(told) == made.n_tokens
    for file in whole.files:
        assert (tmp_path / "found" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_is_whole_is_read_again_and_nothing_else(subject, tmp_path):
    made = subject()
    wanted = wanted_of(made, tmp_path)
    assert read_grams(wanted) is None

    found = gather(made, tmp_path)

    assert read_grams(wanted) == found
    assert read_grams(wanted_of(made, tmp_path, DIAGONAL)) is None
    (tmp_path / "model.layers.2.safetensors").unlink()
    assert read_grams(wanted) is None


def test_the_bytes_are_the_same_on_any_number_of_threads(subject, tmp_path):
    made, before = subject(), torch.get_num_threads()
    digests = set()
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            digests.add(gather(made, tmp_path / str(n_threads)).digest)
    finally:
        torch.set_num_threads(before)

    assert len(digests) == 1


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 40),
    widest=st.integers(1, 40),
    n_tokens=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_long_inputs_are_cut_into_equal_parts(n, widest, n_tokens, seed):
    x = torch.randn(n_tokens, n, generator=torch.Generator().manual_seed(seed))

    found = second_moments(x, widest)

    width = part_width(n, widest)
    assert width <= widest
    assert found.shape == (n // width, width, width)
    whole = x.double().T @ x.double()
    for number, part in enumerate(found):
        inside = slice(number * width, (number + 1) * width)
        torch.testing.assert_close(part.double(), whole[inside, inside], rtol=1e-4, atol=1e-4)


def test_a_full_disk_is_said_and_nothing_half_written_stays(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            grams.write_tensors({"x": torch.ones(1000)}, tmp_path / "block.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/block.safetensors: it cannot be written (")
    assert "File too large" in said
    assert said.endswith("Free some space, then run again.")
    assert list(tmp_path.iterdir()) == []


SMALL = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
SHARED = {  # configuration, a module, and how often a text runs through it
    "albert": (
        AlbertConfig(**SMALL, embedding_size=16, num_hidden_layers=3, max_position_embeddings=64),
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
        3,
    ),
    "zamba2": (
        Zamba2Config(
            **SMALL,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid"] * 2,
            num_mem_blocks=1,
            n_mamba_heads=2,
            mamba_d_state=4,
            chunk_size=4,
        ),
        "model.layers.1.shared_transformer.feed_forward.down_proj",
        2,
    ),
}


@pytest.mark.parametrize("kind", sorted(SHARED))
def test_a_block_that_is_used_at_several_depths_has_the_moments_of_all_its_uses(
    tmp_path, texts, kind, monkeypatch
):
    config, module, n_uses = SHARED[kind]
    auto = AutoModelForCausalLM if kind == "zamba2" else AutoModelForMaskedLM
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(tmp_path / "model")
    subject = Subject(
        "tiny", "abc", "expert", tmp_path / "model", (CalibrationSet({"seed": 1}, texts),)
    )

    found = gather(subject, tmp_path / "grams")

    assert found.modules[module].n_tokens == n_uses * texts.n_tokens
    gram = stored(tmp_path / "grams", found, module)[0]
    model = auto.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(gram.double(), naive(model, texts, module), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(grams, "HELD_BYTES", 1)  # a pass for each block
    again = gather(subject, tmp_path / "again")
    assert torch.equal(stored(tmp_path / "again", again, module)[0], gram)
