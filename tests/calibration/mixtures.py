"""Tiny mixtures of experts, which transformers fuses in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import silu

from lewis_hub.calibration.texts import CalibrationTokens

from .conftest import LLAMA

N_EXPERTS = 4
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
LATENT = {  # of DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
# model type -> configuration; in the file: the experts' place, and gate, up, down
MIXTURES: dict[str, tuple[str, dict[str, Any], str, tuple[str, str, str]]] = {
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": N_EXPERTS, "num_experts_per_tok": 2},
        "block_sparse_moe.experts",
        ("w1", "w3", "w2"),
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**ROUTED, "num_experts": N_EXPERTS, "shared_expert_intermediate_size": 12},
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**ROUTED, **LATENT, "n_routed_experts": N_EXPERTS, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1},
        "mlp.experts",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}

GPT_OSS = {"num_local_experts": N_EXPERTS, "num_experts_per_tok": 2, "head_dim": 4}


def mixture(config_class: str, settings: dict[str, Any], folder: Path, seed: int = 0) -> Any:
    """A random model as it is loaded from a file of its own."""
    config = getattr(transformers, config_class)(
        **{**LLAMA, **settings}, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, experts_implementation="eager").eval()


def routed_tokens(model: Any, texts: CalibrationTokens) -> dict[tuple[int, int], list[Tensor]]:
    """(block, expert) -> the tokens that the router sends there, one text at a time."""
    found: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def see(block: int) -> Any:
        def hook(_: Any, args: Any, named: Any) -> None:
            tokens, chosen = (*args, *named.values())[:2]
            for token, experts in zip(tokens, chosen.tolist(), strict=True):
                for expert in experts:
                    found[block, expert].append(token)

        return hook

    for block, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(see(block), with_kwargs=True)
    with torch.no_grad():
        for ids in texts.ids:
            model(torch.tensor([ids]))
    return found


def inputs_of_experts(
    architecture: str, stored: Mapping[str, Tensor], routed: Mapping[tuple[int, int], list[Tensor]]
) -> Iterator[tuple[str, list[Tensor]]]:
    """The module of each matrix of each expert, and what it is multiplied with."""
    *_, place, (gate, up, down) = MIXTURES[architecture]
    for (block, expert), tokens in routed.items():
        at = f"model.layers.{block}.{place}.{expert}"
        gates, ups = stored[f"{at}.{gate}.weight"], stored[f"{at}.{up}.weight"]
        inner = [silu(gates @ x) * (ups @ x) for x in tokens]
        yield from ((f"{at}.{gate}", tokens), (f"{at}.{up}", tokens), (f"{at}.{down}", inner))
