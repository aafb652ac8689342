"""The architectures that can be written as GGUF, and what becomes of their tensors.

llama.cpp rotates neighbouring entries of a head in its `llama` models, transformers entry i and
i + d/2: the rows of each head of q and k change places. The norms of Gemma scale by 1 + weight in
transformers, and by the stored weight in llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.checkpoint.header import MERGEABLE, TensorHeader
from lewis_hub.checkpoint.reader import Checkpoint
from lewis_hub.errors import ExportError

WITH_CONVERTER = (
    "llama.cpp's own convert_hf_to_gguf.py knows more: "
    "https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py"
)
FLOATS = (*MERGEABLE, "F64")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
UNUSED = (".rotary_emb.inv_freq", ".masked_bias")  # ends of names of buffers in old checkpoints
ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(?:weight|bias)$")


@dataclass(frozen=True)
class Rules:
    """What llama.cpp does with the models of a class of transformers."""

    name: str  # of the architecture in llama.cpp
    model_type: str  # in transformers
    norm_shift: float = 0.0  # added to the weights of norms
    pairs_neighbours: bool = False  # whether it rotates neighbouring entries of q and k
    activations: tuple[str, ...] = ("silu", "swish")
    window_every: int | None = None  # every n-th block sees all tokens, the others a window
    # of the model whose attention is scaled by hidden size and heads, not by the size of a head
    blocks_of_largest: int | None = None


GELU = ("gelu_pytorch_tanh",)
ARCHITECTURES = {  # class of transformers -> rules
    "LlamaForCausalLM": Rules("llama", "llama", pairs_neighbours=True),
    "MistralForCausalLM": Rules("llama", "mistral", pairs_neighbours=True),
    "Qwen2ForCausalLM": Rules("qwen2", "qwen2"),
    "Qwen3ForCausalLM": Rules("qwen3", "qwen3"),
    "Gemma2ForCausalLM": Rules("gemma2", "gemma2", 1.0, activations=GELU, window_every=2,
                               blocks_of_largest=46),
    "Gemma3ForCausalLM": Rules("gemma3", "gemma3_text", 1.0, activations=GELU, window_every=6,
                               blocks_of_largest=62),
    "Phi3ForCausalLM": Rules("phi3", "phi3"),
}  # fmt: skip


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the file: `source` with some changes, or float32 `values`."""

    name: str  # in the file
    source: TensorHeader | None
    values: tuple[float, ...] = ()
    shift: float = 0.0  # added to each value
    n_heads: int = 0  # heads in whose rows the halves are interleaved; 0: rows stay in place

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, the slowest dimension first."""
        return self.source.shape if self.source else (len(self.values),)


def rules_for(label: str, config: Mapping[str, Any]) -> Rules:
    """Return the rules for a model by its `config.json`; an ExportError if there are none."""
    named = config.get("architectures")
    named = named[0] if isinstance(named, list) and named else None
    rules = ARCHITECTURES.get(named) if isinstance(named, str) else None
    if rules is None or config.get("model_type") != rules.model_type:
        known = ", ".join(ARCHITECTURES)
        problem = f"GGUF needs rules for its architecture ({named}), and there are only those of "
        raise ExportError(label, problem + known, WITH_CONVERTER)
    if "quantization_config" in config:
        remedy = "Merge or convert it to bfloat16 first."
        raise ExportError(label, "its weights are quantised", remedy)
    return rules


def export_tensors(
    checkpoint: Checkpoint, rules: Rules, config: Mapping[str, Any]
) -> tuple[ExportTensor, ...]:
    """Return the tensors of the file for a checkpoint, in the order of their blocks.

    Args:
        checkpoint: the headers of the model.
        rules: of its architecture.
        config: from `complete_config`.

    Raises:
        ExportError: the rules do not say what a tensor is, or the head or embeddings are missing.
    """
    import gguf

    tied, found = bool(config["tie_word_embeddings"]), []
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == rules.name)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for header in checkpoint.tensors.values():
        if header.name.endswith(UNUSED) or (tied and header.name == HEAD):
            continue
        name = names.get_name(key=header.name, try_suffixes=(".weight", ".bias"))
        if name is None or header.dtype not in FLOATS or header.is_computed:
            problem = f"the rules of llama.cpp's {rules.name} do not include its tensor "
            problem += f"`{header.name}` ({header.dtype})"
            raise ExportError(checkpoint.label, problem, WITH_CONVERTER)
        heads = _heads(header.name, config) if rules.pairs_neighbours else 0
        fits = len(header.shape) in (1, 2) and header.n_elements and _has_heads(header, heads)
        if not fits:
            problem = f"its config.json does not fit its tensor `{header.name}` of shape "
            problem += str([*header.shape])
            raise ExportError(checkpoint.label, problem, "Use an intact copy of the model.")
        shift = rules.norm_shift if name.endswith("_norm.weight") else 0.0
        found.append(ExportTensor(name, header, shift=shift, n_heads=heads))
    for name in (EMBEDDINGS, *(() if tied else (HEAD,))):
        if name not in checkpoint.tensors:
            problem = f"it has no tensor `{name}`"
            raise ExportError(checkpoint.label, problem, "Use an intact copy of the model.")
    return tuple(sorted(found, key=lambda tensor: [*_order(tensor.name)]))


def _heads(name: str, config: Mapping[str, Any]) -> int:
    rotated = ROTATED.search(name)
    if rotated is None:
        return 0
    return int(config["num_attention_heads" if rotated[1] == "q" else "num_key_value_heads"])


def _has_heads(tensor: TensorHeader, n_heads: int) -> bool:
    """Whether the rows are those of heads of an even size; without heads they may be any."""
    return not n_heads or (n_heads > 0 and tensor.shape[0] % (2 * n_heads) == 0)


def _order(name: str) -> Iterator[tuple[int, str]]:
    """The embeddings, the blocks by their numbers, then the rest."""
    first, *parts = name.split(".")
    yield (0 if first == "token_embd" else 1 if first == "blk" else 2), ""
    for part in parts:
        yield (int(part), "") if part.isdigit() else (0, part)
