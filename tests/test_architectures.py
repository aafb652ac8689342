"""The whole path on tiny random models of many architectures; docs/architectures.md has all."""

from __future__ import annotations

import json

import pytest
import transformers
from architectures import CAUSAL, Case, build, cases, examine, recipe

import lewis_hub
from lewis_hub.errors import CalibrationModelError
from lewis_hub.guides import activations, by_block
from lewis_hub.guides.tokens import CalibrationTokens
from lewis_hub.guides.weights import in_folder

SEQ2SEQ, VISION = "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText"
QUICK = {  # matrices in the blocks that calibration reaches: per block, times blocks
    Case("llama", CAUSAL): 7 * 4,
    Case("gpt2", CAUSAL): 4 * 4,  # Conv1D; q, k and v in one
    Case("mixtral", CAUSAL): (4 + 1 + 4 * 3) * 4,  # attention, router, four experts
    Case("mamba", CAUSAL): 3 * 4,
    Case("gemma3_text", CAUSAL): 7 * 4,  # sliding windows
    Case("t5", SEQ2SEQ): 6 * 4 + 10 * 4,  # both stacks; the decoder has two attentions
    Case("qwen2_vl", VISION): 7 * 4,  # not the vision tower
}


# what blocks get or give beside the hidden states, or weights that they share, ties them together
NOT_BY_BLOCK = {"deepseek_v4", "dory", "git", "glm_moe_dsa", "hrm_text", "hy_v4", "mllama"}
NOT_BY_BLOCK |= {"phi4_multimodal", "prophetnet", "reformer", "xlm", "zamba", "zamba2", "zaya"}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.model_type)
def test_an_architecture_is_calibrated_merged_loaded_and_run(case, tmp_path):
    row = examine(case, tmp_path)

    assert row.reason == ""
    assert row.n_measured == row.n_scheduled == QUICK[case]
    assert row.n_merged >= row.n_measured


@pytest.mark.slow
def test_nearly_all_architectures_that_transformers_knows_can_be_merged(tmp_path):
    rows = [examine(case, tmp_path / str(i)) for i, case in enumerate(cases())]

    failed = {row.case.model_type: row.reason for row in rows if row.reason}
    assert len(rows) >= 60 + 4 + 4
    assert len(failed) <= 0.05 * len(rows), failed


@pytest.mark.slow
def test_architectures_are_measured_the_same_block_by_block_or_refused(tmp_path):
    texts = CalibrationTokens(
        ((5, 6, 7, 8, 9), (9, 8), tuple(range(3, 43))), (0, 1, 2), 3, 0, 0, "t"
    )
    n_equal, refused = 0, set()
    for case in cases():
        try:
            build(case, tmp_path / case.model_type)
            folder = tmp_path / case.model_type / "base"
            whole = activations.measure(folder, "tiny", [texts], "cpu", lambda _: None)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md has the reasons
            continue
        try:
            weights = in_folder("tiny", folder)
            blocks = by_block.measure(weights, [texts], "cpu", lambda _: None)
        except CalibrationModelError:
            refused.add(case.model_type)
            continue
        assert blocks == whole, case.model_type
        n_equal += 1

    assert refused == NOT_BY_BLOCK | {c.model_type for c in cases() if c.automatic == SEQ2SEQ}
    assert n_equal >= 180


def test_what_a_vision_language_model_has_beside_its_weights_is_carried(tmp_path):
    build(Case("qwen2_vl", VISION), tmp_path)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / "base" / name).write_text(json.dumps(processor))
    (tmp_path / "base" / "processor_config.json").write_text('{"processor_class": "Qwen2VL"}')

    merged = lewis_hub.merge_models(
        lewis_hub.read_recipe(recipe(tmp_path, guided=False)), tmp_path / "merged"
    ).output

    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((merged / name).read_text()) == processor
    assert json.loads((merged / "processor_config.json").read_text()) == {
        "processor_class": "Qwen2VL"
    }
    asked = transformers.AutoConfig.from_pretrained(tmp_path / "base").to_dict()
    made = transformers.AutoConfig.from_pretrained(merged).to_dict()
    assert made["vision_config"].keys() == asked["vision_config"].keys()
    assert made["text_config"]["rope_parameters"] == asked["text_config"]["rope_parameters"]


def test_a_translation_models_tokenizer_and_generation_are_carried(tmp_path):
    build(Case("marian", SEQ2SEQ), tmp_path)
    for name in ("source.spm", "target.spm"):
        (tmp_path / "base" / name).write_bytes(b"\x00pieces")

    merged = lewis_hub.merge_models(
        lewis_hub.read_recipe(recipe(tmp_path, guided=False)), tmp_path / "merged"
    ).output

    assert (merged / "source.spm").read_bytes() == (merged / "target.spm").read_bytes()
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert json.loads((merged / "generation_config.json").read_text()) == generation
