"""Architectures of mixtures of experts, and their `config.json` from that of a dense model.

Names on disk are those that published models of the architecture have; transformers reads them,
also where it keeps all experts of a block in one parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lewis_hub.errors import MergeError

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BLOCK = frozenset(  # components that blocks of all dense models have beside their MLPs
    {"input_layernorm.weight", "post_attention_layernorm.weight"}
    | {f"self_attn.{name}.weight" for name in ATTENTION}
)
QKV_BIAS = frozenset(f"self_attn.{name}.bias" for name in ATTENTION[:3])
NO_DENSE = (
    "Take dense models of one architecture: Llama or Mistral for Mixtral, Qwen3 for Qwen3-MoE, and "
    "Qwen2, Llama or Mistral with one shared expert for Qwen2-MoE."
)


@dataclass(frozen=True)
class Architecture:
    """A mixture-of-experts architecture of transformers, and how its tensors are called on disk."""

    name: str
    model_type: str
    class_name: str
    bases: tuple[str, ...]  # values of `model_type` of dense models that it can be made of
    has_shared: bool  # whether each block has exactly one shared expert
    mlp: str  # path of the mixture in a block
    projections: Mapping[str, str]  # of a dense MLP -> of a routed expert
    n_experts_key: str  # in `config.json`
    settings: Mapping[str, Any]  # further values of `config.json`
    inner_keys: tuple[str, ...]  # keys that get the width of the dense MLP
    further: frozenset[str]  # components of a block that the base may have beside BLOCK

    @property
    def router(self) -> str:
        """The component of a block that holds the router weights, (n_experts, hidden_size)."""
        return f"{self.mlp}.gate.weight"

    @property
    def shared_gate(self) -> str:
        """The component with the weight of the shared expert, (1, hidden_size)."""
        return f"{self.mlp}.shared_expert_gate.weight"

    def routed(self, number: int, projection: str) -> str:
        """The component that holds a matrix of a routed expert."""
        return f"{self.mlp}.experts.{number}.{self.projections[projection]}.weight"

    def shared(self, projection: str) -> str:
        """The component that holds a matrix of the shared expert."""
        return f"{self.mlp}.shared_expert.{projection}.weight"


SAME = {name: name for name in MLP}
ALL_BLOCKS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
MIXTRAL = Architecture(
    name="Mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    bases=("llama", "mistral"),
    has_shared=False,
    mlp="block_sparse_moe",
    projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    n_experts_key="num_local_experts",
    settings={},
    inner_keys=(),
    further=frozenset(),
)
QWEN2 = Architecture(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    bases=("qwen2", "llama", "mistral"),
    has_shared=True,
    mlp="mlp",
    projections=SAME,
    n_experts_key="num_experts",
    settings=ALL_BLOCKS,
    inner_keys=("moe_intermediate_size", "shared_expert_intermediate_size"),
    further=QKV_BIAS,
)
QWEN3 = Architecture(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    bases=("qwen3",),
    has_shared=False,
    mlp="mlp",
    projections=SAME,
    n_experts_key="num_experts",
    settings=ALL_BLOCKS,
    inner_keys=("moe_intermediate_size",),
    further=QKV_BIAS
    | {"self_attn.o_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight"},
)
ARCHITECTURES = (MIXTRAL, QWEN2, QWEN3)


def choose_architecture(
    model_types: Mapping[str, Any], asked: str | None, *, has_shared: bool
) -> Architecture:
    """The architecture of a mixture of models; `model_types` maps their labels to their types.

    `asked` is the beginning of a name, as mergekit writes it: mixtral, qwen, qwen3.

    Raises:
        MergeError: the models are of several architectures, or no mixture can be made of them.
    """
    kinds = list(dict.fromkeys(model_types.values()))
    if len(kinds) > 1:
        found = ", ".join(f"{label} is {kind}" for label, kind in model_types.items())
        raise MergeError("experts", f"the models are of several architectures: {found}", NO_DENSE)
    fitting = [one for one in ARCHITECTURES if kinds[0] in one.bases]
    if not fitting:
        raise MergeError("experts", f"no mixture is made of models of type `{kinds[0]}`", NO_DENSE)
    wanted = _letters(asked or "")
    named = [one for one in fitting if _letters(one.name).startswith(wanted)]
    if not named:
        listed = " or ".join(f"`{_letters(one.name)}`" for one in fitting)
        problem = f"`{asked}` cannot be made of models of type `{kinds[0]}`"
        raise MergeError("architecture", problem, f"Write {listed}, or leave it out.")
    chosen = [one for one in named if one.has_shared == has_shared]
    if not chosen:
        listed = " or ".join(one.name for one in named)
        number = "no shared expert" if has_shared else "exactly one shared expert"
        remedy = "Remove `shared_experts`." if has_shared else "Name a model in `shared_experts`."
        raise MergeError("shared_experts", f"{listed} has {number}", remedy)
    return chosen[0]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


# What transformers assumes where the `config.json` of a dense model is silent; a mixture's
# configuration would stand for other values.
SILENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8}
    | {"sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}
    | {"use_sliding_window": False},
}
SILENT_ALL = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
THETA = 10_000.0  # of rotary positions, if a configuration does not say


def mixture_config(
    kind: Architecture,
    label: str,
    config: Mapping[str, Any],
    n_experts: tuple[int, int],
    *,
    qkv_bias: bool,
) -> dict[str, Any]:
    """The `config.json` of the base, whose label is for messages, changed to that of a mixture.

    `n_experts` are the numbers of routed experts, and of those that each token passes.

    Raises:
        MergeError: it lacks a number that the mixture needs, or has blocks with and blocks without
            a sliding window, which the architecture does not have.
    """
    dense = _explicit(label, config)
    if kind is QWEN3 and dense["use_sliding_window"] and dense.get("sliding_window"):
        problem = f"{label} uses a sliding window in some blocks, which {kind.name} cannot"
        raise MergeError("base_model", problem, "Set `use_sliding_window` to false in a copy.")
    return {
        **dense,
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        kind.n_experts_key: n_experts[0],
        "num_experts_per_tok": n_experts[1],
        **kind.settings,
        **dict.fromkeys(kind.inner_keys, dense["intermediate_size"]),
        **({"qkv_bias": qkv_bias, **_windows(dense)} if kind is QWEN2 else {}),
    }


def _explicit(label: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A dense model's configuration with the values that its architecture implies."""
    needed = ("intermediate_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
    lacking = [key for key in needed if type(config.get(key)) is not int or config[key] < 1]
    if lacking:
        problem = f"its config.json has no whole number above 0 as `{lacking[0]}`"
        raise MergeError(label, problem, "Mend it, or use another `base_model`.")
    n_heads = config["num_attention_heads"]
    implied = {"num_key_value_heads": n_heads, "head_dim": config["hidden_size"] // n_heads}
    implied |= SILENT_ALL | SILENT[config["model_type"]]
    if "rope_theta" not in config and "rope_parameters" not in config:
        implied["rope_theta"] = THETA
    nothing = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is None]
    given = {key: value for key, value in config.items() if key not in nothing}
    return {**given, **{key: value for key, value in implied.items() if key not in given}}


def _windows(dense: Mapping[str, Any]) -> dict[str, Any]:
    """The attention windows of a dense model, block by block, in Qwen2's words."""
    if "layer_types" in dense:
        return {}
    window, n_blocks = dense.get("sliding_window"), dense["num_hidden_layers"]
    is_used = bool(window) and bool(dense.get("use_sliding_window", window is not None))
    first = dense.get("max_window_layers", 0) if is_used else n_blocks
    kinds = [
        "sliding_attention" if number >= first else "full_attention" for number in range(n_blocks)
    ]
    return {"use_sliding_window": is_used, "layer_types": kinds}
