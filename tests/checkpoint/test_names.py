import time

import pytest

from lewis_hub.checkpoint import names


@pytest.mark.parametrize(
    ("name", "block", "component", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj", None),
        ("model.layers.12.mlp.experts.5.w1.weight", 12, "mlp.experts.5.w1", None),
        ("transformer.h.0.attn.c_attn.bias", 0, "attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("h.7.ln_1.weight", 7, "ln_1", "h.7.ln_1"),
        ("model.embed_tokens.weight", None, "model.embed_tokens", "model.embed_tokens"),
        ("model.layers.1.mixer.A_log", 1, "mixer.A_log", "model.layers.1.mixer.A_log"),
    ],
)
def test_a_name_says_block_component_and_module(name, block, component, module):
    assert names.block(name) == block
    assert names.component(name) == component
    assert names.module(name) == (module or name.removesuffix(".weight"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.5.w1", "model.layers.12.mlp.experts.5.w1"),
        ("h.0.ln_1.weight", "h.12.ln_1.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_of_another_block_differs_in_the_first_number(name, expected):
    assert names.renumbered(name, 12) == expected


def test_a_number_without_end_is_no_block():
    name = f"model.layers.{'9' * 5000}.q.weight"  # Python converts at most 4300 digits

    assert names.block(name) is names.stack(name) is None
    assert names.renumbered(name, 1) == name


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight", "wpe.weight"],
)
def test_embeddings_come_before_the_blocks(name):
    assert names.is_input_side(name)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.norm.weight", "embed_out.weight", "model.layers.0.embed.weight"],
)
def test_norms_heads_and_blocks_do_not(name):
    assert not names.is_input_side(name)


def test_towers_are_stacks_of_their_own():
    assert names.stack("vision.layers.3.a") == "vision.layers"
    assert names.stack("text.layers.3.a") == "text.layers"
    assert names.stack("norm.weight") is None


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "lm_head.bias", "model.lm_head.weight", "embed_out.weight"]
)
def test_heads_are_told_by_their_names(name):
    assert names.is_head(name)


@pytest.mark.parametrize(
    "name", ["model.layers.0.lm_head.weight", "model.embed_tokens.weight", "lm_headless.w"]
)
def test_other_tensors_are_no_heads(name):
    assert not names.is_head(name)


@pytest.mark.parametrize(
    "name",
    ["wpe.weight", "bert.embeddings.position_embeddings.weight", "pos_embed", "score.weight"],
)
def test_positions_and_labels_are_no_tokens(name):
    assert not names.may_have_tokens(name)
    assert not names.is_token_embedding(name)


def test_token_embeddings_are_told_by_their_names():
    assert names.is_token_embedding("transformer.wte.weight")
    assert names.may_have_tokens("shared.weight")
    assert not names.is_token_embedding("shared.weight")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.experts.12.up_proj.weight", "mlp.experts.*.up_proj"),
        ("decoder.block.1.layer.2.mlp.experts.expert_0.wi", "layer.2.mlp.experts.expert_*.wi"),
        ("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("h.0.mlp.2.weight", "mlp.2"),
    ],
)
def test_routed_experts_of_a_model_are_of_one_kind(name, kind):
    assert names.kind(name) == kind
    assert names.is_routed(name) == ("*" in kind)


TOWERS = {
    "language_model.lm_head.weight",
    "language_model.model.layers.0.self_attn.q_proj.weight",
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "gpt_neox.embed_in.weight",
}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lm_head.weight", "language_model.lm_head.weight"),
        (
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
        ),
        (
            "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        ),
    ],
)
def test_wrappers_may_stand_elsewhere_in_a_file(name, tensor):
    assert names.find(name, TOWERS) == [tensor]


def test_the_head_of_a_file_may_have_its_old_name():
    assert names.find("lm_head.weight", {"embed_out.weight", "gpt_neox.embed_in.weight"}) == [
        "embed_out.weight"
    ]


def test_another_block_or_component_is_not_found():
    assert names.find("model.language_model.layers.1.self_attn.q_proj.weight", TOWERS) == []
    assert names.find("model.language_model.layers.0.self_attn.k_proj.weight", TOWERS) == []


def test_the_nearest_of_very_many_names_is_not_looked_for():
    """It took 40 s among 20,000 names."""
    long = "a" * 199
    assert names.nearest(f"{long}b", [f"{long}c", "b"]) == f"{long}c"
    assert names.nearest("b", ["xyz"]) is None
    began = time.process_time()
    assert names.nearest(f"{long}b", [f"{long}{i}" for i in range(20_000)]) is None
    assert time.process_time() - began < 1


def test_very_many_names_are_found_among_very_many():
    """An adapter whose names lack a prefix took minutes: each was compared with all of the base."""
    tensors = {f"model.layers.{i % 60}.experts.{i // 60}.up.weight" for i in range(30_000)}
    known, began = names.TensorNames(tensors), time.process_time()

    for tensor in tensors:
        assert known.find(tensor.removeprefix("model.")) == [tensor]
        assert known.find(f"model.language_{tensor}") == [tensor]
    assert time.process_time() - began < 5
