"""The file of each architecture, read by transformers and by the package `gguf`."""

from __future__ import annotations

import json
import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from exported_models import CASES, LONGROPE, PIECES, build, planned, write
from safetensors.torch import load_file, save_file

from lewis_hub.errors import ExportError, SourceError

IDS = torch.tensor([[1, 5, 300, 40, 77, 123, 9, 200, 33, 64, 250, 31]])
# what transformers does not read from a GGUF file, but takes as a default
UNREAD = ("rope_parameters", "original_max_position_embeddings", "query_pre_attn_scalar")
NAMES = {  # ends of names in transformers -> ends of names in llama.cpp
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
GEMMA = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def read(file):
    """The values of all tensors in a file, and its fields."""
    found = gguf.GGUFReader(file)
    values = {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1])
        for one in found.tensors
    }
    types = {one.name: one.tensor_type.name for one in found.tensors}
    fields = {key: field.contents() for key, field in found.fields.items()}
    return values, types, fields


def mapped(name: str, case: str) -> str:
    """The name of a tensor in llama.cpp."""
    stem, end = name.rsplit(".", 1)
    names = GEMMA if case.startswith("gemma") else NAMES
    parts = stem.split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{names['.'.join(parts[3:])]}.{end}"
    return f"{names[stem]}.{end}"


def interleaved(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head."""
    size, found = len(rows) // n_heads, []
    for head in range(n_heads):
        for i in range(size // 2):
            found += [rows[head * size + i], rows[head * size + size // 2 + i]]
    return torch.stack(found)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_the_model_by_a_naive_mapping(case, tmp_path):
    folder = build(case, tmp_path)
    stored, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    values, types, _ = read(write(folder, "gguf:f16"))

    for name, tensor in stored.items():
        expected = tensor.float()
        if case in ("llama", "llama-3", "mistral"):
            if ".q_proj." in name:
                expected = interleaved(expected, config["num_attention_heads"])
            elif ".k_proj." in name:
                expected = interleaved(expected, config["num_key_value_heads"])
        if case.startswith("gemma") and name.endswith("norm.weight"):
            expected = expected + 1
        found = values.pop(mapped(name, case))
        assert (
            found.tolist() == expected.half().float().tolist()
            if expected.ndim > 1
            else (found.tolist() == expected.tolist())
        ), name
        assert types[mapped(name, case)] == ("F16" if tensor.ndim > 1 else "F32")
    extra = {"llama-3": ["rope_freqs.weight"]}
    extra |= {"phi3-long": ["rope_factors_long.weight", "rope_factors_short.weight"]}
    assert sorted(values) == extra.get(case, [])
    assert ("output.weight" in types) == (not config["tie_word_embeddings"])


def loaded(folder, file, **more: Any):
    """The model as transformers reads it from a GGUF file."""
    own = transformers.AutoConfig.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file.name)
    for key in UNREAD:
        if hasattr(own, key):
            setattr(config, key, getattr(own, key))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file.name,
        config=config,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits_from_the_file(case, tmp_path):
    # its reader leaves the biases of q and k as llama.cpp wants them
    folder = build(case, tmp_path, **({"attention_bias": False} if case == "llama" else {}))
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with torch.inference_mode():
        expected = own(IDS).logits
        found = loaded(folder, write(folder, "gguf:f16"))(IDS).logits
        coarse = loaded(folder, write(folder, "gguf:q8_0"))(IDS).logits

    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert 1e-4 < (coarse - expected).abs().max() < 0.1 * expected.abs().max()


def test_blocks_of_q8_0_are_within_half_a_step_of_the_weights(tmp_path):
    folder = build("qwen2", tmp_path, intermediate_size=72)  # rows of 72 are not whole blocks
    exact, _, _ = read(write(folder, "gguf:bf16"))
    values, types, fields = read(write(folder, "gguf:q8_0"))

    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"
    coarse = [name for name, kind in types.items() if kind == "Q8_0"]
    assert len(coarse) == 2 + 2 * 6
    for name in coarse:
        blocks, found = exact[name].reshape(-1, 32), values[name].reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - blocks) <= 0.5 * step * (1 + 1e-3) + 127 * step * 2**-11).all()
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


FIELDS: dict[str, dict[str, Any]] = {
    "llama-3": {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 128,
        "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 500.0, "llama.vocab_size": 416,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "general.file_type": 1,
        "tokenizer.chat_template": "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}",
    },
    "qwen3": {"qwen3.attention.key_length": 128, "qwen3.attention.value_length": 128},
    "gemma2": {
        "gemma2.attention.sliding_window": 8, "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0, "gemma2.attention.key_length": 16,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_space_prefix": True,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
    },
    "phi3-long": {
        "phi3.rope.scaling.original_context_length": 32, "phi3.rope.dimension_count": 16,
        "phi3.attention.sliding_window": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_the_fields_are_those_of_the_configuration_and_the_tokenizer(case, tmp_path):
    _, _, fields = read(write(build(case, tmp_path), "gguf:f16"))

    assert {key: fields[key] for key in FIELDS[case]} == FIELDS[case]
    assert len(fields["tokenizer.ggml.tokens"]) == 416
    assert ("tokenizer.ggml.merges" in fields) == (case not in PIECES)
    assert ("tokenizer.ggml.scores" in fields) == (case in PIECES)


def test_llama_3_divides_the_frequencies_of_long_waves(tmp_path):
    values, _, _ = read(write(build("llama-3", tmp_path), "gguf:f16"))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")

    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    assert values["rope_freqs.weight"] == pytest.approx((plain / scaled).numpy(), rel=1e-5)
    assert values["rope_freqs.weight"][[0, -1]].tolist() == [1.0, 8.0]


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.1386, "beta_fast": 32.0}])
def test_yarn_has_its_factor_and_the_context_before_it(more, tmp_path):
    _, _, fields = read(write(build("llama", tmp_path, rope_parameters=YARN | more), "gguf:f16"))

    found = {key: value for key, value in fields.items() if ".rope.scaling." in key}
    assert found == {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }


def test_longrope_has_both_lists_of_factors_and_their_scale(tmp_path):
    values, _, fields = read(write(build("phi3-long", tmp_path), "gguf:f16"))

    for name in ("long", "short"):
        expected = np.array(LONGROPE[f"{name}_factor"], np.float32)
        assert values[f"rope_factors_{name}.weight"].tolist() == expected.tolist()
    scale = math.sqrt(1 + math.log(128 / 32) / math.log(32))
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(scale)


def test_the_bytes_do_not_depend_on_the_shards_of_the_model(tmp_path):
    folder, sharded = build("llama", tmp_path / "a", hidden_size=640), tmp_path / "b"
    sharded.mkdir()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(sharded, max_shard_size="1MB")
    for file in folder.glob("*token*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    assert len([*sharded.glob("*.safetensors")]) > 2

    for export in ("gguf:f16", "gguf:q8_0"):
        again = write(sharded, export).read_bytes()
        (sharded / "chat_template.jinja").write_bytes((folder / "chat_template.jinja").read_bytes())
        assert write(folder, export).read_bytes() == write(sharded, export).read_bytes()
        assert len(again) < len(write(sharded, export).read_bytes())  # without the template
        (sharded / "chat_template.jinja").unlink()


def test_a_tensor_of_several_chunks_is_permuted_head_by_head(tmp_path):
    folder = build("mistral", tmp_path, hidden_size=640)  # 640 x 640 is more than a chunk
    stored = load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]

    values, _, _ = read(write(folder, "gguf:bf16"))

    expected = interleaved(stored.float(), 4)
    assert torch.equal(torch.from_numpy(values["blk.1.attn_q.weight"].copy()), expected)


@pytest.mark.parametrize(
    ("export", "value", "problem"),
    [
        ("gguf:f16", 131072.0, "holds 131072, and float16 ends at 65504"),
        ("gguf:q8_0", 16777216.0, "holds 1.67772e+07, and q8_0 ends at 8,319,008"),
    ],
)
def test_a_value_that_float16_cannot_store_is_refused_with_the_format_that_can(
    tmp_path, export, value, problem
):
    folder = build("qwen2", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(folder)

    with pytest.raises(ExportError) as raised:
        write(folder, export)

    assert str(raised.value).endswith(
        f"`blk.1.ffn_up.weight` {problem}.\nExport it as `gguf:bf16`."
    )
    assert read(write(folder, "gguf:bf16"))[0]["blk.1.ffn_up.weight"][3, 4] == value


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
REFUSED = {  # changes of the configuration -> the problem
    "an activation": ("llama", {"hidden_act": "gelu"}, "the activation is gelu"),
    "dynamic scaling": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "the rope type is dynamic",
    ),
    "a strength of yarn": (
        "llama", {"rope_parameters": YARN | {"attention_factor": 1.0}},
        "the attention_factor of yarn is 1, not 1.139",
    ),
    "two scales of yarn": (
        "llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        "the attention_factor of yarn is 1, not 1.139",
    ),
    "a ramp of yarn": (
        "qwen2", {"rope_parameters": YARN | {"beta_slow": 2}}, "the beta_slow of yarn is 2",
    ),
    "borders of yarn": (
        "qwen3", {"rope_parameters": YARN | {"truncate": False}},
        "the truncate of yarn is False",
    ),
    "a window": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8}, "it uses a sliding window",
    ),
    "a scale": (
        "gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, not 16",
    ),
    "other windows": (
        "gemma3", {"layer_types": ["full_attention"] * 7}, "not every 6. block has full attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_llama_cpp_would_run_differently_is_refused(name, tmp_path):
    case, changes, problem = REFUSED[name]
    folder = build(case, tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    with pytest.raises(ExportError, match="cannot run it as transformers does") as raised:
        planned(folder)

    assert f"does: {problem}.\n" in str(raised.value)
    assert "convert_hf_to_gguf.py" in str(raised.value)


def test_an_architecture_without_rules_is_refused_with_those_that_have_them(tmp_path):
    folder = build("llama", tmp_path)
    file = folder / "config.json"
    changes = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    with pytest.raises(ExportError) as raised:
        planned(folder)

    assert str(raised.value) == (
        f"{folder.name}: GGUF needs rules for its architecture (GPTNeoXForCausalLM), and there are "
        "only those of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
        "Gemma2ForCausalLM, Gemma3ForCausalLM, Phi3ForCausalLM.\n"
        "llama.cpp's own convert_hf_to_gguf.py knows more: "
        "https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py"
    )


def test_a_tensor_that_the_rules_do_not_know_is_refused(tmp_path):
    folder = build("qwen2", tmp_path)
    stored = load_file(folder / "model.safetensors")
    from safetensors.torch import save_file

    stored["model.layers.0.self_attn.gate.weight"] = torch.zeros(4, 4)
    save_file(stored, folder / "model.safetensors")

    with pytest.raises(ExportError, match=r"do not include its tensor `model\.layers\.0\.self_at"):
        planned(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 500},
        {"head_dim": 10**9},
        {"max_position_embeddings": 2**40},
        {"rms_norm_eps": "much"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}},
    ],
)
def test_a_configuration_that_does_not_fit_the_format_is_refused_in_time(wrong, tmp_path):
    folder = build("llama", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))

    with pytest.raises(ExportError):
        planned(folder)


@pytest.mark.parametrize(
    "shape", [(), (0,), (2, 3, 4)], ids=["a number", "nothing", "three dimensions"]
)
def test_a_tensor_that_does_not_fit_the_format_is_refused_in_time(shape, tmp_path):
    folder = build("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(shape)}, folder / "model.safetensors")

    with pytest.raises(ExportError):
        planned(folder)


def test_a_configuration_with_very_many_layers_is_refused_in_time(tmp_path):
    """transformers made a list of them, for minutes."""
    folder = build("qwen2", tmp_path)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**7}))

    with pytest.raises(SourceError, match="`num_hidden_layers` of its config.json is above"):
        planned(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, key, value):
    folder = build("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (config if key in config else config["rope_parameters"])[key] = value
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ExportError):
        planned(folder)
