"""28 configurations of mergekit, in the forms in which people publish them.

The models are tiny and in the folder `org` beside the configuration: a base, three fine-tunes of it
and two LoRA adapters, all in float32 with one tokenizer.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lewis_hub.demo.zoo import zoo_folder

CONFIGURATIONS = {
    "slerp of slices": """
slices:
  - sources:
      - model: org/math
        layer_range: [0, 6]
      - model: org/code
        layer_range: [0, 6]
merge_method: slerp
base_model: org/math
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "slerp of models": """
models:
  - model: org/math
  - model: org/code
merge_method: slerp
base_model: org/code
parameters:
  t: 0.4
  embed_slerp: true
dtype: float16
""",
    "passthrough, frankenmerge": """
dtype: float16
merge_method: passthrough
slices:
- sources:
  - model: org/math
    layer_range: [0, 4]
- sources:
  - model: org/code
    layer_range: [2, 6]
""",
    "passthrough, merge_method in slices": """
slices:
  - sources:
      - model: org/chat
        layer_range: [0, 3]
    merge_method: passthrough
  - sources:
      - model: org/chat
        layer_range: [2, 5]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
    merge_method: passthrough
merge_method: passthrough
dtype: bfloat16
""",
    "linear, weights": """
models:
  - model: org/math
    parameters:
      weight: 1.0
  - model: org/code
    parameters:
      weight: 0.3
  - model: org/chat
    parameters:
      weight: 0.5
merge_method: linear
parameters:
  normalize: 1.0
dtype: float16
""",
    "linear, lists of weights": """
models:
  - model: org/math
    parameters:
      weight:
        - filter: mlp
          value: [0.2, 0.8]
        - filter: self_attn
          value: [0.7, 0.1, 0.9]
        - value: 0.5
  - model: org/code
    parameters:
      weight: 0.5
merge_method: linear
dtype: bfloat16
""",
    "ties, gradients of density": """
models:
  - model: org/math
    parameters:
      density: [1, 0.75, 0.25]  # density gradient
      weight: 1.0
  - model: org/code
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]  # weight gradient
  - model: org/chat
    parameters:
      density: 0.25
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties, numbers for true": """
name: blend
models:
  - model: org/math
    parameters: {density: 0.5, weight: 0.5}
  - model: org/code
    parameters: {density: 0.5, weight: 0.3, normalize: 1.0}
merge_method: ties
base_model: org/base
parameters: {normalize: 0.0, int8_mask: 1.0, rescale: 0}
dtype: bfloat16
random_seed: 0
""",
    "dare_ties, base listed": """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/math
    parameters:
      density: 0.53
      weight: 0.4
  - model: org/code
    parameters:
      density: [0.7, 0.4]
      weight: 0.3
merge_method: dare_ties
base_model: org/base
parameters:
  int8_mask: true
  normalize: 1.0
dtype: bfloat16
random_seed: 0
""",
    "dare_linear": """
base_model: org/base
models:
  - {model: org/math, parameters: {weight: 0.5, density: 0.8}}
  - {model: org/code, parameters: {weight: 0.5, density: 0.6}}
merge_method: dare_linear
parameters: {lambda: 1.0, rescale: true}
dtype: bfloat16
""",
    "task_arithmetic, density": """
models:
  - model: org/math
    parameters:
      weight: 0.6
      density: 0.5
  - model: org/code
    parameters:
      weight: 0.4
      density: 0.5
merge_method: task_arithmetic
base_model: org/base
parameters:
  normalize: false
  int8_mask: true
dtype: bfloat16
""",
    "model_stock, weight": """
models:
  - model: org/math
    parameters: {weight: 0.5}
  - model: org/code
  - model: org/chat
merge_method: model_stock
base_model: org/base
parameters: {normalize: true}
dtype: bfloat16
""",
    "della": """
models:
  - model: org/math
    parameters: {density: 0.5, weight: 0.5, epsilon: 0.1}
  - model: org/code
    parameters: {density: 0.6, weight: 0.5, epsilon: 0.1}
merge_method: della
base_model: org/base
parameters: {normalize: true, int8_mask: true, lambda: 1.1}
dtype: bfloat16
""",
    "della_linear": """
models:
  - model: org/math
  - model: org/code
merge_method: della_linear
base_model: org/base
parameters: {density: 0.7, weight: 0.5, epsilon: 0.05, lambda: 1.0}
dtype: bfloat16
""",
    "breadcrumbs": """
models:
  - model: org/math
    parameters: {weight: 0.8, density: 0.875, gamma: 0.0625}
  - model: org/code
    parameters: {weight: 0.4, density: 0.75, gamma: 0.125}
merge_method: breadcrumbs
base_model: org/base
dtype: bfloat16
""",
    "breadcrumbs_ties, base_model of a slice": """
slices:
  - sources:
      - {model: org/base, layer_range: [0, 2]}
      - {model: org/math, layer_range: [0, 2]}
      - {model: org/code, layer_range: [0, 2]}
  - sources:
      - {model: org/chat, layer_range: [2, 6]}
      - {model: org/math, layer_range: [2, 6], parameters: {weight: 0.3}}
    base_model: org/chat
    parameters: {density: 0.5}
merge_method: breadcrumbs_ties
base_model: org/base
parameters: {weight: 0.7, density: 0.75, gamma: 0.125}
dtype: bfloat16
""",
    "sce": """
models:
  - model: org/math
  - model: org/code
  - model: org/chat
merge_method: sce
base_model: org/base
parameters:
  select_topk: 0.5
dtype: bfloat16
""",
    "nuslerp": """
models:
  - model: org/math
    parameters: {weight: 0.6}
  - model: org/code
    parameters: {weight: 0.4}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: 1}
dtype: bfloat16
""",
    "multislerp": """
models:
  - {model: org/math, parameters: {weight: 1.0}}
  - {model: org/code, parameters: {weight: 0.5}}
  - {model: org/chat, parameters: {weight: 0.5}}
merge_method: multislerp
dtype: bfloat16
""",
    "karcher": """
models:
  - model: org/math
  - model: org/code
  - model: org/chat
merge_method: karcher
parameters:
  max_iter: 1000
  tol: 1e-8
dtype: bfloat16
""",
    "arcee_fusion": """
models:
  - model: org/base
  - model: org/math
merge_method: arcee_fusion
base_model: org/base
dtype: bfloat16
""",
    "nearswap": """
models:
  - model: org/base
  - model: org/code
merge_method: nearswap
base_model: org/base
parameters:
  t:
    - value: 0.0001
dtype: bfloat16
""",
    "ram": """
models:
  - {model: org/math, parameters: {weight: 1.0}}
  - {model: org/code, parameters: {weight: 1.0}}
merge_method: ram
base_model: org/base
parameters: {epsilon: 0.01}
dtype: bfloat16
""",
    "ramplus_tl": """
models:
  - model: org/math
  - model: org/code
  - model: org/chat
merge_method: ramplus_tl
base_model: org/base
parameters: {epsilon: 0.02, r: 0.2, alpha: 0.3}
dtype: bfloat16
""",
    "tokenizer and chat template": """
models:
  - model: org/math
    parameters: {weight: 0.5}
  - model: org/code
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: org/base
dtype: bfloat16
out_dtype: float32
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    "<|extra|>":
      source: {kind: model_token, model: org/math, token_id: 5}
chat_template: chatml
""",
    "adapters on several bases": """
models:
  - model: org/base+org/lora-math
    parameters: {weight: 0.5, density: 0.5}
  - model: org/code+org/lora-code
    parameters: {weight: 0.5, density: 0.5}
merge_method: ties
base_model: org/chat+org/lora-math
parameters: {normalize: true}
dtype: float32
""",
    "several documents": """
name: first
models:
  - {model: org/math, parameters: {weight: 0.7}}
  - {model: org/base+org/lora-code, parameters: {weight: 0.3}}
merge_method: linear
dtype: float32
---
name: second
models: [{model: org/code}, {model: first}]
merge_method: slerp
base_model: org/code
parameters: {t: 0.3}
dtype: float32
---
models:
  - {model: first, parameters: {weight: 0.5}}
  - {model: second, parameters: {weight: 0.25}}
merge_method: task_arithmetic
base_model: org/base
dtype: bfloat16
""",
    "modules in float64": """
modules:
  default:
    slices:
      - sources:
          - {model: org/base, layer_range: [0, 6]}
          - {model: org/math, layer_range: [0, 6], parameters: {weight: 0.5}}
          - {model: org/code, layer_range: [0, 6], parameters: {weight: [0.25, 1]}}
    parameters: {density: 0.5}
merge_method: ties
base_model: org/base
parameters: {lambda: 0.9}
dtype: float64
out_dtype: float32
""",
}
RANDOM = ("dare_ties, base listed", "dare_linear", "della", "della_linear")  # other masks
# tensors after the blocks: there a gradient has its last value, and in mergekit its first
AFTER_BLOCKS = ("ties, gradients of density", "slerp of slices", "modules in float64")
# entries of a tensor that may differ: a density between two blocks is rounded down in mergekit, and
# so are the divergences of entries whose importance is near the threshold
N_ROUNDED = {"ties, gradients of density": 3, "arcee_fusion": 3}
N_TOKENS = {"tokenizer and chat template": 391}  # further rows are padding, zeros in mergekit


def write_models(folder: Path) -> Path:
    """Write the models into `folder/org`."""
    generator = torch.Generator().manual_seed(3)
    zoo = zoo_folder() / "base"
    base = {k: v.float() for k, v in load_file(zoo / "model.safetensors").items()}
    for name in ("base", "math", "code", "chat"):
        place = folder / "org" / name
        place.mkdir(parents=True)
        for file in zoo.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, place / file.name)
        config = json.loads((zoo / "config.json").read_text()) | {"dtype": "float32"}
        (place / "config.json").write_text(json.dumps(config))
        moved = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        tensors = base if name == "base" else moved
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    for name in ("lora-math", "lora-code"):
        _write_adapter(folder / "org" / name, base, generator)
    return folder


def _write_adapter(place: Path, base: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    place.mkdir()
    tensors = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "down_proj")):
            n_out, n_in = weight.shape
            for part, shape in (("lora_A", (4, n_in)), ("lora_B", (n_out, 4))):
                key = f"base_model.model.{module}.{part}.weight"
                tensors[key] = torch.randn(shape, generator=generator) / 8
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    modules = {"target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": "org/base"}
    (place / "adapter_config.json").write_text(json.dumps(told | modules))
