import json
import math
import pickle

import pytest

from lewis_hub.checkpoint.lora import FOLD, read_config
from lewis_hub.errors import AdapterError

WHERE = "me/adapter@abc: adapter_config.json"
DAMAGED = "The file is damaged: use an intact copy."
# what PEFT 0.21 writes when nothing special was asked
PLAIN = {
    "peft_type": "LORA",
    "base_model_name_or_path": "me/base",
    "r": 16,
    "lora_alpha": 32,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "layer_replication": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
}


def read(**changes):
    return read_config(WHERE, json.dumps(PLAIN | changes).encode())


def refusal(text):
    with pytest.raises(AdapterError) as caught:
        read_config(WHERE, text)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


def test_alpha_is_divided_by_the_rank_or_by_its_root():
    assert read().scale("model.layers.0.self_attn.q_proj") == 2.0
    assert read(use_rslora=True).scale("model.layers.0.self_attn.q_proj") == 8.0


def test_the_first_pattern_that_fits_the_end_of_a_name_counts():
    config = read(
        rank_pattern={"layers.1.mlp.up": 4, "up": 8, r"layers\.\d+\.mlp\.down": 2},
        alpha_pattern={"mlp.up": 6},
    )

    ranks = [config.rank(f"model.layers.{i}.mlp.{m}") for i in (0, 1) for m in ("up", "down")]
    assert ranks == [8, 2, 4, 2]
    assert config.rank("model.layers.0.mlp.sup") == 16
    assert config.scale("model.layers.1.mlp.up") == 6 / 4
    assert config.scale("model.layers.1.mlp.down") == 32 / 2
    rooted = config.model_copy(update={"use_rslora": True})
    assert rooted.scale("model.layers.0.mlp.up") == 6 / math.sqrt(8)


@pytest.mark.parametrize("first", [True, False, "gaussian", "orthogonal", None])
def test_what_leaves_the_base_alone_at_the_start_is_read(first):
    assert read(init_lora_weights=first).r == 16


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, f"it is an adapter of type 'IA3'; only LORA is read.\n{FOLD}"),
        (
            {"init_lora_weights": "pissa"},
            "`init_lora_weights` is 'pissa', which changed the base's weights before training.\n"
            "Save it again with peft's `path_initial_model_for_weight_conversion`, which makes an "
            "ordinary LoRA of it.",
        ),
        ({"r": 0}, f"`r` is not what PEFT writes: Input should be greater than 0.\n{DAMAGED}"),
        (
            {"rank_pattern": {"(": 4}},
            "`rank_pattern` is not what PEFT writes: '(' is not a regular expression: missing ), "
            f"unterminated subpattern at position 0.\n{DAMAGED}",
        ),
        (
            {"bias": "some"},
            "`bias` is not what PEFT writes: Input should be 'none', 'all' or 'lora_only'.\n"
            + DAMAGED,
        ),
        *(
            (
                {key: value},
                f"`{key}` is set, and this version does not know how it changes weights.\n{FOLD}",
            )
            for key, value in {
                "layer_replication": [[0, 4], [2, 5]],
                "megatron_config": {"a": 1},
                "eva_config": {"rho": 2},
                "corda_config": {"a": 1},
                "loftq_config": {"loftq_bits": 4},
                "lora_bias": True,
                "trainable_token_indices": [0, 1],
                "target_parameters": ["mlp.experts.gate_up_proj"],
                "ensure_weight_tying": True,
                "use_qalora": True,
                "alora_invocation_tokens": [5],
                "of_a_later_peft": 1,
            }.items()
        ),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(changes, says):
    assert refusal(json.dumps(PLAIN | changes).encode()) == f"{WHERE}: {says}"


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_configuration_is_refused(text):
    assert refusal(text) == f"{WHERE}: it is not a JSON object.\n{DAMAGED}"
