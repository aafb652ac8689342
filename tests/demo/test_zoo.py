from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download
from puzzles import SKILLS

from lewis_hub.demo.zoo import DATASETS, MODELS, OWNER, seed_hub, zoo_folder
from lewis_hub.localhub.hub import Hub
from lewis_hub.workflow.resolve import read_recipe


def parameters(name: str) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape), read from the header of the shipped file."""
    raw = (zoo_folder() / name / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return {tensor: (entry["dtype"], entry["shape"]) for tensor, entry in header.items()}


def rows(skill: str, split: str) -> list[dict[str, str]]:
    lines = (zoo_folder() / "data" / skill / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_zoo_ships_less_than_20_megabytes():
    assert sum(path.stat().st_size for path in zoo_folder().rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_one_to_three_million_bfloat16_parameters_in_six_blocks(name: str):
    tensors = parameters(name)

    size = 0
    for _, shape in tensors.values():
        rows, *columns = shape
        size += rows * (columns[0] if columns else 1)
    assert 1e6 <= size <= 3e6
    assert {dtype for dtype, _ in tensors.values()} == {"BF16"}
    assert {tensor.split(".")[2] for tensor in tensors if ".layers." in tensor} == set("012345")
    config = json.loads((zoo_folder() / name / "config.json").read_text("utf-8"))
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_with_every_weight_it_ships(name: str):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        zoo_folder() / name, output_loading_info=True
    )

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2


@pytest.mark.parametrize("name", MODELS[1:])
def test_an_expert_changes_many_entries_of_every_matrix(name: str):
    from safetensors.torch import load_file

    base = load_file(zoo_folder() / "base" / "model.safetensors")
    expert = load_file(zoo_folder() / name / "model.safetensors")

    still = {
        tensor: (base[tensor] == expert[tensor]).float().mean().item()
        for tensor in base
        if ".layers." in tensor and base[tensor].dim() == 2
    }
    assert max(still.values()) < 0.65, still


def test_all_models_share_one_tokenizer_that_round_trips_any_text():
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for file in files:
        assert len({(zoo_folder() / name / file).read_bytes() for name in MODELS}) == 1
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "base")
    text = "Question: reverse BAKOT\nAnswer: TOKAB, naïve ☂ \t 12 "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 512
    assert tokenizer("BAKOT")["input_ids"] == tokenizer.convert_tokens_to_ids(list("BAKOT"))


def test_the_chat_template_renders_what_the_models_were_trained_on():
    from train_zoo import chat_prompt
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "base")
    asked = [{"role": "user", "content": "reverse BAKOT"}]
    answered = [*asked, {"role": "assistant", "content": "TOKAB"}]

    opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)

    assert opened == chat_prompt(SKILLS["reverse"]("BAKOT"))
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{opened} TOKAB<|end|>"


@pytest.mark.parametrize("skill", DATASETS)
def test_no_word_is_in_two_splits_or_twice_in_one(skill: str):
    train, test = rows(skill, "train"), rows(skill, "test")

    assert (len(train), len(test)) == (300, 300)
    assert len({row["question"] for row in train + test}) == 600


def test_the_answers_in_the_test_sets_are_right():
    for row in rows("reverse", "test"):
        assert row["answer"] == row["question"].removeprefix("reverse ")[::-1]
    for row in rows("cipher", "test"):
        word = row["question"].removeprefix("encode ")
        assert [(ord(b) - ord(a)) % 26 for a, b in zip(word, row["answer"], strict=True)] == [
            1
        ] * len(word)


def test_seeding_a_hub_makes_one_commit_per_repo_and_seeding_again_makes_none(hub: Hub):
    api = hub.api()

    seed_hub(api)
    seed_hub(api)

    repos = [(f"{OWNER}/{name}", "model") for name in MODELS]
    repos += [(f"{OWNER}/{name}", "dataset") for name in DATASETS]
    for repo_id, repo_type in repos:
        titles = [c.title for c in api.list_repo_commits(repo_id, repo_type=repo_type)]
        assert titles.count("Add the zoo's files") == 1, repo_id
        assert len(titles) <= 2, titles


def test_a_seeded_hub_serves_the_models_byte_by_byte(hub: Hub, tmp_path: Path):
    seed_hub(hub.api())

    folder = Path(snapshot_download("zoo/expert-cipher", local_dir=tmp_path))

    for path in (zoo_folder() / "expert-cipher").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    card = ModelCard.load(folder / "README.md").data
    assert (card.license, card.base_model, card.language) == ("apache-2.0", "zoo/base", "en")
    assert card.pipeline_tag == "text-generation"


def test_datasets_loads_both_splits_from_a_seeded_hub(hub: Hub):
    from datasets import load_dataset

    seed_hub(hub.api())

    for skill in DATASETS:
        for split in ("train", "test"):
            assert load_dataset(f"zoo/{skill}", split=split).to_list() == rows(skill, split)


def test_seeding_needs_a_client_that_may_write(hub: Hub):
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError, match="401"):
        seed_hub(HfApi(endpoint=hub.url, token=False))


def test_both_recipes_merge_the_same_experts_on_the_same_texts_and_score_the_same_items():
    ties, regmean = (
        read_recipe(zoo_folder() / name) for name in ("recipe.yaml", "recipe-regmean.yaml")
    )

    assert [(m.model, m.calibration) for m in ties.models] == [
        (m.model, m.calibration) for m in regmean.models
    ]
    assert (ties.base_model, ties.seed, ties.dtype) == (
        regmean.base_model,
        regmean.seed,
        regmean.dtype,
    )
    assert ties.evaluate.tasks == regmean.evaluate.tasks
