"""Mixtures of experts have mergekit's parameters, once transformers has loaded both.

Needs mergekit 0.1.5 in an environment of its own, as test_mergekit.py. mergekit runs the base in
bfloat16, so rows from hidden states agree within its rounding.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from lewis_hub.cli.main import cli
from lewis_hub.demo.zoo import zoo_folder

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here"),
]

SIZES = {
    "vocab_size": 390,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
MIXTURE = """base_model: BASE
dtype: float32
experts:
- source_model: BASE
  positive_prompts: [reverse the word, "abc cba"]
- source_model: OTHER
  positive_prompts: ["shift each letter by one place"]
  negative_prompts: [reverse it, cba]
  residual_scale: 0.5
"""
SHARED = "shared_experts:\n- {source_model: OTHER, positive_prompts: [the words]}\n"


def dense_model(folder, kind, seed):
    config, model = KINDS[kind]
    torch.manual_seed(seed)
    model(config(**SIZES)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(zoo_folder() / "base" / name, folder / name)
    return folder


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
@pytest.mark.parametrize(("kind", "more"), [("llama", ""), ("qwen2", SHARED), ("qwen3", "")])
def test_the_parameters_are_mergekits(tmp_path, kind, more, mode):
    for seed, name in enumerate(("BASE", "OTHER")):
        dense_model(tmp_path / name, kind, seed)
    text = f"{MIXTURE}{more}gate_mode: {mode}\n"
    for name in ("BASE", "OTHER"):
        text = text.replace(f"model: {name}", f"model: {tmp_path / name}")
    config = tmp_path / "moe.yaml"
    config.write_text(text)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    command = [str(Path(MERGEKIT).with_name("mergekit-moe")), str(config), str(theirs)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    run = CliRunner().invoke(cli, ["merge", str(config), "-o", str(ours), "--no-eval"])

    assert run.exit_code == 0, run.output
    expected, found = (loaded(folder) for folder in (theirs, ours))
    assert found.keys() == expected.keys()
    routers = [name for name in found if name.endswith("gate.weight")]
    assert len(routers) == (6 if more else 3)
    for name, tensor in found.items():
        rounding = 0.02 if name in routers and mode == "hidden" else 1e-6
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=rounding)


def loaded(folder):
    auto = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.state_dict()
