from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from lewis_hub.calibration.model import check_on_gpus, load_model, placement, run_refusals
from lewis_hub.calibration.texts import check_padding
from lewis_hub.errors import CalibrationModelError, EmptyCalibrationError


def test_half_precision_files_are_computed_in_float32_on_a_cpu(llama, saved, capfd):
    folder = saved(llama.to(torch.bfloat16))
    capfd.readouterr()

    model = load_model(folder, "cpu", "me/tiny")

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert capfd.readouterr() == ("", "")
    kept = llama.model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, kept.float())


def refused(folder: Path) -> str:
    with pytest.raises(CalibrationModelError) as caught:
        load_model(folder, "cpu", "me/tiny")
    return str(caught.value)


def edit(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_own_code_is_never_run(llama, saved):
    folder = edit(
        saved(llama),
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (folder / "mine.py").write_text("raise SystemExit('own code ran')")

    assert refused(folder) == (
        "me/tiny: its model needs Python code from its repo, which is not run.\n"
        "Take a source that transformers supports by itself, or use guide `uniform`."
    )


def test_an_unknown_architecture_says_to_upgrade(llama, saved):
    assert refused(edit(saved(llama), model_type="llama99")) == (
        "me/tiny: this version of transformers does not know its architecture.\n"
        "Upgrade: pip install -U transformers."
    )


@pytest.mark.slow  # transformers imports every configuration to say so
def test_a_model_that_is_no_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))

    assert refused(tmp_path) == (
        "me/tiny: its architecture is no causal language model.\n"
        "Calibration measures decoders; merge it with guide `uniform` instead."
    )


def test_a_model_that_reads_no_tokens_is_refused(tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = ViTConfig(**small, num_hidden_layers=1, image_size=8, patch_size=4)
    ViTForImageClassification(config).save_pretrained(tmp_path)

    assert refused(tmp_path) == (
        "me/tiny: ViTForImageClassification reads no tokens.\n"
        "Calibration measures language models; merge it with guide `uniform` instead."
    )


def test_missing_weights_are_an_error_and_not_random_numbers(llama, saved):
    folder = saved(llama)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    assert refused(folder) == (
        "me/tiny: its files lack model.layers.1.mlp.up_proj.weight (and 0 more of the weights that"
        " its architecture needs).\n"
        "The config does not describe these files: check the source, or take another."
    )


def test_weights_of_another_shape_are_an_error(llama, saved):
    text = refused(edit(saved(llama), intermediate_size=25))

    assert text.startswith("me/tiny: ")
    assert text.endswith("\nCalibration loads a model with transformers; see what it needs above.")


def test_an_empty_folder_is_an_error(tmp_path):
    assert refused(tmp_path).startswith("me/tiny: ")


@pytest.mark.parametrize(
    ("device", "n_gpus", "asked"),
    [
        ("cpu", 4, None),
        ("cuda", 1, {"": "cuda"}),
        ("cuda", 4, "auto"),  # all of them
        ("cuda:1", 4, {"": "cuda:1"}),
        ("mps", 0, {"": "mps"}),
    ],
)
def test_cuda_alone_means_all_gpus(device, n_gpus, asked):
    assert placement(device, n_gpus) == asked


def test_a_model_that_gpus_have_no_room_for_is_refused():
    placed = {"model.embed_tokens": 0, "model.layers.0": 1}
    check_on_gpus("me/large", placed, "cuda")
    check_on_gpus("me/large", {"": "cpu"}, "cpu")

    for elsewhere in ("cpu", "disk"):
        with pytest.raises(CalibrationModelError) as caught:
            check_on_gpus("me/large", placed | {"model.layers.1": elsewhere}, "cuda")
        assert str(caught.value) == (
            "me/large: it is larger than the memory of all GPUs.\n"
            "Measure it block by block: `--max-memory 1GB`, or anything less than it takes."
        )


def test_parameters_lie_where_torch_puts_them_wherever_they_are_in_the_file(llama, saved):
    folder = saved(llama)  # in float32, so that a file that is mapped is not converted
    file = folder / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "more": "-" * 8})

    model = load_model(folder, "cpu", "me/tiny")

    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}
    assert all(torch.equal(p, llama.state_dict()[n]) for n, p in model.state_dict().items())


def of_transformers(model, error):
    """The model's own code raises when it runs."""

    def fail(*_args):
        raise error

    model.model.layers[0].register_forward_pre_hook(fail)
    with run_refusals("me/tiny", "guide `lewis`"):
        model(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            IndexError("list index\nout of range."),
            "me/tiny: guide `lewis` cannot measure it: IndexError: list index.\n"
            "Its own code fails so on calibration texts. Guides `uniform` and `magnitude`, and "
            "methods without statistics, run no model.",
        ),
        (
            NotImplementedError(),
            "me/tiny: guide `lewis` cannot measure it: NotImplementedError: no message.\n"
            "Its own code fails so on calibration texts. Guides `uniform` and `magnitude`, and "
            "methods without statistics, run no model.",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "me/tiny: guide `lewis` cannot measure it: there is not enough memory.\n"
            "Use a larger device, or measure it block by block: `--max-memory 1GB`.",
        ),
    ],
)
def test_what_a_models_code_raises_while_it_runs_names_model_guide_and_remedy(
    llama, error, message
):
    with pytest.raises(CalibrationModelError) as caught:
        of_transformers(llama, error)

    assert str(caught.value) == message
    assert caught.value.__cause__ is error


def test_our_own_messages_and_our_own_bugs_stay_what_they_are(llama):
    ours = EmptyCalibrationError("me/tiny", "no token", "Choose others.")

    with pytest.raises(EmptyCalibrationError) as caught:
        of_transformers(llama, ours)
    assert caught.value is ours
    with pytest.raises(KeyError, match="a bug"), run_refusals("me/tiny", "guide `lewis`"):
        raise KeyError("a bug")


def test_padding_has_to_end_where_positions_do():
    for n_positions in (None, 0, -1, 512, 1024):
        check_padding("me/tiny", 512, n_positions)

    with pytest.raises(CalibrationModelError) as caught:
        check_padding("me/tiny", 512, 511)

    assert str(caught.value) == (
        "me/tiny: guide `lewis_reference` pads every text to `max_tokens`, 512, and the model has "
        "511 positions.\nSet `max_tokens: 511`, or less, in the calibration."
    )
