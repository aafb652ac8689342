from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lewis_hub.calibration import forward
from lewis_hub.calibration.forward import NotAChainError, are_constant, enter, further_outputs
from lewis_hub.calibration.grams import DIAGONAL, WIDEST, GramRequest, read_grams, sum_of_squares
from lewis_hub.calibration.measure import gather_grams, measure_inputs
from lewis_hub.calibration.meta_model import build_meta_model
from lewis_hub.calibration.model import load_model
from lewis_hub.calibration.passes import BlockInputs, block_pass
from lewis_hub.calibration.subject import CalibrationSet, Snapshot, Subject, in_folder
from lewis_hub.calibration.texts import CalibrationTokens, TokenBatch
from lewis_hub.checkpoint.header import TensorHeader
from lewis_hub.errors import CalibrationModelError

from .conftest import ARCHITECTURES, LLAMA, tiny_model, tokens_of

WHOLE = "Calibrate it whole, where there is memory for it: leave out `--max-memory`."
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (  # layers that slide have masks and positions of their own
        "Gemma3TextConfig",
        {**LLAMA, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "mixtral": (  # experts that are fused in memory
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek": (  # the first block has no experts
        "DeepseekV3Config",
        {**LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 4},
    ),
}


@pytest.fixture
def any_architecture(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], PreTrainedModel]:
    for name, one in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, name, one)
    return tiny_model


def nothing(_: int) -> None:
    pass


@pytest.mark.parametrize("name", sorted(ARCHITECTURES | MORE))
def test_block_by_block_measures_exactly_what_a_whole_model_does(
    any_architecture, name, texts, saved
):
    folder = saved(any_architecture(name))
    long = tokens_of([list(range(3, 43)), list(range(9, 0, -1))])
    sets = [texts, long]

    blocks = measure_inputs(in_folder("tiny", folder), sets, "cpu", nothing)

    whole = measure_inputs(Snapshot("tiny", folder), sets, "cpu", nothing)
    assert [list(one) for one in blocks] == [list(one) for one in whole]
    assert blocks == whole


def test_of_two_tensors_that_become_one_parameter_the_same_counts_as_in_a_whole_model(
    llama, texts, saved
):
    folder = saved(llama)
    tensors = load_file(folder / "model.safetensors")
    one = "layers.1.mlp.up_proj.weight"
    save_file(tensors | {one: 2 * tensors[f"model.{one}"]}, folder / "model.safetensors")

    blocks = measure_inputs(in_folder("tiny", folder), [texts], "cpu", nothing)

    assert blocks == measure_inputs(Snapshot("tiny", folder), [texts], "cpu", nothing)


def test_nothing_of_a_block_is_in_memory_while_the_next_is_read(llama, texts, saved):
    weights, held = in_folder("tiny", saved(llama)), list[weakref.ref[Tensor]]()

    def parts(lists: Sequence[Sequence[TensorHeader]]) -> Generator[dict[str, Tensor], None, None]:
        read = weights.parts(lists)
        for _ in lists:
            assert [one for one in held if one()] == []
            yield next(read)

    def summarise(of: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, float]:
        held[:] = map(weakref.ref, of.values())
        return dict.fromkeys(norms, 0.0)

    measure_inputs(replace(weights, parts=parts), [texts], "cpu", nothing, summarise)

    assert len(held) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_computed_in_float32_as_they_are_whole(llama, texts, saved, dtype):
    folder = saved(llama.to(dtype))

    blocks = measure_inputs(in_folder("tiny", folder), [texts], "cpu", nothing)

    assert blocks == measure_inputs(Snapshot("tiny", folder), [texts], "cpu", nothing)


def test_one_block_has_its_weights_at_a_time_and_none_is_read_twice(llama, texts, saved):
    folder = saved(llama)
    present, outside = [], {"model.embed_tokens.weight", "model.norm.weight"}

    held = in_folder("tiny", folder)
    read: list[str] = []

    def parts(
        lists: Sequence[Sequence[TensorHeader]],
    ) -> Generator[dict[str, torch.Tensor], None, None]:
        for part in held.parts(lists):
            read.extend(part)
            yield part
            del part

    made = build_meta_model(replace(held, parts=parts), "cpu")

    def take(visits: Iterator[BlockInputs]) -> None:
        for _ in visits:
            loaded = {name for name, one in made.model.named_parameters() if not one.is_meta}
            assert outside < loaded
            inside = loaded - outside
            present.append({name.rpartition(".layers.")[2].split(".")[0] for name in inside})

    block_pass(made, [texts, texts], [sum_of_squares], nothing, take)
    left = [name for name, one in made.model.named_parameters() if not one.is_meta]

    assert present == [{"0"}, {"1"}, {"2"}]
    assert left == []
    stored = load_file(folder / "model.safetensors")
    assert sorted(read) == sorted(stored.keys() - {"lm_head.weight"})


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_a_model_of_experts_is_read_once_too(any_architecture, name, texts, saved):
    held, read = in_folder("tiny", saved(any_architecture(name))), list[str]()

    def parts(lists: Sequence[Sequence[TensorHeader]]) -> Generator[dict[str, Tensor], None, None]:
        for part in held.parts(lists):
            read.extend(part)
            yield part

    measure_inputs(replace(held, parts=parts), [texts, texts], "cpu", nothing)

    assert sorted(read) == sorted(held.checkpoint.tensors.keys() - {"lm_head.weight"})


@pytest.mark.parametrize("name", ["llama", "deepseek", "gemma3"])
def test_states_that_lie_on_the_disk_change_no_bit(
    any_architecture, name, texts, saved, monkeypatch, tmp_path
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    weights = in_folder("tiny", saved(any_architecture(name)), scratch)
    in_memory = measure_inputs(weights, [texts, texts], "cpu", nothing)

    monkeypatch.setattr(forward, "HELD_BYTES", 1)
    rolled, roll = [], SpooledTemporaryFile.rollover
    monkeypatch.setattr(
        SpooledTemporaryFile, "rollover", lambda file: (rolled.append(1), roll(file))
    )
    assert measure_inputs(weights, [texts, texts], "cpu", nothing) == in_memory
    assert rolled
    assert list(scratch.iterdir()) == []


def test_progress_tells_every_token_once(llama, texts, saved):
    told: list[int] = []

    measure_inputs(in_folder("tiny", saved(llama)), [texts], "cpu", told.append)

    assert sum(told) == texts.n_tokens
    assert min(told) >= 0


def refused(folder: Path, texts: CalibrationTokens) -> str:
    with pytest.raises(CalibrationModelError) as caught:
        measure_inputs(in_folder("me/tiny", folder), [texts], "cpu", nothing)
    return str(caught.value)


def test_an_encoder_decoder_is_refused(texts, saved):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **small)

    assert refused(saved(transformers.T5ForConditionalGeneration(config)), texts) == (
        f"me/tiny: an encoder-decoder cannot be calibrated block by block.\n{WHOLE}"
    )


def test_whoever_brings_the_weights_says_what_to_do_instead(texts, saved):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **small)
    weights = in_folder("me/tiny", saved(transformers.T5ForConditionalGeneration(config)))

    with pytest.raises(CalibrationModelError) as caught:
        measure_inputs(replace(weights, remedy="Do."), [texts], "cpu", nothing)

    assert str(caught.value) == (
        "me/tiny: an encoder-decoder cannot be calibrated block by block.\nDo."
    )


def test_blocks_that_share_weights_are_refused(texts, saved):
    small = {"vocab_size": 97, "hidden_size": 16, "num_attention_heads": 4, "n_mamba_heads": 2}
    small |= {"num_hidden_layers": 4, "num_mem_blocks": 1, "mamba_d_state": 4, "chunk_size": 4}
    config = transformers.Zamba2Config(
        **small, layers_block_type=["mamba", "hybrid"] * 2, intermediate_size=24
    )

    assert refused(saved(transformers.Zamba2ForCausalLM(config)), texts) == (
        f"me/tiny: its blocks share weights, so it cannot be calibrated block by block.\n{WHOLE}"
    )


def test_a_block_that_runs_several_times_is_refused_as_one_of_shared_weights(texts, saved):
    small = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 24}
    config = transformers.AlbertConfig(
        **small, vocab_size=97, num_attention_heads=4, num_hidden_layers=3
    )

    assert refused(saved(transformers.AlbertForMaskedLM(config)), texts) == (
        f"me/tiny: its blocks share weights, so it cannot be calibrated block by block.\n{WHOLE}"
    )


def chain(loop: Callable[[nn.ModuleList, torch.Tensor], object]) -> None:
    """Enter three blocks by a loop of its own."""
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    enter(list(blocks), TokenBatch(ids, ids), lambda _: loop(blocks, torch.ones(1, 2, 2)), None)


def twice(blocks, x):
    for block in blocks:
        x = block(block(x))


def backwards(blocks, x):
    for block in reversed(blocks):
        x = block(x)


def between(blocks, x):
    for block in blocks:
        x = block(x) + 1


def left_out(blocks, x):
    for block in blocks[:2]:
        x = block(x)


@pytest.mark.parametrize("loop", [twice, backwards, between, left_out])
def test_a_decoder_that_does_more_than_to_hand_on_hidden_states_is_no_chain(loop):
    with pytest.raises(NotAChainError):
        chain(loop)


def test_what_a_block_returns_beside_the_hidden_states_must_not_go_to_the_next():
    blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    ids, bias = torch.zeros(1, 2, dtype=torch.int64), torch.ones(2)

    def run(_: TokenBatch) -> None:
        x, extra = torch.ones(1, 2, 2), None
        for block in blocks:
            x, extra = block(x, extra)

    with pytest.raises(NotAChainError):
        enter(list(blocks), TokenBatch(ids, ids), run, (bias,))


class Biased(nn.Module):
    """A block that also returns a bias, the one that it is given or its own."""

    def __init__(self, *, depends: bool) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.depends = depends

    def forward(self, x, bias=None):
        x = torch.nn.functional.normalize(x, dim=-1)
        if bias is None:
            bias = x if self.depends else torch.arange(2.0)
        return self.own(x) + bias, bias


@pytest.mark.parametrize("depends", [False, True])
def test_a_bias_of_the_first_block_is_for_all_unless_it_depends_on_the_hidden_states(depends):
    blocks = nn.ModuleList(Biased(depends=depends) for _ in range(3))
    ids, x = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    batch, returned = TokenBatch(ids, ids), []

    def run(_: TokenBatch) -> None:
        hidden, bias = x, None
        for block in blocks:
            hidden, bias = block(hidden, bias)
        returned[:] = [hidden]

    rest = further_outputs(blocks, batch, run)

    assert are_constant(blocks, batch, run, rest) is not depends
    if not depends:
        hidden, calls = enter(list(blocks), batch, run, rest, is_constant=True)
        for call, block in zip(calls, blocks, strict=True):
            hidden, _ = call(block, hidden)
        run(batch)
        assert torch.equal(hidden, returned[0])


def test_each_block_keeps_what_it_was_called_with():
    blocks = [nn.Bilinear(2, 2, 2) for _ in range(2)]
    ids, x = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 2)
    masks = [torch.full((1, 2, 2), float(number)) for number in range(2)]

    def run(_: TokenBatch) -> None:
        hidden = x
        for block, mask in zip(blocks, masks, strict=True):
            hidden = block(input1=hidden, input2=mask)

    hidden, calls = enter(blocks, TokenBatch(ids, ids), run, None)
    assert hidden is x
    for call, block in zip(calls, blocks, strict=True):
        hidden = call(block, hidden)

    assert torch.equal(hidden, blocks[1](blocks[0](x, masks[0]), masks[1]))


def test_missing_weights_are_an_error_before_any_is_read(llama, texts, saved):
    folder = saved(llama)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert refused(folder, texts) == (
        "me/tiny: its files lack model.layers.1.mlp.up_proj.weight (and 0 more of the weights that"
        " its architecture needs).\n"
        "The config does not describe these files: check the source, or take another."
    )


def wanted_of(subject, folder, widest=WIDEST):
    return GramRequest(folder, widest, subject.gram_facts(widest))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("widest", [WIDEST, DIAGONAL])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_pass_that_measures_leaves_the_second_moments_of_a_pass_of_their_own(
    any_architecture, name, widest, saved, tmp_path
):
    folder = saved(any_architecture(name))
    padded = tokens_of([list(range(3, 43)), list(range(9, 0, -1))])
    subject = Subject("tiny", "abc", "expert", folder, (CalibrationSet({"seed": 1}, padded),))
    subject = replace(subject, weights=in_folder("tiny", folder))
    beside = wanted_of(subject, tmp_path / "beside", widest)

    found = measure_inputs(in_folder("tiny", folder), [padded], "cpu", nothing, request=beside)

    gather_grams(subject, wanted_of(subject, tmp_path / "alone", widest), "cpu", nothing)
    assert files_of(tmp_path / "beside") == files_of(tmp_path / "alone")
    assert found == measure_inputs(in_folder("tiny", folder), [padded], "cpu", nothing)


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_texts_that_run_without_padding_leave_no_second_moments(
    any_architecture, name, texts, saved, tmp_path
):
    folder = saved(any_architecture(name))
    subject = Subject("tiny", "abc", "expert", folder, (CalibrationSet({"seed": 1}, texts),))
    beside = wanted_of(subject, tmp_path / "beside")

    measure_inputs(in_folder("tiny", folder), [texts], "cpu", nothing, request=beside)

    assert read_grams(beside) is None
    assert not beside.folder.exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek"])
def test_second_moments_are_the_same_block_by_block(any_architecture, name, texts, saved, tmp_path):
    folder = saved(any_architecture(name))
    whole = Subject("tiny", "abc", "expert", folder, (CalibrationSet({"seed": 1}, texts),))

    blocks = replace(whole, weights=in_folder("tiny", folder))
    found = gather_grams(blocks, wanted_of(blocks, tmp_path / "blocks"), "cpu", nothing)

    assert found == gather_grams(whole, wanted_of(whole, tmp_path / "whole"), "cpu", nothing)


def test_second_moments_of_what_is_no_chain_are_gathered_whole_if_it_may_be(texts, saved, tmp_path):
    small = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **small)
    folder = saved(transformers.T5ForConditionalGeneration(config))
    whole = Subject("tiny", "abc", "expert", folder, (CalibrationSet({"seed": 1}, texts),))

    either = replace(whole, weights=in_folder("tiny", folder), may_be_whole=True)
    found = gather_grams(either, wanted_of(either, tmp_path / "either"), "cpu", nothing)

    assert found == gather_grams(whole, wanted_of(whole, tmp_path / "whole"), "cpu", nothing)


@pytest.mark.parametrize("told", [torch.float16, None])
def test_off_a_cpu_the_dtype_is_the_one_that_the_whole_model_has(llama, saved, told):
    folder = saved(llama.bfloat16())
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = told and "float16"  # the files have bfloat16
    (folder / "config.json").write_text(json.dumps(config))

    made = build_meta_model(in_folder("tiny", folder), "meta")

    whole = load_model(folder, "meta", "tiny")
    assert made.model.dtype == whole.dtype == (told or torch.bfloat16)
