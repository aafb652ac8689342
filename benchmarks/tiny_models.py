"""Tiny random checkpoints of any architecture in transformers, from its default configuration.

A configuration is made small by the names of its settings, with the same names for all
architectures. `OWN` contains the few architectures whose settings depend on each other in other
ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

N_TOKENS = 400  # of the vocabulary: the zoo's tokenizer has 390

SIZES: dict[str, int] = {}
for size, names in {
    N_TOKENS: """vocab_size text_vocab_size src_vocab_size tgt_vocab_size
        vocab_size_per_layer_input encoder_hash_byte_group_vocab unpadded_vocab_size""",
    2: """num_key_value_heads n_kv_heads kv_n_heads num_experts_per_tok moe_top_k moe_k n_group
        num_kv_heads multi_query_kv_heads top_k_experts num_experts_per_token moe_topk topk_group
        num_expert_group""",
    4: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        num_decoder_layers num_encoder_layers num_attention_heads n_head n_heads num_heads
        encoder_attention_heads moe_num_experts decoder_attention_heads num_experts
        num_local_experts n_routed_experts num_decoder_attention_heads attention_heads
        num_encoder_attention_heads linear_num_key_heads linear_num_value_heads num_blocks
        encoder_num_hidden_layers decoder_num_hidden_layers linear_num_heads""",
    16: """head_dim hidden_size_per_layer_input d_kv linear_key_head_dim linear_value_head_dim
        linear_head_dim qk_nope_head_dim v_head_dim q_lora_rank kv_lora_rank index_head_dim""",
    8: "qk_rope_head_dim state_size mamba_d_state index_n_heads ssm_state_size",
    64: """hidden_size n_embd d_model dim n_embed emb_dim embed_dim embedding_size lru_width
        mm_tokens_per_image projection_dim hidden_dim""",
    96: """intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size dff intermediate_dim
        mamba_intermediate_size shared_intermediate_size expert_ffn_hidden_size
        intermediate_size_mlp moe_shared_expert_intermediate_size""",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx",
}.items():
    SIZES |= dict.fromkeys(names.split(), size)

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
ROPE_BY_TYPE = {"full_attention": ROPE, "sliding_attention": ROPE}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
OWN: dict[str, dict[str, Any]] = {  # what a name alone does not tell
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_TYPE},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "codegen": {"rotary_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16, "num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "vocab_size": N_TOKENS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The default configuration of `model_type`, with small values for all known sizes."""
    default = transformers.CONFIG_MAPPING[model_type]()
    return type(default)(**_joined(_shrunk(default), OWN.get(model_type, {})))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The settings smaller than the default; lists with one entry per block follow."""
    told = config.to_dict()
    found: dict[str, Any] = dict(TOKENS)
    if told.get("decoder_start_token_id") is not None:
        found["decoder_start_token_id"] = 0
    for name, value in told.items():
        part = vars(config).get(name)
        if isinstance(part, PretrainedConfig):
            found[name] = _shrunk(part) | {"model_type": part.model_type}
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            found[name] = min(value, SIZES[name])
    if "qk_rope_head_dim" in found:  # what is called the head's, the rotary embedding has there
        found["head_dim"] = found["qk_rope_head_dim"]
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _joined(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(settings)
    for name, value in own.items():
        inner = found.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict)
        found[name] = _joined(inner, value) if both else value
    return found


def tiny_model(model_type: str, automatic: Any, seed: int = 0) -> PreTrainedModel:
    """A random model; `automatic` is the class of transformers that creates it."""
    torch.manual_seed(seed)
    model = automatic.from_config(tiny_config(model_type)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def fine_tuned(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Change every parameter of a model a little, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model
