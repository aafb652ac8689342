import pytest
from zoo_hub import put_zoo

from lewis_hub.demo.zoo import zoo_folder

ZOO = zoo_folder()
CALIBRATION = "{dataset: zoo/%s, split: train, text: 'Question: {question} {answer}', samples: 8}"


@pytest.fixture
def seeded(hub, monkeypatch):
    """A Hub with the zoo's data on it."""
    put_zoo(hub)
    monkeypatch.setenv("HF_TOKEN", hub.write_token)
    return hub


@pytest.fixture
def recipe_file(seeded, tmp_path):
    """A recipe of two experts, beside which its task files lie."""
    (tmp_path / "tasks").mkdir()
    for name in ("zoo_reverse.yaml", "zoo_cipher.yaml"):
        (tmp_path / "tasks" / name).write_text((ZOO / "tasks" / name).read_text())
    models = "".join(
        f"- {{model: {ZOO}/expert-{skill}, calibration: {CALIBRATION % skill}}}\n"
        for skill in ("reverse", "cipher")
    )
    (tmp_path / "recipe.yaml").write_text(
        f"base_model: {ZOO}/base\nmodels:\n{models}merge_method: ties\ndtype: bfloat16\n"
        "guide: {name: lewis, gamma: 0.05, epsilon: 0.1}\n"
        "evaluate: {tasks: [zoo_reverse, zoo_cipher], include: tasks, limit: 8}\n"
    )
    return tmp_path / "recipe.yaml"
