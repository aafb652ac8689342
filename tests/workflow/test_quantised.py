"""Quantised models of the zoo, over HTTP: merged where they can be, otherwise refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hub_models import DENSITY, RECIPE, push_folder, recipe, weight_bytes
from quantised_models import assert_merges_as_float32, configure, quantise_beside_float32
from safetensors.torch import load_file, save_file

import lewis_hub
from lewis_hub import pipeline
from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import CheckFailedError, ExtractionError, SourceError
from lewis_hub.recipe.read import parse_recipe

GUIDE = """guide:
  calibration: {dataset: zoo/reverse, text: "{question} {answer}", samples: 2}
"""
DEEPSEEK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
}
INTEGERS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}},
        "group_1": {"weights": {"num_bits": 8, "type": "int"}, "format": "int-quantized"},
    },
}
NORMAL = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGURED = {  # layout -> its configuration
    "blocks": DEEPSEEK,
    "rows": COMPRESSED,
    "tensor": COMPRESSED,
    "fp8 tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "integers": INTEGERS,
    "4 bits": NORMAL,
}
FP8 = ["blocks", "rows", "tensor", "fp8 tensor"]


def eight_bit(weight, layout):
    """The weight as 8-bit floats, their scale under its name, and what they stand for."""
    spread = torch.ones_like(weight, dtype=torch.float32)
    if layout == "blocks":
        n_rows, n_columns = (-(-size // 128) for size in weight.shape)
        scale = torch.arange(1, 1 + n_rows * n_columns).view(n_rows, n_columns) / 1000
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
        parts = {"_scale_inv": scale}
    elif layout == "rows":
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
        spread = scale.expand_as(weight)
        parts = {"_scale": scale}
    else:
        scale = weight.float().abs().max().reshape(1) / 448
        spread = spread * scale
        parts = {"_scale": scale}
    values = (weight.float() / spread).to(torch.float8_e4m3fn)
    return {"": values} | parts, values.float() * spread


def grouped(weight):
    """The weight as packed integers of 4 bits, and what they stand for."""
    groups = weight.float().unflatten(1, (-1, 32))
    scale = groups.abs().amax(dim=2) / 7
    codes = (groups / scale[..., None]).round().clamp(-8, 7)
    shifts = torch.arange(0, 32, 4)
    words = ((codes.flatten(1).long() + 8).unflatten(1, (-1, 8)) << shifts).sum(dim=2)
    parts = {
        "weight_packed": words.to(torch.uint32).view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, (codes * scale[..., None]).flatten(1)


def by_rows(weight):
    """The weight as integers of 8 bits, and what they stand for."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    codes = (weight.float() / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def by_table(weight):
    """The weight as bitsandbytes' 4 bits in blocks of 64, and what they stand for."""
    table = torch.linspace(-1, 1, 16)
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(dim=1)
    codes = ((blocks / scale[:, None])[..., None] - table).abs().argmin(dim=-1)
    pairs = codes.view(-1, 2)
    state = json.dumps({"blocksize": 64, "shape": list(weight.shape)}).encode()
    parts = {
        "weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None],
        "weight.absmax": scale,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        ),
    }
    return parts, (table[codes] * scale[:, None]).view(weight.shape)


def write_integers(folder, source, layout):
    """A model of the zoo in integers or 4 bits, and beside it what it stands for."""

    def quantise(name, weight):
        loose = by_rows if "down_proj" in name else grouped
        parts, plain = (by_table if layout == "4 bits" else loose)(weight)
        return {name.removesuffix("weight") + part: t for part, t in parts.items()}, plain

    return quantise_beside_float32(folder, source, quantise, CONFIGURED[layout])


def write_model(folder, source, layout):
    """A model of the zoo in fp8, and beside it the float32 model that it stands for."""

    def quantise(name, weight):
        parts, plain = eight_bit(weight, layout)
        stored = {name + ending: tensor for ending, tensor in parts.items()}
        if layout.endswith("tensor"):
            stored[name.replace("weight", "input_scale")] = torch.ones(1)
        return stored, plain

    return quantise_beside_float32(folder, source, quantise, CONFIGURED[layout])


@pytest.mark.parametrize("layout", ["integers", "4 bits"])
def test_integers_and_4_bits_merge_as_their_float32_twin_does_from_the_hub_too(
    api, tmp_path, layout
):
    few, twin = write_integers(tmp_path / "few", "expert-reverse", layout)

    assert_merges_as_float32(api, few, twin, tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("integers", {"4-bit integers": "I4", "8-bit integers": "I8"}),
        ("4 bits", {"4-bit normal floats": "NF4"}),
    ],
)
def test_check_shows_integers_and_4_bits_and_a_guide_measures_them(api, tmp_path, layout, said):
    few, _ = write_integers(tmp_path / "few", "expert-reverse", layout)
    plain = pipeline.check(recipe())

    report = pipeline.check(recipe(expert=push_folder(api, few, "zoo/few")))
    measured = pipeline.calibrate(recipe(expert=few, more=GUIDE), tmp_path / "measured")

    assert report.problems == ()
    told = [note.partition(" tensors as ")[2] for note in report.notes]
    ending = " with scales: they are read as float32, each value times its scale."
    assert sorted(told) == [what + ending for what in sorted(said)]
    assert report.sources[1].dtype in said.values()
    assert report.sources[1].n_parameters == plain.sources[1].n_parameters
    assert set(measured.profile.sources[1].modules) == set(measured.profile.sources[0].modules)


@pytest.mark.parametrize("layout", FP8)
def test_an_fp8_expert_merges_as_its_float32_twin_does_from_the_hub_too(api, tmp_path, layout):
    fp8, twin = write_model(tmp_path / "fp8", "expert-reverse", layout)

    assert_merges_as_float32(api, fp8, twin, tmp_path / "out")


def test_a_merge_that_starts_from_fp8_is_plain_bfloat16_and_loads(api, tmp_path):
    from transformers import AutoModelForCausalLM

    fp8, twin = write_model(tmp_path / "fp8", "base", "blocks")
    (fp8 / "hf_quant_config.json").write_text("{}")
    pipeline.merge_models(recipe(base=fp8), tmp_path / "out")
    plain = recipe(base=twin, more=DENSITY + "dtype: bfloat16\n")
    pipeline.merge_models(plain, tmp_path / "twin")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(tmp_path / "twin" / "model.safetensors")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], wanted[name])
    assert model.dtype == torch.bfloat16


def test_check_shows_the_8_bit_floats_and_counts_no_scales(api, tmp_path):
    fp8, _ = write_model(tmp_path / "fp8", "base", "blocks")
    push_folder(api, fp8, "zoo/fp8")
    n_projections = sum(
        name.endswith("_proj.weight") for name in load_file(zoo_folder() / "base/model.safetensors")
    )

    report = pipeline.check(recipe(base="zoo/fp8"))
    plain = pipeline.check(recipe())

    assert report.problems == ()
    assert report.notes == (
        f"zoo/fp8 holds {n_projections} tensors as 8-bit floats with scales: they are read as "
        "float32, each value times its scale, and merged tensors are written as bfloat16, because "
        "the recipe has no dtype.",
    )
    assert report.sources[0].dtype == "F8_E4M3"
    assert report.sources[0].n_parameters == plain.sources[0].n_parameters
    assert report.output_bytes == plain.output_bytes
    assert report.disk_bytes == plain.disk_bytes
    assert report.sources[0].size_bytes < plain.sources[0].size_bytes
    told = pipeline.check(recipe(expert="zoo/fp8"))
    assert told.notes == (
        f"zoo/fp8 holds {n_projections} tensors as 8-bit floats with scales: they are read as "
        "float32, each value times its scale.",
    )
    shown = tmp_path / "recipe.yaml"
    shown.write_text(RECIPE.replace("BASE", "zoo/fp8").replace("EXPERT", "zoo/expert-reverse"))
    done = CliRunner().invoke(cli, ["check", str(shown)], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    assert "F8_E4M3" in done.stdout


@pytest.mark.slow
def test_a_guide_measures_fp8_models_as_what_they_are_in_bfloat16(api, tmp_path, stage_titles):
    fp8, _ = write_model(tmp_path / "fp8", "expert-reverse", "blocks")
    base, _ = write_model(tmp_path / "base", "base", "rows")
    plain = {}
    for name, model in (("base", base), ("fp8", fp8)):
        alone = (
            RECIPE.replace("ties", "linear")
            .replace("base_model: BASE\n", "")
            .replace("EXPERT", str(model))
        )
        plain[name] = tmp_path / f"{name}-plain"
        pipeline.merge_models(parse_recipe(alone, "recipe.yaml"), plain[name])
        shutil.rmtree(plain[name] / "lewis")
    said = stage_titles()

    measured = pipeline.calibrate(recipe(base, fp8, GUIDE), tmp_path / "one", progress=said)
    whole = pipeline.calibrate(recipe(plain["base"], plain["fp8"], GUIDE), tmp_path / "two")

    assert said.titles == [
        "Downloading",
        f"Writing out {base} in bfloat16",
        f"Writing out {fp8} in bfloat16",
        "Calibrating",
    ]
    assert [s.modules for s in measured.profile.sources] == [
        s.modules for s in whole.profile.sources
    ]
    output_bytes = pipeline.check(recipe()).output_bytes
    report = pipeline.check(recipe(base, fp8, GUIDE))
    assert report.disk_bytes == 3 * output_bytes


@pytest.mark.slow  # scores three models
def test_fp8_models_are_scored_as_what_they_are_in_bfloat16(api, tmp_path, stage_titles):
    fp8, _ = write_model(tmp_path / "fp8", "expert-reverse", "blocks")
    tasks = zoo_folder() / "tasks"
    more = f"{DENSITY}evaluate: {{tasks: [zoo_reverse], include: {tasks}, limit: 3}}\n"
    said = stage_titles()

    merged = pipeline.merge_models(recipe(expert=fp8, more=more), tmp_path / "out", None, said)

    assert list(merged.scores.tasks["zoo_reverse"].models)[1:] == [f"expert:{fp8}", "merged"]
    assert f"Writing out {fp8} in bfloat16" in said.titles


@pytest.mark.slow  # scores two models
@pytest.mark.parametrize("layout", ["blocks", "integers"])
def test_a_quantised_model_alone_is_scored_as_its_plain_copy(api, tmp_path, layout, stage_titles):
    write = write_integers if layout == "integers" else write_model
    few, twin = write(tmp_path / "few", "expert-reverse", layout)
    asked = lewis_hub.Evaluation(
        tasks=("zoo_reverse",), include=str(zoo_folder() / "tasks"), limit=8, compare=()
    )
    plain = pipeline.merge_models(
        parse_recipe(
            f"models: [{{model: {twin}}}]\nmerge_method: linear\ndtype: bfloat16\n", "recipe.yaml"
        ),
        tmp_path / "plain",
    ).output
    said = stage_titles()

    one, two = (
        lewis_hub.evaluate_model(lewis_hub.ModelReference(name=str(folder)), asked, None, said)
        for folder in (few, plain)
    )

    assert said.titles[1] == f"Writing out {few} in bfloat16"
    scores = [next(iter(s.tasks["zoo_reverse"].models.values())) for s in (one, two)]
    assert scores[0] == scores[1]


def test_an_adapter_is_extracted_from_fp8_as_from_its_float32_twin(api, tmp_path):
    fp8, twin = write_model(tmp_path / "fp8", "expert-reverse", "rows")

    for name, model in (("one", fp8), ("two", twin)):
        lewis_hub.extract_lora(model, "zoo/base", tmp_path / name, lewis_hub.LoraSettings(rank=2))

    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "two")


def test_a_scale_that_does_not_fit_is_told_before_any_download(api, tmp_path):
    fp8, _ = write_model(tmp_path / "fp8", "expert-reverse", "blocks")
    configure(fp8, quantization_config=DEEPSEEK | {"weight_block_size": [64, 64]})
    sha = api.repo_info(push_folder(api, fp8, "zoo/fp8")).sha

    with pytest.raises(lewis_hub.LewisHubError) as caught:
        pipeline.check(recipe(expert="zoo/fp8"))

    assert str(caught.value).startswith(f"zoo/fp8@{sha}: model.safetensors: `model.layers.0.")
    assert "neither by tensor, by row, by group, nor by blocks of [64, 64].\n" in str(caught.value)


REFUSED = "which this version does not read. Use the model that it was quantised from"
NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
METHODS = {  # quantization_config -> how it is told
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
    "gptq for marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "gptq, marlin in int32",
    ),
    "gptq in other words": (
        {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"},
        "gptq, gptq in int16",
    ),
    "awq for gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, gemv of 4 bits"),
    "hqq": ({"quant_method": "hqq"}, "hqq"),
    "compressed-tensors": (NVFP4, "compressed-tensors, nvfp4-pack-quantized"),
    "another": ({"bits": 3}, "unknown"),
}


def downloaded():
    return [path.name for path in Path(os.environ["HF_HOME"]).rglob("*.safetensors")]


@pytest.mark.parametrize("method", METHODS)
def test_every_other_method_is_one_problem_and_nothing_is_downloaded(api, tmp_path, method):
    folder = tmp_path / "model"
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    told, named = METHODS[method]
    configure(folder, quantization_config=told)
    push_folder(api, folder, "zoo/quantised")

    report = pipeline.check(recipe(expert="zoo/quantised"))

    assert report.problems == (f"zoo/quantised is quantised ({named}), {REFUSED}.",)
    with pytest.raises(CheckFailedError):
        pipeline.merge_models(recipe(expert="zoo/quantised"), tmp_path / "out")
    assert downloaded() == []


WITHOUT = {  # tensors beside the model's -> how they are told
    "GPTQ": ({"model.layers.0.mlp.up_proj.qweight": torch.int32}, ", as in GPTQ and AWQ"),
    "bitsandbytes": (
        {"model.layers.0.mlp.up_proj.weight.absmax": torch.float32},
        ", as in bitsandbytes",
    ),
    "int8": ({"model.layers.0.mlp.up_proj.weight": torch.int8}, " as I8"),
}


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("place", ["expert", "both"])
def test_a_quantised_model_does_not_slip_through_without_a_configuration(
    api, tmp_path, kind, place
):
    folder = tmp_path / "model"
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    added, said = WITHOUT[kind]
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(4, 4).to(dtype) for name, dtype in added.items()}
    save_file(tensors, folder / "model.safetensors")
    base = "zoo/base"
    if place == "both":
        base = shutil.copytree(folder, tmp_path / "base")

    problems = pipeline.check(recipe(base, folder)).problems

    how = f"it holds {next(iter(added))}{said}"
    refused = [base, folder] if place == "both" else [folder]
    assert problems == tuple(f"{one} is quantised ({how}), {REFUSED}." for one in refused)


def test_8_bit_floats_without_a_scale_are_refused(api, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")

    (problem, *_) = pipeline.check(recipe(expert=folder)).problems

    assert problem == (
        f"{folder} holds {name} as F8_E4M3, which this version does not read. "
        "Use the model in bfloat16, float16 or float32."
    )


@pytest.mark.parametrize(
    ("card", "config", "ending"),
    [
        ("base_model: org/whole\n", {}, ": its card names org/whole."),
        (
            "base_model: [org/whole]\nbase_model_relation: quantized\n",
            {},
            ": its card names org/whole.",
        ),
        ("base_model: org/old\nbase_model_relation: finetune\n", {}, "."),
        ("license: mit\n", {"_name_or_path": "org/whole"}, ": its config.json names org/whole."),
        ("license: mit\n", {"base_model": "org/whole"}, ": its config.json names org/whole."),
        ("license: mit\n", {"_name_or_path": "/home/me/whole"}, "."),
    ],
)
def test_the_refusal_names_what_the_model_was_made_from(api, tmp_path, card, config, ending):
    folder = tmp_path / "model"
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    configure(folder, quantization_config={"quant_method": "hqq"}, **config)
    (folder / "README.md").write_text(f"---\n{card}---\n")

    assert pipeline.check(recipe(expert=folder)).problems == (
        f"{folder} is quantised (hqq), {REFUSED}{ending}",
    )


def test_gguf_is_refused_with_the_model_that_it_was_made_from(api, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    (folder / "README.md").write_text("---\nbase_model: org/whole\n---\n")
    sha = api.repo_info(push_folder(api, folder, "zoo/gguf")).sha

    with pytest.raises(SourceError) as caught:
        pipeline.check(recipe(expert="zoo/gguf"))

    assert str(caught.value) == (
        f"zoo/gguf@{sha}: this repo has GGUF weights only.\n"
        "Use the safetensors model that they were quantised from: its card names org/whole."
    )


def test_extracting_an_adapter_from_a_quantised_model_is_refused(api, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo_folder() / "expert-reverse", folder)
    configure(folder, quantization_config={"quant_method": "hqq"})

    with pytest.raises(ExtractionError, match=r"is quantised \(hqq\)"):
        lewis_hub.extract_lora(folder, "zoo/base", tmp_path / "out", lewis_hub.LoraSettings(rank=2))
