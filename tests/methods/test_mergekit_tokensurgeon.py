"""New rows of embeddings are those of mergekit-tokensurgeon.

Needs mergekit 0.1.5 in an environment of its own, as test_mergekit.py. The models are float32, and
their tokenizers are byte-level, without padding and without letters beyond ASCII in new tokens:
docs/tokenizers.md says where the two differ.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lewis_hub.cli.main import cli

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here"),
]

COMMON = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "t"), ("Ġ", "a"), ("e", "r"), ("o", "n")]
MERGES = {
    "model": [*COMMON, ("r", "e"), ("in", "g"), ("Ġ", "the")],
    "donor": [*COMMON, ("Ġt", "o"), ("er", "s"), ("on", "s"), ("Ġa", "s"), ("in", "t"), ("s", "t")],
}
SPECIAL = {"model": ["<bos>", "<eos>"], "donor": ["<s>", "</s>"]}  # matched by their roles
ADDED = {"model": [], "donor": ["<|tool|>"]}
THEIRS = {"omp": "omp", "subtoken": "subword", "mean": "mean"}


def write_model(folder, name, width, *, tied):
    letters = [*SPECIAL[name], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = MERGES[name]
    words = [*letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    begin, end = SPECIAL[name]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end)
    fast.add_tokens(ADDED[name], special_tokens=True)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(width)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    changed = json.loads((folder / "tokenizer_config.json").read_text())
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"  # every version of transformers has it
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", THEIRS)
def test_the_rows_are_mergekits(tmp_path, method, tied):
    model = write_model(tmp_path / "model", "model", 32, tied=tied)
    donor = write_model(tmp_path / "donor", "donor", 24, tied=tied)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    program = Path(MERGEKIT).with_name("mergekit-tokensurgeon")
    options = ["--approximation-method", THEIRS[method], "--k", "6", "--quiet"]
    done = subprocess.run(
        [program, model, donor, theirs, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    words = [str(model), str(donor), "-o", str(ours), "--method", method, "--k", "6"]
    run = CliRunner().invoke(cli, ["transplant-tokenizer", *words, "--json"])

    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["copied"] == 2 + 256 + len(COMMON)
    found, expected = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    for config in (json.loads((one / "config.json").read_text()) for one in (ours, theirs)):
        assert config["vocab_size"] == len(found["model.embed_tokens.weight"])
