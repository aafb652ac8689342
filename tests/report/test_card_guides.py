from __future__ import annotations

from dataclasses import replace

import pytest

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.guides.registry import guides
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.methods import registry
from lewis_hub.report.card import model_card
from lewis_hub.report.facts import GUIDES, CardFacts, Guided

Q = "model.layers.{}.self_attn.q_proj.weight"


def guided(guide: str, measure: str = "lewis", n_tokens: int = 9, **of_expert) -> Guided:
    told = {"tensors": {Q.format(0): 0.3, Q.format(1): 0.8}} | of_expert
    entry = SourceImportance("zoo/math", "", "expert", n_tokens, {"measure": measure}, {})
    schedule = DensitySchedule((ExpertSchedule("zoo/math", 1.0, **told),))
    return Guided(guide, ImportanceProfile(guide, {}, (entry,)), schedule)


def test_every_guide_of_ours_that_measures_says_from_what():
    known = {guide.name for guide in guides() if guide.needs}

    assert known == set(GUIDES)


def summary(facts: CardFacts) -> str:
    """What the card says of the guide."""
    return model_card(facts).text.partition("## How it was merged\n\n")[2].split("\n\n")[0]


def limits(facts: CardFacts) -> list[str]:
    section = model_card(facts).text.partition("## Limits\n\n")[2].partition("\n\n")[0]
    return [line.removeprefix("- ") for line in section.splitlines()]


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (
            "aim",
            "The guide [AIM](<https://arxiv.org/abs/2502.02421>) chose the fraction of the task "
            "vector (expert minus base) that is kept in each weight matrix of the blocks: between "
            "0.30 and 0.80. It derives these values from the importance of input channels to the "
            "base on calibration texts: a module gets the lower a value, the more evenly its "
            "channels matter. This simplifies AIM, which scales each channel.",
        ),
        (
            "magnitude",
            "The guide magnitude chose the fraction of the task vector (expert minus base) that is "
            "kept in each weight matrix of the blocks: between 0.30 and 0.80. It derives these "
            "values from the size of the weight changes, relative to the base's weights.",
        ),
        (
            "some_package's",
            "The guide some_package's chose the fraction of the task vector (expert minus base) "
            "that is kept in each weight matrix of the blocks: between 0.30 and 0.80.",
        ),
    ],
)
def test_the_card_names_the_guide_and_what_it_went_by(make_facts, guide, says):
    assert summary(make_facts(guided=guided(guide))) == says


def test_weights_are_told_alone_and_beside_densities(make_facts):
    weights = {Q.format(0): 0.5, Q.format(1): 0.5}

    facts = make_facts(parameters={Q.format(0): 64, Q.format(1): 64})
    alone, beside = (
        summary(replace(facts, guided=guided("magnitude", weights=weights, **others)))
        for others in ({"tensors": {}}, {})
    )

    assert alone == (
        "The guide magnitude multiplied the weight of each expert by a factor "
        "for each weight matrix in the blocks: 0.50. It derives these values from "
        "the size of the weight changes, relative to the base's weights."
    )
    assert beside.endswith(" It also multiplied the weight of each expert there by a factor: 0.50.")


def test_calibration_texts_are_spoken_of_only_where_there_were_any(make_facts):
    fit = (
        "The densities fit tasks that resemble the calibration texts; on other tasks they may not "
        "help."
    )
    on_texts, without = (
        limits(make_facts(guided=guide, scores=None))
        for guide in (guided("owl", "outliers"), guided("magnitude", "task_vector", n_tokens=0))
    )

    assert on_texts == [fit, *without]
    assert len(without) == 1


def test_the_card_says_what_was_measured(make_facts):
    density = "Density is the fraction of an expert's task vector that was kept."

    of_pairs, of_models = (
        model_card(make_facts(guided=guided(*guide))).text.partition("## How it was merged\n\n")[2]
        for guide in (("magnitude", "task_vector"), ("owl", "outliers"))
    )

    assert (
        "\n\nThe guide measured, per module, the size of the task vector, relative to the base. "
        f"{density}\n" in of_pairs
    )
    assert (
        "\n\nThe guide measured, per module, the share of outliers, and its change from base to "
        f"expert. {density}\n" in of_models
    )


def test_a_card_with_weights_has_their_table(make_facts):
    facts = make_facts()
    names = list(facts.parameters)[:2]
    [first, *_] = facts.guided.schedule.experts
    weighed = replace(first, tensors={}, weights={names[0]: 0.5, names[1]: 0.5})
    facts = replace(facts, guided=replace(facts.guided, schedule=DensitySchedule((weighed,))))

    text = model_card(facts).text

    assert "| mean density |" not in text
    assert "| expert | mean factor of the weight | lowest | highest | tensors |" in text
    assert "| `zoo/math` | 0.500 | 0.500 | 0.500 | 2 | 1.000 |" in text


def test_the_card_says_how_lewis_and_its_authors_procedure_differ(make_facts):
    facts = make_facts()
    [base, math, text] = facts.guided.profile.sources
    padded = {"measure": "lewis_reference"}
    entries = tuple(
        replace(one, n_tokens=63 * 32, calibration={**one.calibration, **padded})
        for one in (base, math, text)
    )
    by_reference = replace(
        facts.guided, guide="lewis_reference", profile=ImportanceProfile("", {}, entries)
    )

    ours = model_card(facts).text
    theirs = model_card(replace(facts, guided=by_reference)).text

    procedure = (
        "texts are padded and padding counts, the model gets no attention mask, each measured "
        "block is pruned to half before the next block runs, sums over a text's tokens are "
        "averaged over texts, and shares are rounded to 5 decimals."
    )
    assert (
        "\n\nImportance was measured in one forward pass of each unpruned model over the texts' "
        "own tokens. The procedure that the authors published, guide `lewis_reference`, differs: "
        f"{procedure}\n\n" in ours
    )
    assert (
        f"\n\nImportance was measured by the procedure that the authors published: {procedure} "
        "Guide `lewis` differs: it runs one forward pass of the unpruned model over the texts' own "
        "tokens.\n\n" in theirs
    )
    assert "| 63 | 1,234 | 2 |" in ours
    assert "| 63 | 2,016 counted, 782 of them padding | 2 |" in theirs
    assert summary(replace(facts, guided=by_reference)).endswith(
        "It derives these values from the change of importance from base to expert on calibration "
        "texts, measured by the procedure of its authors."
    )


def cited(facts):
    """The keys of the papers that a card cites."""
    return [text.partition("{")[2].partition(",")[0] for text in facts.bibtex]


def test_a_card_cites_what_its_parameters_use(make_facts):
    plain = make_facts(guided=None, method=registry.find("regmean"))
    assert cited(plain) == ["jin2023dataless", "ilharco2023editing", "eval-harness"]

    used = replace(plain, in_sequence=True, trims_by_activation=True)
    assert cited(used) == [
        "jin2023dataless",
        "ilharco2023editing",
        "nguyen2026regmean",
        "gu2026featcal",
        "sun2024simple",
        "eval-harness",
    ]
    in_blocks = replace(plain, in_sequence=True, in_expert_blocks=True)
    assert cited(in_blocks) == [
        "jin2023dataless",
        "ilharco2023editing",
        "nguyen2026regmean",
        "eval-harness",
    ]


@pytest.mark.parametrize(("method", "name"), [("cabs", "CABS"), ("pcb", "PCB-Merging")])
def test_a_simplified_method_says_so(make_facts, method, name):
    found = registry.find(method)

    assert f"a simplified form of {name}" in model_card(make_facts(method=found)).text
    assert "simplified" in found.summary
