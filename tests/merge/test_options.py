"""What an option of mergekit's does to the bytes, held against the method's own function."""

import inspect
from dataclasses import replace

import pytest
import torch
from methods.test_mergekit_options import OPTIONS, WITHOUT_EFFECT

from lewis_hub.kernels.random_bits import stream
from lewis_hub.methods import registry
from lewis_hub.methods.registry import PER_SOURCE, find

SHAPE, SEED = (24, 40), 7
USUAL = {"weight": 1.0, "density": 0.6, "gamma": 0.05, "epsilon": 0.15, "scale": 1.0}
SEEN = {"tol": 1.0, "eps": 1.0, "max_iter": 1}  # so far from the default that it shows
RAM = {"ram", "ramplus_tl"}  # `epsilon` is not an expert's own here
SHARES = {"linear", "ties", "della", "nuslerp", "multislerp"}  # weights count beside each other


def cases():
    """(method, option, value): of each option one that is not its default."""
    for method, (own, shared) in OPTIONS.items():
        known = find(method)
        for option, value in {**own, **shared}.items():
            if (method, option) not in WITHOUT_EFFECT:
                default = known.options.get(option)
                told = not default if isinstance(default, bool) else SEEN.get(option, value)
                yield method, option, told


def tensors_of(known):
    """Of the base and of three experts, or as many as the method takes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1 + (known.n_experts[1] or 3), *SHAPE, generator=generator)


def usual(known, option):
    """Settings of each expert, and options: as much as shows what `option` does."""
    options = {name: 0.5 for name, default in known.options.items() if default is None}
    if option == "nuslerp_row_wise":
        options["nuslerp_flatten"] = False
    if known.name in RAM:
        options["epsilon"] = 0.8  # some entries are changed by no expert, some by one, some by more
    return {name: USUAL[name] for name in known.settings}, options


def merged(zoo, label, known, owns, parameters):
    """By the engine, with settings of each expert's own and those of the recipe."""
    base, *experts = (
        zoo.source(f"{label} {i}", {"a": tensor}, own)
        for i, (tensor, own) in enumerate(zip(tensors_of(known), [{}, *owns], strict=True))
    )
    asked = zoo.settings(
        known.name, base if known.takes_base else None, experts, parameters=parameters, seed=SEED
    )
    return zoo.merge(asked, f"of {label}").tensors["a"]


def by_function(known, owns, options):
    """By the method's function, with all settings of each expert."""
    base, *models = tensors_of(known)
    given = {
        keyword: [own[name] for own in owns]
        for keyword, name in PER_SOURCE.items()
        if name in known.settings
    }
    if "weights" in given:
        given["weights"] = torch.tensor(given["weights"])
    if known.takes("streams"):
        given["streams"] = [stream(SEED, "a", expert) for expert in range(len(models))]
    given |= {known.keyword(name): v for name, v in options.items() if name in known.options}
    stacked = torch.stack(models)
    if not known.takes_base:
        return known.function(stacked, **given)
    return known.function(base, stacked - base if known.takes_task_vectors else stacked, **given)


@pytest.mark.parametrize(("method", "option", "value"), list(cases()))
def test_an_option_of_a_recipe_does_to_the_bytes_what_the_function_does(zoo, method, option, value):
    known = find(method)
    own, options = usual(known, option)
    owns = [own] * (len(tensors_of(known)) - 1)
    plain = merged(zoo, "plain", known, owns, options)
    assert torch.equal(plain, by_function(known, owns, options))

    if option in own:
        silent = [{name: v for name, v in own.items() if name != option}] * len(owns)
        found = merged(zoo, "told", known, silent, options | {option: value})
        wanted = by_function(known, [own | {option: value}] * len(owns), options)
    else:
        found = merged(zoo, "told", known, owns, options | {option: value})
        wanted = by_function(known, owns, options | {option: value})

    assert torch.equal(found, wanted)
    has_no_say = option not in known.options and option not in own
    has_no_say |= option == "weight" and method in SHARES  # the same for all
    assert torch.equal(found, plain) == has_no_say


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [case for case in cases() if case[1] in USUAL and case[0] not in RAM],
)
def test_a_setting_of_one_expert_s_own_counts_for_it_alone(zoo, method, option, value):
    known = find(method)
    own, options = usual(known, option)
    others = [own] * (len(tensors_of(known)) - 2)
    owns = [own | {option: value}, *others]

    found = merged(zoo, "told", known, owns, options)

    assert torch.equal(found, by_function(known, owns, options))
    assert not torch.equal(found, merged(zoo, "plain", known, [own, *others], options))


def test_an_option_that_the_kernel_does_not_know_is_left_to_the_definition(zoo, monkeypatch):
    base, *experts = (zoo.source(str(i), {"a": torch.full((3,), float(i))}) for i in range(2))
    ties = registry.find("ties")

    def shifted(base, task_vectors, *, shift=0.0, **options):
        return ties.function(base, task_vectors, **options) + shift

    parameters = {
        **ties.parameters,
        "shift": inspect.Parameter("shift", inspect.Parameter.KEYWORD_ONLY, default=0.0),
    }
    extended = replace(ties, function=shifted, parameters=parameters)
    monkeypatch.setattr(registry, "find", lambda _: extended)

    merged = zoo.merge(zoo.settings("ties", base, experts, parameters={"shift": 4.0}))

    assert merged.tensors["a"].tolist() == [5.0, 5.0, 5.0]
