"""Which tensors guides decide, by names; held against what calibration measures."""

from __future__ import annotations

import pytest
import transformers
from architectures import cases
from safetensors import safe_open
from tiny_models import tiny_model

from lewis_hub.calibration.measure import measure_inputs
from lewis_hub.calibration.subject import Snapshot
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.checkpoint import names
from lewis_hub.guides.schedule import block_matrices

INSIDE = {
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.gate.weight": (4, 64),
    "model.layers.0.mlp.experts.3.up_proj.weight": (96, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 64, 192),  # a stack, under a bare name
    "model.layers.0.block_sparse_moe.input_linear.weight": (4, 192, 64),
    "transformer.blocks.0.ffn.experts.mlp.w1": (384, 64),
    "model.layers.0.mixer.in_proj.weight": (256, 64),
    "model.layers.0.conv.in_proj.weight": (192, 64),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
}
OUTSIDE = {
    "model.embed_tokens.weight": (400, 64),
    "lm_head.weight": (400, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_norm.weight": (4, 16),
    "model.layers.0.mlp.experts.gate_up_proj_bias": (4, 192),
    "model.layers.0.mixer.conv1d.weight": (128, 1, 4),
    "model.layers.0.mixer.dt_proj.weight": (128, 4),
    "model.layers.0.mixer.A_log": (128, 16),
    "model.layers.0.ffn.gate.tid2eid": (400, 2),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 4),
    "visual.blocks.0.attn.qkv.weight": (192, 64),
    "visual.merger.mlp.0.weight": (64, 64),
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (96, 64),
    "model.audio_tower.layers.0.fc1.weight": (96, 64),
    "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1.weight": (96, 64),
    "model.multi_modal_projector.layers.0.linear.weight": (64, 64),
    "model.altup_projections.0.weight": (64, 64),  # a list of matrices has no blocks
    "model.layers.0.mlp.experts.4.up_proj.weight": (0, 64),  # without values
}


def test_matrices_of_the_blocks_that_texts_reach_are_told_by_name():
    assert block_matrices(OUTSIDE | INSIDE) == tuple(
        name.removesuffix(".weight") for name in INSIDE
    )


def test_attention_to_an_encoder_counts_where_there_is_one():
    decoder = {
        "model.decoder.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.decoder.layers.0.encoder_attn.q_proj.weight": (64, 64),
    }
    encoder = {"model.encoder.layers.0.self_attn.q_proj.weight": (64, 64)}

    assert block_matrices(decoder) == ("model.decoder.layers.0.self_attn.q_proj",)
    assert len(block_matrices(decoder | encoder)) == 3


OTHERWISE = {  # docs/architectures.md says why
    "led",
    "longcat_flash",
    "mllama",
    "prophetnet",
    "xlnet",
    "zamba2",
}


@pytest.mark.slow
def test_names_tell_what_lewis_measures_on_nearly_all_architectures(tmp_path):
    lengths = (60, 53, 47, 41)
    ids = tuple(
        tuple((13 * i * i + 7 * text) % 380 + 3 for i in range(length))
        for text, length in enumerate(lengths)
    )
    texts = CalibrationTokens(ids, (0, 1, 2, 3), 4, 0, 0, "t")
    n_agree, others = 0, set()
    for case in cases():
        folder = tmp_path / f"{case.model_type}-{case.automatic}"
        try:
            automatic = getattr(transformers, case.automatic)
            tiny_model(case.model_type, automatic).save_pretrained(folder)
            [measured] = measure_inputs(Snapshot("tiny", folder), [texts], "cpu", lambda _: None)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md has the reasons
            continue
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        seen = {(names.stack(module), names.kind(module)) for module in measured}
        told = {  # a routed expert that no token reached is a matter of texts
            module
            for module in block_matrices(shapes)
            if module in measured
            or not names.is_routed(module)
            or (names.stack(module), names.kind(module)) not in seen
        }
        if told == measured.keys():
            n_agree += 1
        else:
            others.add(case.model_type)

    print(f"{n_agree} of {n_agree + len(others)} agree; otherwise: {sorted(others)}")  # noqa: T201
    assert others == OTHERWISE
    assert n_agree >= 200
