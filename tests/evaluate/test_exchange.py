import pytest
import torch
import transformers
from architectures import CAUSAL, Case, build, cases
from safetensors.torch import load_file

from lewis_hub.demo.zoo import zoo_folder
from lewis_hub.errors import EvaluationError
from lewis_hub.evaluate.backends import EvaluationSettings
from lewis_hub.evaluate.harness import exchange, load
from lewis_hub.evaluate.items import Question, answer_losses

ZOO = zoo_folder()
QUICK = [
    Case("gpt2", CAUSAL),  # Conv1D, tied
    Case("mixtral", CAUSAL),  # experts are apart in the file and together in memory
    Case("t5", "AutoModelForSeq2SeqLM"),
    Case("qwen2_vl", "AutoModelForImageTextToText"),  # renamed in memory
]


def loaded(folder):
    [name] = transformers.AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def assert_exchanged(case, folder):
    """A model becomes another to the last bit, and stays tied."""
    build(case, folder)
    model, other = loaded(folder / "base"), loaded(folder / "one").state_dict()
    shared = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)

    exchange(model, load_file(folder / "one" / "model.safetensors"))

    again = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        again.setdefault(id(parameter), []).append(name)
    assert list(again.values()) == list(shared.values())
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.model_type)
def test_a_model_becomes_another(case, tmp_path):
    assert_exchanged(case, tmp_path)


@pytest.mark.slow
def test_all_models_that_transformers_knows_become_others(tmp_path):
    n_made, failed = 0, {}
    for case in cases():
        try:
            build(case, tmp_path / case.model_type)
        except Exception:  # noqa: BLE001, S112 - docs/architectures.md has the reasons
            continue
        n_made += 1
        try:
            assert_exchanged(case, tmp_path / case.model_type)
        except (AssertionError, EvaluationError) as error:
            failed[case.model_type] = str(error)

    assert n_made >= 200
    assert failed.keys() <= {"youtu"}  # transformers loads its embeddings and draws them anew


def test_a_loaded_expert_scores_as_the_one_that_took_its_place():
    asked = [Question("cipher", "Question: abc\nAnswer:", " bcd")]
    there, fresh = (
        load(ZOO / f"expert-{skill}", EvaluationSettings()) for skill in ("reverse", "cipher")
    )
    before = answer_losses(there, asked, lambda _: None)

    exchange(there.model, load_file(ZOO / "expert-cipher" / "model.safetensors"))

    after = answer_losses(there, asked, lambda _: None)
    assert after == answer_losses(fresh, asked, lambda _: None)
    assert after != before


def test_a_weight_that_is_not_there_is_told():
    model = load(ZOO / "base", EvaluationSettings()).model
    tensors = load_file(ZOO / "expert-cipher" / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]

    with pytest.raises(EvaluationError) as caught:
        exchange(model, tensors)
    assert str(caught.value) == (
        "the model: 1 of its weights cannot be exchanged, model.layers.1.self_attn.q_proj.weight "
        "among them.\nExpected: a merge with the same tensors."
    )
