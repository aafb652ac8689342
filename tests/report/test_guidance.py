from __future__ import annotations

from dataclasses import replace

import pytest

from lewis_hub.calibration.profile import ImportanceProfile, SourceImportance
from lewis_hub.guides.registry import guides
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.report import sections
from lewis_hub.report.card import model_card
from lewis_hub.report.facts import Guided

Q = "model.layers.{}.self_attn.q_proj.weight"


def guided(guide: str, measure: str = "lewis", n_tokens: int = 9, **of_expert) -> Guided:
    told = {"tensors": {Q.format(0): 0.3, Q.format(1): 0.8}} | of_expert
    entry = SourceImportance("zoo/math", "", "expert", n_tokens, {}, {"measure": measure})
    schedule = DensitySchedule((ExpertSchedule("zoo/math", 1.0, **told),))
    return Guided(guide, ImportanceProfile(guide, {}, (entry,)), schedule)


def test_every_guide_of_ours_that_measures_says_from_what():
    known = {guide.name for guide in guides() if guide.needs}

    assert known == set(sections.WHY)


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (
            "aim",
            "Of each task vector (expert minus base) the guide "
            "[AIM](<https://arxiv.org/abs/2502.02421>) kept a fraction of its own in every weight "
            "matrix of the blocks: between 0.30 and 0.80, the less, the more evenly the input "
            "channels matter to the base on calibration texts.",
        ),
        (
            "magnitude",
            "Of each task vector (expert minus base) the guide magnitude kept a fraction of its "
            "own in every weight matrix of the blocks: between 0.30 and 0.80, from how far the "
            "weights moved, relative to the base's.",
        ),
        (
            "some_package's",
            "Of each task vector (expert minus base) the guide some_package's kept a fraction of "
            "its own in every weight matrix of the blocks: between 0.30 and 0.80.",
        ),
    ],
)
def test_the_card_names_the_guide_and_what_it_went_by(guide, says):
    assert sections.sentence(guided(guide)) == says


def test_weights_are_told_alone_and_beside_densities():
    weights = {Q.format(0): 0.5, Q.format(1): 0.5}

    alone = sections.sentence(guided("magnitude", tensors={}, weights=weights))
    beside = sections.sentence(guided("magnitude", weights=weights))

    assert alone == (
        "The guide magnitude multiplied each expert's weight by a factor of its own in every "
        "weight matrix of the blocks: 0.50, from how far the weights moved, relative to the base's."
    )
    assert beside.endswith(" It multiplied the expert's weight there by a factor: 0.50.")


def test_calibration_texts_are_spoken_of_only_where_there_were_any():
    suits = "The densities suit tasks that resemble the calibration texts; elsewhere they may help"

    assert [*sections.limits(guided("owl", "outliers"))] == [f"{suits} nothing."]
    assert [*sections.limits(guided("magnitude", "task_vector", n_tokens=0))] == []


def test_the_pictures_note_says_what_was_measured():
    density = "Density is the fraction of an expert's task vector that was kept."

    assert sections.picture_note(guided("magnitude", "task_vector")) == (
        "The first map shows, per module, the size of the task vector, relative to the base. "
        + density
    )
    assert sections.picture_note(guided("owl", "outliers")).startswith(
        "The first map shows, per module, the share of outliers, and its change from base to "
        "expert."
    )


def test_a_card_with_weights_has_their_table(make_facts):
    facts = make_facts()
    names = list(facts.parameters)[:2]
    [first, *_] = facts.guided.schedule.experts
    weighed = replace(first, tensors={}, weights={names[0]: 0.5, names[1]: 0.5})
    facts = replace(facts, guided=replace(facts.guided, schedule=DensitySchedule((weighed,))))

    assert sections.densities(facts) is None
    assert sections.weights(facts) in model_card(facts).text
    assert "| mean factor of the weight | lowest | highest | tensors |" in sections.weights(facts)
    assert "| 0.500 | 0.500 | 0.500 | 2 | 1.000 |" in sections.weights(facts)


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

    differs = (
        "texts {are} padded and padding {count}, no mask {is} handed on, each measured block {is} "
        "pruned to half before the next one {run}, sums over a text's tokens {are} averaged over "
        "texts, and shares {are} rounded to 5 decimals."
    )
    now = differs.format(are="are", count="counts", **{"is": "is"}, run="runs")
    then = differs.format(are="were", count="counted", **{"is": "was"}, run="ran")
    assert (
        "\n\nImportance was measured in one forward pass of each unpruned model, over the texts' "
        "own tokens. The procedure that the authors published, guide `lewis_reference`, differs: "
        f"{now}\n\n" in ours
    )
    assert (
        f"\n\nImportance was measured by the procedure that the authors published: {then} Guide "
        "`lewis` differs: it takes one forward pass of the unpruned model over the texts' own "
        "tokens.\n\n" in theirs
    )
    assert "| 63 | 1,234 | 2 |" in ours
    assert "| 63 | 2,016 counted, 782 of them padding | 2 |" in theirs
    assert sections.sentence(by_reference).endswith(
        "from how importance on calibration texts, as the authors' own procedure measures it, "
        "changed from base to expert."
    )
