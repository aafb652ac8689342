"""Where a method is defined as in mergekit, the numbers are mergekit's.

Needs mergekit 0.1.5 in an environment of its own: LEWIS_HUB_MERGEKIT is the path of its
`mergekit-yaml`. The checkpoint has float32 weights without ties and task vectors of the size of the
weights. Not compared, because the definitions differ:

- della, della_linear, and dare where anything is dropped: mergekit draws from one global seed.
- pcb, cabs: mergekit has none.
- what is in docs/mergekit.md: densities that leave part of an entry, drawn votes, SCE, Model Stock
  and Multi-SLERP on task vectors so small that mergekit's constants weigh in.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lewis_hub.cli.main import cli

MERGEKIT = os.environ.get("LEWIS_HUB_MERGEKIT", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MERGEKIT, reason="LEWIS_HUB_MERGEKIT is not set: no mergekit here"),
]

WIDTH, INNER, WORDS = 64, 128, 96
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": WORDS,
    "torch_dtype": "float32",
}
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
NAMES = {
    "model.embed_tokens.weight": (WORDS, WIDTH),
    **{f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in SHAPES.items()},
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (WORDS, WIDTH),
}

WEIGHED = "models: [{model: X, parameters: {weight: 0.7}}, {model: Y, parameters: {weight: 0.4}}]"
BASE_AND_TWO = "base_model: BASE\nmodels: [{model: X}, {model: Y}]\n"
BASE_AND_THREE = "base_model: BASE\nmodels: [{model: X}, {model: Y}, {model: Z}]\n"
BASE_AND_ONE = "base_model: BASE\nmodels: [{model: BASE}, {model: X}]\n"
WEIGHED_FROM_BASE = f"base_model: BASE\n{WEIGHED}\n"
FILTERED = (
    "t: [{filter: self_attn, value: [0, 0.5, 0.3]}, {filter: mlp, value: [1, 0.2]}, {value: 0.5}]"
)
OWN_BANDS = (
    "base_model: BASE\nmodels:\n"
    "- {model: X, parameters: {weight: 0.7, density: 0.5, gamma: 0.0625}}\n"
    "- {model: Y, parameters: {weight: 0.4, density: 0.25, gamma: 0.125}}\n"
)

CASES = {
    "linear": WEIGHED,
    "linear, added up": f"{WEIGHED}\nparameters: {{normalize: false}}",
    "task_arithmetic": f"{WEIGHED_FROM_BASE}parameters: {{lambda: 0.8}}",
    "ties": f"{WEIGHED_FROM_BASE}parameters: {{density: 0.25}}",
    "ties, added up": f"{WEIGHED_FROM_BASE}parameters: {{density: 0.5, normalize: false}}",
    "ties, rescaled": f"{WEIGHED_FROM_BASE}parameters: {{density: 0.25, rescale: true}}",
    "ties, one condition": (
        f"{WEIGHED_FROM_BASE}parameters: {{density: {{filter: mlp, value: 0.25}}}}"
    ),
    "dare_linear, nothing dropped": f"{WEIGHED_FROM_BASE}parameters: {{density: 1.0}}",
    "dare_ties, nothing dropped": f"{WEIGHED_FROM_BASE}parameters: {{density: 1.0}}",
    "breadcrumbs": OWN_BANDS,
    "breadcrumbs, rescaled": f"{OWN_BANDS}parameters: {{rescale: true}}",
    "breadcrumbs_ties, rescaled": f"{OWN_BANDS}parameters: {{rescale: true}}",
    "breadcrumbs, averaged": f"{OWN_BANDS}parameters: {{normalize: true, lambda: 0.6}}",
    "breadcrumbs, little room": f"{WEIGHED_FROM_BASE}parameters: {{density: 0.75, gamma: 0.5}}",
    "breadcrumbs_ties": OWN_BANDS,
    "sce": BASE_AND_THREE,
    "sce, selected": f"{BASE_AND_THREE}parameters: {{select_topk: 0.25, int8_mask: true}}",
    "slerp": f"{BASE_AND_ONE}parameters: {{t: 0.3}}",
    "slerp, base not listed": (
        "base_model: BASE\nmodels: [{model: X}]\n"
        "parameters: {t: [{filter: layers, value: [0.1, 0.8]}, {value: 0.5}]}"
    ),
    "slerp, filtered": f"{BASE_AND_ONE}parameters: {{{FILTERED}}}",
    "nuslerp": WEIGHED,
    "nuslerp, from a base": WEIGHED_FROM_BASE,
    "nuslerp, by rows": f"{WEIGHED}\nparameters: {{nuslerp_flatten: false}}",
    "nuslerp, by columns": (
        f"{WEIGHED_FROM_BASE}parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}"
    ),
    "multislerp": WEIGHED,
    "multislerp, from a base": WEIGHED_FROM_BASE,
    "multislerp, not normalized": f"{WEIGHED}\nparameters: {{normalize_weights: false}}",
    "karcher": "models: [{model: X}, {model: Y}, {model: Z}]",
    "karcher, one step": "models: [{model: X}, {model: Y}]\nparameters: {max_iter: 1, tol: 1.0e-4}",
    "model_stock": BASE_AND_THREE,
    "model_stock, by rows": f"{BASE_AND_TWO}parameters: {{filter_wise: true}}",
    "arcee_fusion": BASE_AND_ONE,
    "nearswap": f"{BASE_AND_ONE}parameters: {{t: 0.2}}",
    "ram": BASE_AND_THREE,
    "ram, few changes": f"{BASE_AND_THREE}parameters: {{epsilon: 0.5}}",
    "ramplus_tl": f"{BASE_AND_THREE}parameters: {{epsilon: 0.7, r: 0.4, alpha: 5.0}}",
    "della, nothing dropped": f"{WEIGHED_FROM_BASE}parameters: {{density: 1.0}}",
    "della_linear, nothing dropped": f"{WEIGHED_FROM_BASE}parameters: {{density: 1.0}}",
    "passthrough": "models: [{model: X}]",
    "passthrough, the base alone": "base_model: BASE\nmodels: [{model: BASE}]",
    "passthrough, scaled": (
        "models: [{model: X, parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.5}]}}]"
    ),
}


STACKS = {  # name -> (number of blocks, the configuration)
    "passthrough, stacked": (
        3,
        "slices:\n"
        "- sources: [{model: X, layer_range: [0, 2]}]\n"
        "- sources:\n"
        "  - model: Y\n"
        "    layer_range: [1, 2]\n"
        "    parameters: {scale: [{filter: layers.1.mlp, value: 0.5}, {value: 1.5}]}\n",
    ),
    "slerp, stacked": (
        4,
        "base_model: BASE\nslices:\n"
        "- sources: [{model: BASE, layer_range: [0, 2]}, {model: X, layer_range: [0, 2]}]\n"
        "  parameters: {t: [{filter: mlp, value: [0.2, 0.9]}]}\n"
        "- sources: [{model: Y, layer_range: [0, 2]}, {model: BASE, layer_range: [0, 2]}]\n"
        "parameters: {t: [{filter: layers, value: [0.1, 0.8]}, {value: 0.5}]}",
    ),
    "ties, stacked": (
        3,
        "base_model: BASE\nslices:\n"
        "- sources:\n"
        "  - {model: BASE, layer_range: [0, 1]}\n"
        "  - {model: X, layer_range: [1, 2], parameters: {weight: 0.7}}\n"
        "  parameters: {density: 0.5}\n"
        "- sources:\n"
        "  - {model: X, layer_range: [0, 2], parameters: {density: 0.25}}\n"
        "  - {model: Z, layer_range: [0, 2]}\n"
        "  base_model: Z\n"
        "parameters: {density: 0.75, weight: 0.4}",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
    for label in ("BASE", "X", "Y", "Z"):
        moved = {
            # all move partly the same way, as fine-tunes of one base do
            name: tensor
            + 0.3 * tensor.roll(1)
            + 0.5 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in base.items()
        }
        folder = root / label
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        tensors = base if label == "BASE" else moved
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return root


def merged(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_mergekits(models, tmp_path, case, out_dtype):
    expected = both(models, tmp_path, case, CASES[case], out_dtype)

    assert expected.keys() == NAMES.keys()


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", STACKS)
def test_stacks_of_blocks_are_mergekits(models, tmp_path, case, out_dtype):
    n_blocks, told = STACKS[case]

    expected = both(models, tmp_path, case, told, out_dtype)

    assert len(expected) == 3 + n_blocks * len(SHAPES)
    for side in ("theirs", "ours"):
        config = json.loads((tmp_path / side / "config.json").read_text())
        assert config["num_hidden_layers"] == n_blocks


def both(models, tmp_path, case, told, out_dtype):
    """Merge on both sides, and hold ours against theirs."""
    for label in ("BASE", "X", "Y", "Z"):
        told = told.replace(f"model: {label}", f"model: {models / label}")
    method = case.partition(",")[0]
    config = tmp_path / "config.yaml"
    config.write_text(f"merge_method: {method}\ndtype: float32\nout_dtype: {out_dtype}\n{told}\n")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    command = [MERGEKIT, str(config), str(theirs), "--no-copy-tokenizer", "--quiet"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    run = CliRunner().invoke(cli, ["merge", str(config), "-o", str(ours), "--no-eval"])

    assert run.exit_code == 0, run.output
    expected = merged(theirs)
    assert merged(ours).keys() == expected.keys()
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if out_dtype == "bfloat16":
        tolerance = {"rtol": 2**-7, "atol": 1e-6}  # one step where a sum lies at a rounding border
    for name, tensor in merged(ours).items():
        torch.testing.assert_close(tensor, expected[name], **tolerance)
    return expected
