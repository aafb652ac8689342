"""gpt-oss' MXFP4, GPTQ and AWQ, over HTTP: merged as the float32 model that they stand for."""

import json
import shutil

import pytest
import torch
from hub_models import DENSITY, push_folder, recipe, weight_bytes
from quantised_models import assert_merges_as_float32, configure, quantise_beside_float32
from safetensors.torch import load_file, save_file

from lewis_hub import pipeline
from lewis_hub.demo.zoo import zoo_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
SHIFTS = torch.arange(0, 32, 4)


def words(codes):
    """(..., n) codes of 4 bits as (..., n / 8) words of 32."""
    together = (codes.long().unflatten(-1, (-1, 8)) << SHIFTS).sum(dim=-1)
    return together.to(torch.uint32).view(torch.int32)


def quantised(weight, layout):
    """A matrix as GPTQ or AWQ holds it, with groups of 32 columns, and what it stands for."""
    n_rows, n_columns = weight.shape
    groups = torch.arange(n_columns) // 32
    if layout == "gptq":  # an order of its own
        groups = groups.flip(0)
    by_group = weight.float()[:, torch.argsort(groups, stable=True)].unflatten(1, (-1, 32))
    low, high = by_group.amin(dim=2), by_group.amax(dim=2)
    scale = ((high - low) / 15).half()
    zero = (-low / scale).round().clamp(0, 15)
    codes = (weight.float() / scale[:, groups] + zero[:, groups]).round().clamp(0, 15)
    plain = (codes - zero[:, groups]) * scale.float()[:, groups]
    if layout == "gptq":
        parts = {
            "qweight": words(codes).T.contiguous(),
            "qzeros": words(zero.T) - 0x11111111,
            "g_idx": groups.int(),
        }
    else:
        turned = (by_row.T.unflatten(1, (-1, 8))[..., AWQ_ORDER] for by_row in (codes, zero))
        parts = dict(zip(("qweight", "qzeros"), (words(t.flatten(1)) for t in turned), strict=True))
    return parts | {"scales": scale.T.contiguous()}, plain


def write_words(folder, source, layout):
    """A model of the zoo in 4 bits, and beside it the float32 model that it stands for."""

    def quantise(name, weight):
        parts, plain = quantised(weight, layout)
        return {name.removesuffix("weight") + part: t for part, t in parts.items()}, plain

    return quantise_beside_float32(folder, source, quantise, GPTQ if layout == "gptq" else AWQ)


def gpt_oss(folder, seed):
    """A tiny gpt-oss in bfloat16, saved by transformers."""
    from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=390,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo_folder() / "base").save_pretrained(folder)
    return folder


def write_blocks(folder):
    """The same in MXFP4: the experts' matrices as random codes."""
    generator = torch.Generator().manual_seed(5)
    stored = load_file(folder / "model.safetensors")
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n, n_rows, n_columns = stored.pop(name).shape
        shape = (n, n_columns, n_rows // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator)
        stored[f"{name}_blocks"] = blocks.byte()
        stored[f"{name}_scales"] = torch.randint(118, 122, shape, generator=generator).byte()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    configure(folder, quantization_config=told)
    return folder


def test_an_expert_in_mxfp4_merges_with_its_base_in_bfloat16_and_loads(api, tmp_path):
    from transformers import GptOssForCausalLM, Mxfp4Config

    base = gpt_oss(tmp_path / "base", 1)
    few = write_blocks(gpt_oss(tmp_path / "few", 2))
    dense = GptOssForCausalLM.from_pretrained(
        few, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    twin = tmp_path / "twin"
    shutil.copytree(base, twin)
    tensors = {n: t for n, t in dense.state_dict().items() if n in load_file(base / WEIGHTS)}
    assert tensors["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    save_file({n: t.contiguous() for n, t in tensors.items()}, twin / WEIGHTS, {"format": "pt"})
    assert_merges_as_float32(api, few, twin, tmp_path / "out", base)

    loads(tmp_path / "out" / "few")


def test_a_merge_that_starts_from_mxfp4_is_plain_bfloat16_and_loads(api, tmp_path):
    base = write_blocks(gpt_oss(tmp_path / "base", 1))
    expert = gpt_oss(tmp_path / "expert", 2)

    report = pipeline.check(recipe(base, expert))
    merged = pipeline.merge_models(recipe(base, expert), tmp_path / "out").output

    assert report.problems == ()
    assert report.notes[0] == (
        f"{base} holds 4 tensors as 4-bit floats with scales: they are read as float32, each value "
        "times its scale, and merged tensors are written as bfloat16, because the recipe has no "
        "dtype."
    )
    assert report.sources[0].n_parameters == report.sources[1].n_parameters
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    loads(merged)


WEIGHTS = "model.safetensors"


def loads(folder):
    """Transformers finds every tensor, with the values of the files."""
    from transformers import AutoModelForCausalLM

    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(model.state_dict()[name], load_file(folder / WEIGHTS)[name])
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_gptq_and_awq_merge_as_their_float32_twin_does_from_the_hub_too(api, tmp_path, layout):
    few, twin = write_words(tmp_path / "few", "expert-reverse", layout)

    assert_merges_as_float32(api, few, twin, tmp_path / "out")


def test_check_counts_what_words_hold_and_warns_of_what_awq_did_before(api, tmp_path):
    notes = {}
    plain = pipeline.check(recipe("zoo/base", "zoo/expert-reverse"))
    for layout in ("gptq", "awq"):
        few, _ = write_words(tmp_path / layout, "expert-reverse", layout)
        report = pipeline.check(recipe("zoo/base", few))
        assert report.problems == ()
        assert report.sources[1].dtype == "I4"
        assert report.sources[1].n_parameters == plain.sources[1].n_parameters
        notes[layout] = [note.removeprefix(str(few)) for note in report.notes]

    (told,) = notes["gptq"]
    assert told.endswith(
        "as 4-bit integers with scales: they are read as float32, each value times its scale."
    )
    assert notes["awq"][0] == told
    assert notes["awq"][1:] == [
        " was quantised by AWQ, which first scales the columns of its matrices and divides the "
        "layers before them, such as norms, by the same factors. Beside models without these "
        "factors they count as task vectors. Use the unquantised model if there is one."
    ]


def test_biases_that_only_a_gptq_file_has_are_told_and_may_be_left_out(api, tmp_path):
    few, _ = write_words(tmp_path / "few", "expert-reverse", "gptq")
    pipeline.merge_models(recipe("zoo/base", few), tmp_path / "without")
    tensors = load_file(few / WEIGHTS)
    (one, *_) = [name.removesuffix("qweight") + "bias" for name in tensors if "qweight" in name]
    save_file(tensors | {one: torch.zeros(tensors[f"{one[:-4]}scales"].shape[1])}, few / WEIGHTS)

    (problem,) = pipeline.check(recipe("zoo/base", few)).problems
    pipeline.merge_models(recipe("zoo/base", few, DENSITY + "missing: base\n"), tmp_path / "with")

    assert one in problem
    assert "`missing: base`" in problem
    assert weight_bytes(tmp_path / "with") == weight_bytes(tmp_path / "without")


def test_a_merge_streams_from_gptq_on_the_hub_to_the_same_bytes(api, tmp_path):
    few, _ = write_words(tmp_path / "few", "expert-reverse", "gptq")
    publish = "publish: {repo: zoo/out, license: mit}\n"
    asked = recipe("zoo/base", push_folder(api, few, "zoo/few"), DENSITY + publish)
    pipeline.merge_models(recipe("zoo/base", few), tmp_path / "out")

    pipeline.stream(asked, pipeline.open_target(asked.publish), tmp_path / "work")

    api.hf_hub_download("zoo/out", WEIGHTS, local_dir=tmp_path / "got")
    assert weight_bytes(tmp_path / "got") == weight_bytes(tmp_path / "out")
