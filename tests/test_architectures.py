"""The whole path on tiny random models of many architectures; docs/architectures.md has all."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import transformers
import yaml
from architectures import CAUSAL, Case, build, cases, examine, recipe, table

import lewis_hub
from lewis_hub.calibration.measure import calibrate, measure_inputs
from lewis_hub.calibration.profile import OF_PAIRS, ImportanceProfile
from lewis_hub.calibration.reference import measure_reference
from lewis_hub.calibration.subject import CalibrationSet, Snapshot, Subject, in_folder
from lewis_hub.calibration.texts import CalibrationTokens
from lewis_hub.errors import CalibrationModelError

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

PADDED = CalibrationTokens(  # long enough for a token to come to every expert of `QUICK`
    (tuple(range(3, 43)), (9, 8, 7)), (0, 1), 2, 0, 0, "tiny", limit=48, end=2
)
ON_TEXTS = {  # guide -> what it has measured
    "lewis": "lewis",
    "lewis_reference": "lewis_reference",
    "activation_shift": "output_shift",
    "aim": "evenness",
    "owl": "outliers",
}
NO_ENCODER = (
    "one: it has an encoder, and the published procedure knows decoders alone.\nUse guide `lewis`."
)
NOT_BY_ALL = {  # by `lewis_reference`, and by `activation_shift`
    "mixtral": (4 * 4, 4 * 4),  # transformers fuses experts, and its router is no Linear
    "t5": (NO_ENCODER, QUICK[Case("t5", SEQ2SEQ)]),
}
UNRUN = (
    "Its own code fails so on calibration texts. Guides `uniform` and `magnitude`, and methods "
    "without statistics, run no model."
)

# what blocks get or give beside the hidden states, or weights that they share, ties them together
NOT_BY_BLOCK = {"deepseek_v4", "dory", "git", "glm_moe_dsa", "hrm_text", "hy_v4", "mllama"}
NOT_BY_BLOCK |= {"phi4_multimodal", "reformer", "xlm", "zamba", "zamba2", "zaya"}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.model_type)
def test_an_architecture_is_calibrated_merged_loaded_and_run(case, tmp_path):
    row = examine(case, tmp_path)

    assert row.reason == ""
    assert row.n_measured == row.n_scheduled == QUICK[case]
    assert row.n_merged >= row.n_measured


@pytest.mark.slow
def test_nearly_all_architectures_that_transformers_knows_can_be_merged(tmp_path, capsys):
    rows = [examine(case, tmp_path / str(i)) for i, case in enumerate(cases())]

    with capsys.disabled():
        print("", *table(rows, mergekit=False), sep="\n")  # noqa: T201 - it is asked for
    failed = {row.case.model_type: row.reason for row in rows if row.reason}
    assert len(failed) <= 0.05 * len(rows), failed
    passed = Counter(row.case.automatic for row in rows if not row.reason)
    assert passed[CAUSAL] >= 60
    assert passed[SEQ2SEQ] >= 4
    assert passed[VISION] >= 4
    assert all(r.n_measured and r.n_scheduled and r.n_merged for r in rows if not r.reason)


def measured(guide, measure, folder):
    """Module -> its number, of the folder's model `one`."""
    against = Snapshot("base", folder / "base") if measure in OF_PAIRS else None
    own = (CalibrationSet({}, PADDED).measured(measure),)
    subject = Subject("one", "sha", "expert", folder / "one", own, against)
    known = ImportanceProfile(guide, {}, ())
    found = calibrate([subject], known, "cpu", lambda _: None, lambda _: None, measure)
    return found.sources[0].modules


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.model_type)
def test_a_guide_that_needs_texts_measures_or_refuses(case, tmp_path):
    build(case, tmp_path)

    found = {}
    for guide, measure in ON_TEXTS.items():
        try:
            found[guide] = len(measured(guide, measure, tmp_path))
        except CalibrationModelError as error:
            found[guide] = str(error)

    of_decoders, of_outputs = NOT_BY_ALL.get(case.model_type, (QUICK[case], QUICK[case]))
    assert found == {
        "aim": QUICK[case],
        "activation_shift": of_outputs,
        "lewis": QUICK[case],
        "lewis_reference": of_decoders,
        "owl": QUICK[case],
    }


@pytest.mark.slow
def test_a_guide_that_needs_texts_measures_or_refuses_every_architecture(tmp_path):
    n_measured, refused = Counter(), {guide: [] for guide in ON_TEXTS}
    for case in cases():
        try:
            build(case, tmp_path / case.model_type)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md has the reasons
            continue
        for guide, measure in ON_TEXTS.items():
            try:
                assert measured(guide, measure, tmp_path / case.model_type), (case, guide)
                n_measured[guide] += 1
            except CalibrationModelError as error:
                refused[guide].append(f"{case.model_type}: {error}")
        shutil.rmtree(tmp_path / case.model_type)

    assert all(n_measured[guide] >= 190 for guide in ON_TEXTS), n_measured
    assert all(len(refused[guide]) <= 20 for guide in ON_TEXTS), refused


@pytest.mark.parametrize(
    ("case", "n_matrices"),
    [
        (Case("paligemma", VISION), 28),  # its vision tower is larger
        (Case("qwen3_vl", VISION), 28),
        (Case("mllama", CAUSAL), 21),  # a block for pictures alone is passed over
        (Case("git", CAUSAL), 24),  # transformers does not say where its decoder is
        (Case("phi4_multimodal", CAUSAL), 16),
    ],
    ids=lambda told: getattr(told, "model_type", None),
)
def test_the_published_procedure_measures_the_blocks_that_texts_reach(case, n_matrices, tmp_path):
    build(case, tmp_path)

    assert len(measured("lewis_reference", "lewis_reference", tmp_path)) == n_matrices


def test_a_router_that_returns_more_than_its_product_has_no_shift(tmp_path):
    build(Case("llama4_text", CAUSAL), tmp_path)

    found = measured("activation_shift", "output_shift", tmp_path)

    assert len(found) == 28
    assert not any("router" in module for module in found)


@pytest.mark.parametrize(
    ("guide", "model_type", "message"),
    [
        (
            "lewis",
            "blt",
            "one: guide `lewis` cannot measure it: RuntimeError: mat1 and mat2 shapes cannot be "
            "multiplied (41x64 and 2048x128).\n" + UNRUN,
        ),
        (
            "lewis",
            "gemma4_unified_assistant",
            "one: guide `lewis` cannot measure it: KeyError: 'sliding_attention'.\n" + UNRUN,
        ),
        (
            "lewis_reference",
            "gemma4_unified_assistant",
            "one: guide `lewis_reference` cannot measure it: KeyError: 'sliding_attention'.\n"
            + UNRUN,
        ),
        (
            "activation_shift",
            "cpmant",
            "one: no Linear in its blocks has one output for each token of a text.\n"
            "Use guide `lewis`, which looks at inputs.",
        ),
    ],
)
def test_a_model_that_a_guide_cannot_measure_gives_one_message(
    guide, model_type, message, tmp_path
):
    build(Case(model_type, CAUSAL), tmp_path)

    with pytest.raises(CalibrationModelError) as caught:
        measured(guide, ON_TEXTS[guide], tmp_path)

    assert str(caught.value) == message


def test_padding_beyond_the_last_position_is_refused_before_anything_is_measured(tmp_path):
    build(Case("gpt2", CAUSAL), tmp_path)
    asked = yaml.safe_load(recipe(tmp_path, guided=True).read_text())
    asked["guide"]["name"] = "lewis_reference"
    asked["models"] = asked["models"][:1]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))

    def problem(folder):
        return (
            f"{folder}: guide `lewis_reference` pads every text to `max_tokens`, 512, and the "
            "model has 128 positions.\nSet `max_tokens: 128`, or less, in the calibration."
        )

    told = lewis_hub.check(lewis_hub.read_recipe(tmp_path / "recipe.yaml")).problems
    assert told == tuple(problem(tmp_path / name) for name in ("base", "one"))
    with pytest.raises(CalibrationModelError) as caught:
        measure_reference(
            Snapshot("one", tmp_path / "one"), [replace(PADDED, limit=512)], "cpu", int
        )
    assert str(caught.value) == problem("one")


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
            whole = measure_inputs(Snapshot("tiny", folder), [texts], "cpu", lambda _: None)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md has the reasons
            continue
        try:
            weights = in_folder("tiny", folder)
            blocks = measure_inputs(weights, [texts], "cpu", lambda _: None)
        except CalibrationModelError:
            refused.add(case.model_type)
            continue
        assert blocks == whole, case.model_type
        n_equal += 1

    assert refused == NOT_BY_BLOCK | {c.model_type for c in cases() if c.automatic == SEQ2SEQ}
    assert n_equal >= 180


def test_the_other_files_of_a_vision_language_model_are_copied(tmp_path):
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


def test_a_translation_models_tokenizer_and_generation_config_are_copied(tmp_path):
    build(Case("marian", SEQ2SEQ), tmp_path)
    for name in ("source.spm", "target.spm"):
        (tmp_path / "base" / name).write_bytes(b"\x00pieces")

    merged = lewis_hub.merge_models(
        lewis_hub.read_recipe(recipe(tmp_path, guided=False)), tmp_path / "merged"
    ).output

    assert (merged / "source.spm").read_bytes() == (merged / "target.spm").read_bytes()
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert json.loads((merged / "generation_config.json").read_text()) == generation
