from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lewis_hub.evaluate.scores import Scores
from lewis_hub.hub.facts import Licence, ModelFacts
from lewis_hub.hub.source import Source
from lewis_hub.methods import registry
from lewis_hub.report.card import card_data, model_card
from lewis_hub.report.cost import Machine

HUB = "https://huggingface.co"
ONERROR = "<img src=x onerror=alert(1)>"
HTML = MarkdownIt("commonmark", {"html": True}).enable("table")


def section(card: ModelCard, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, flags=re.M | re.S)
    assert found, f"no section {title}"
    return found[1].strip()


def test_the_summary_says_what_was_merged_how_and_into_what(make_facts):
    card = model_card(make_facts())

    heading, summary = card.text.strip().split("\n\n")[:2]
    assert heading == "# zoo-merge"
    assert summary == (
        f"This language model merges [`zoo/math`](<{HUB}/zoo/math>) and "
        f"[`zoo/text`](<{HUB}/zoo/text>) into [`zoo/base`](<{HUB}/zoo/base>) by "
        "[TIES-Merging](<https://arxiv.org/abs/2306.01708>), without training."
    )
    assert section(card, "How it was merged").split("\n\n")[0] == (
        "The guide [LEWIS](<https://arxiv.org/abs/2503.03874>) chose the "
        "fraction of the task vector (expert minus base) that is kept in each weight matrix of "
        "the blocks: between 0.30 and 0.80. It derives these values from the change of importance "
        "from base to expert on calibration texts."
    )


def test_the_first_screen_is_sentence_verdict_chart_table_and_snippet_in_this_order(make_facts):
    blocks = model_card(make_facts()).text.strip().split("\n\n")

    assert blocks[1].startswith("This language model merges")
    assert blocks[2] == (
        "**It keeps 76 % of `zoo/math`'s skill.** ([how computed](#scores-in-detail))"
    )
    dark = f"{HUB}/me/zoo-merge/resolve/main/lewis/scores-dark.png"
    assert blocks[3] == (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        '<img src="lewis/scores-light.png" alt="Scores."></picture>'
    )
    assert blocks[4].splitlines()[2] == "| **this merge** | 0.700 ± 0.026 |"
    assert blocks[5] == "## Use it"
    assert blocks[6] == "```bash\npip install -U accelerate torch transformers\n```"
    assert blocks[7].startswith("```python\n")


def test_links_lead_to_huggingface_and_to_no_mirror(make_facts):
    text = model_card(make_facts()).content

    hosts = set(re.findall(r"https?://([^/\s>\")]+)", text))
    assert hosts <= {
        *("huggingface.co", "arxiv.org", "mlco2.github.io", "pypi.org", "github.com"),
        *("doi.org", "zenodo.org", "openreview.net"),
    }


def test_the_metadata_is_complete_reads_back_and_is_the_same_each_time(make_facts):
    card = model_card(make_facts())

    block = card.content.split("---\n")[1]
    metadata = yaml.safe_load(block)
    assert metadata == {
        "base_model": ["zoo/base", "zoo/math", "zoo/text"],
        "base_model_relation": "merge",
        "datasets": ["zoo/sums"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["exact_match"],
        "pipeline_tag": "text-generation",
        "tags": ["merge", "lewis-hub", "lewis", "ties"],
        "widget": [{"messages": [{"role": "user", "content": "What can you do?"}]}],
        "model-index": [
            {
                "name": "zoo-merge",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "name": "sums",
                            "type": "zoo/sums",
                            "split": "test",
                            "revision": f"{13:040x}",
                        },
                        "metrics": [{"type": "exact_match", "value": 0.7, "name": "exact match"}],
                    }
                ],
            }
        ],
    }
    assert ModelCard(card.content).content == card.content == model_card(make_facts()).content
    assert card.data.to_dict() == card_data(make_facts()).to_dict()


def test_the_hub_accepts_the_card(hub, make_facts):
    hostile = Licence("x: [y\n---\n", ONERROR, "javascript:alert(1)")
    for facts in (make_facts(), make_facts(licence=hostile, title=ONERROR, repo=None)):
        card = model_card(facts)
        card.validate()  # asks the Hub, and raises what it refuses

        assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("custom_code", [True, False])
@pytest.mark.parametrize("repo", ["me/zoo-merge", None])
def test_the_snippet_is_python_that_names_this_model(make_facts, chat, custom_code, repo):
    text = model_card(make_facts(chat=chat, custom_code=custom_code, repo=repo)).text
    [program] = re.findall(r"^```python\n(.*?)\n```$", text, flags=re.M | re.S)

    tree = ast.parse(program)
    assigned = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert assigned["name"] == (repo or ".")
    assert ("apply_chat_template" in program) == chat
    assert program.count("trust_remote_code=True") == (2 if custom_code else 0)


def test_scores_are_shown_with_paired_tests_and_limits_in_words(make_facts):
    card = model_card(make_facts())

    scores, limits = section(card, "Scores in detail"), section(card, "Limits")
    assert "| zoo/math | **0.900** ± 0.020 |" in card.text
    assert "| `sums` | exact match | zoo/math | −0.200 | −0.250 to −0.150 |" in scores
    assert "The uniform twin is the same merge" in scores
    assert limits.splitlines()[0].startswith(
        "- On `sums` (exact match) the merged model is worse than its best expert, `zoo/math`"
    )
    assert (
        "- On `sums` (exact match) the merged model is not significantly better than its uniform "
        "twin" in limits
    )
    assert "- One block stands out.\n" in limits
    assert limits.count("\n- ") == limits.count("\n")


def test_the_card_says_that_prompts_went_through_chat_templates(make_facts):
    said = ", with each model's own chat template. ± is the standard error"

    assert said in model_card(make_facts(scored_in_chat=True)).text
    assert said not in model_card(make_facts()).text


def test_gains_are_listed_under_the_scores(make_facts, make_scores):
    card = model_card(make_facts(scores=make_scores(merged=0.8, twin=0.6, p=0.01)))

    rendered = HTML.render(section(card, "Scores in detail"))
    assert (
        "<li>On <code>sums</code> (exact match) the merged model is better than its uniform"
        in rendered
    )


def test_a_merge_that_was_not_scored_says_so(make_facts, make_scores):
    only_base = make_scores().tasks["sums"]
    models = {"base": only_base.models["base"]}
    without = Scores({"sums": replace(only_base, models=models, paired=())})

    for scores in (None, without):
        card = model_card(make_facts(scores=scores))
        assert card.text.strip().split("\n\n")[2] == (
            "This merge was not scored. Its quality is unknown."
        )
        assert "## Scores in detail" not in card.text
        assert "model-index" not in card.content
        assert "metrics:" not in card.content
        assert section(card, "Limits").startswith("- One block stands out.")


def test_an_unguided_merge_speaks_of_no_guide(make_facts):
    card = model_card(make_facts(guided=None, datasets=(), method=registry.find("dare_ties")))

    assert "## How it was merged" not in card.text
    assert "Calibration" not in card.text
    assert "LEWIS" not in card.text
    assert "[DARE with TIES-Merging](<https://arxiv.org/abs/2311.03099>)" in card.text
    assert card.data.tags == ["merge", "lewis-hub", "dare_ties"]
    assert card.data.datasets is None
    assert re.findall(r"@\w+{([\w-]+),", section(card, "Citation")) == [
        "yu2024language",
        "yadav2023ties",
        "eval-harness",
    ]


def test_a_merge_without_a_base_merges_into_none(make_facts):
    facts = make_facts(base=None, guided=None, method=registry.find("linear"), mergekit=False)

    card = model_card(facts)

    assert f"merges [`zoo/math`](<{HUB}/zoo/math>) and [`zoo/text`]" in card.text
    assert (
        "by [a weighted average of their weights](<https://arxiv.org/abs/2203.05482>)" in card.text
    )
    assert "zoo/base" not in card.text.replace("base_model: zoo/base", "")
    assert "mergekit" not in card.text


def test_a_method_of_a_package_is_named_and_cites_nothing(make_facts):
    own = replace(registry.find("ties"), name="my_method", paper=None)

    card = model_card(make_facts(method=own, guided=None))

    assert "by the method `my_method`, without training." in card.text
    assert re.findall(r"@\w+{([\w-]+),", section(card, "Citation")) == ["eval-harness"]
    assert "## Citation" not in model_card(make_facts(method=own, guided=None, scores=None)).text


def test_the_maps_are_one_picture_in_both_versions_with_one_sentence(make_facts):
    part = section(model_card(make_facts()), "How it was merged")

    dark = f"{HUB}/me/zoo-merge/resolve/main/lewis/maps-dark.png"
    assert (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        '<img src="lewis/maps-light.png" alt="A caption."></picture>\n\nA caption.\n'
    ) in part
    assert part.count("<picture>") == HTML.render(part).count("<picture>") == 1
    assert "| `zoo/math` | 0.603 | 0.302 | 0.800 | 24 | 1.000 |" in part


def test_pictures_of_a_merge_without_a_repo_lie_beside_the_card(make_facts):
    card = model_card(make_facts(repo=None))

    assert 'srcset="lewis/scores-dark.png"' in card.text
    assert 'srcset="lewis/maps-dark.png"' in card.text


def test_inputs_are_pinned_and_linked_to_their_commits(make_facts, make_source):
    asked = make_source("zoo/math", "b" * 40, revision="v1.0")
    text = make_facts().experts[1]
    facts = make_facts(experts=(asked, text))
    models = {**facts.models, asked.pinned: facts.models[facts.base.pinned]}

    part = section(model_card(replace(facts, models=models)), "Made from")

    assert "| role | model | revision | commit | licence |" in part
    assert f"`v1.0` | [`bbbbbbbbbbbb`](<{HUB}/zoo/base/tree/{'b' * 40}>) | apache-2.0 |" in part
    assert "[`zoo/sums`](<https://huggingface.co/datasets/zoo/sums>) at [`000000000000`]" in part
    template = "Q: &#123;question&#125;&#92;nA: &#123;answer&#125;"
    assert f"| `train` | {template} | 63 | 1,234 | 2 |" in part


def test_local_folders_are_named_without_their_path_and_stay_out_of_the_metadata(make_facts):
    folder = "/home/mallory/models/mine"
    local = Source(folder, "model", None, "sha256:" + "c" * 64, (), Path(folder))
    silent = ModelFacts(folder, None, (), None)
    facts = make_facts(guided=None, scores=None)
    changed = replace(
        facts, experts=(facts.experts[0], local), models={**facts.models, local.pinned: silent}
    )

    card = model_card(changed)

    assert card.data.base_model == ["zoo/base", "zoo/math"]
    assert "and the local folder `mine` into" in card.text
    assert "| the local folder `mine` | – | content `cccccccccccc` | not stated |" in card.text
    assert "mallory" not in card.content


def test_costs_and_the_commands_to_make_it_again_are_shown(make_facts):
    part = section(model_card(make_facts()), "Make it again")

    assert (
        "```bash\npip install lewis-hub==0.1.0\n"
        'hf download me/zoo-merge --include "lewis/*" --local-dir .\n'
        "lewis-hub merge lewis/recipe.yaml\n```"
    ) in part
    assert "| calibrate | 12.3 s | 1.2 GB | 3.0 MB | 2.5 kB |" in part
    assert "| merge | 1 min 16 s | 250.0 MB | – | – |" in part
    assert "| all | 1 min 28 s |  |  |  |" in part
    assert "Peak memory is the peak of the process" not in part


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        (
            Machine("Intel(R) Xeon(R) <b>", 8, 33_000_000_000),
            "on 8 cores of Intel(R) Xeon(R) &#60;b&#62;, 33.0 GB of memory. Cached",
        ),
        (Machine("arm64", 1, None, "NVIDIA H100"), "on NVIDIA H100, and 1 core of arm64. Cached"),
    ],
)
def test_what_the_merge_was_made_on_and_with_is_told(make_facts, machine, told):
    part = section(model_card(make_facts(machine=machine)), "Make it again")

    assert told in " ".join(part.split())
    assert "Energy was not measured; [this calculator](https://mlco2.github.io/" in " ".join(
        part.split()
    )
    assert (
        "Made with [lewis_hub 0.1.0](<https://pypi.org/project/lewis-hub/>), torch 2.9.0." in part
    )


def test_a_stream_tells_what_came_by_ranges(make_facts):
    (first, second) = make_facts().costs
    costs = (replace(first, fetched_bytes=None), replace(second, fetched_bytes=6_945_024))

    part = section(model_card(make_facts(costs=costs)), "Make it again")

    assert "| stage | time | peak memory | read | written | downloaded in ranges |" in part
    assert "| calibrate | 12.3 s | 1.2 GB | 3.0 MB | 2.5 kB | – |" in part
    assert "| merge | 1 min 16 s | 250.0 MB | – | – | 6.9 MB |" in part
    assert "| all | 1 min 28 s |  |  |  |  |" in part


def test_a_peak_over_the_whole_process_is_labelled(make_facts):
    (first, _) = make_facts().costs
    slow = replace(first, seconds=7384.0, peak_over="process")

    part = section(model_card(make_facts(costs=(slow,))), "Make it again")

    assert "| calibrate | 2 h 3 min |" in part
    assert "Peak memory is the peak of the process since its start." in part


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        (None, {}),
        (Licence("mit"), {"license": "mit"}),
        (Licence("mit or apache-2.0"), {"license": ["mit", "apache-2.0"]}),
        (
            Licence("other", "Llama 3.1 Community", "https://x.org/l icence"),
            {
                "license": "other",
                "license_name": "llama-3.1-community",
                "license_link": "https://x.org/l%20icence",
            },
        ),
        (
            Licence("x: [y\n---\n", None, "javascript:alert(1)"),
            {"license": "other", "license_name": "x-y"},
        ),
    ],
)
def test_the_licence_is_one_that_the_hub_takes(make_facts, licence, metadata):
    found = card_data(make_facts(licence=licence)).to_dict()

    assert {key: found[key] for key in found if key.startswith("license")} == metadata


def stating(facts, *licences):
    """The same facts; base and experts state these licences."""
    pairs = zip(facts.models.items(), licences, strict=True)
    models = {
        pinned: replace(told, licence=licence and Licence(licence))
        for (pinned, told), licence in pairs
    }
    return replace(facts, models=models)


@pytest.mark.parametrize(
    ("stated", "licence", "chosen", "reasoning"),
    [
        (
            ("mit", "mit", "mit"),
            Licence("mit"),
            False,
            "The cards of all parents state mit. So this model has the same licence: mit.",
        ),
        (
            ("mit", "mit", "mit"),
            Licence("mit"),
            True,
            "The cards of all parents state mit. The publisher states the same licence for this "
            "model: mit.",
        ),
        (
            ("mit", "mit", "mit"),
            Licence("gemma"),
            True,
            "The cards of all parents state mit. The publisher states gemma for this model, on "
            "their own judgement.",
        ),
        (
            ("mit", "gemma", None),
            Licence("gemma"),
            True,
            f"The licences of the parents differ: [`zoo/base`](<{HUB}/zoo/base>) states mit; "
            f"[`zoo/math`](<{HUB}/zoo/math>) states gemma; [`zoo/text`](<{HUB}/zoo/text>) states "
            "none. The publisher states gemma for this model, on their own judgement; without such "
            "a statement lewis-hub refuses to publish.",
        ),
        (
            ("mit", "gemma", "mit"),
            None,
            False,
            f"The licences of the parents differ: [`zoo/base`](<{HUB}/zoo/base>) states mit; "
            f"[`zoo/math`](<{HUB}/zoo/math>) states gemma; [`zoo/text`](<{HUB}/zoo/text>) states "
            "mit. So none is stated here. Ask their owners before you use or share it.",
        ),
        (
            (None, None, None),
            None,
            False,
            "The cards of the parents state no licence. So none is stated here. Ask their owners "
            "before you use or share it.",
        ),
    ],
)
def test_the_licence_is_reasoned_from_the_parents(make_facts, stated, licence, chosen, reasoning):
    facts = stating(make_facts(licence=licence, licence_chosen=chosen), *stated)

    assert f"\n{reasoning}\n" in section(model_card(facts), "Made from")


def test_parents_that_mean_other_texts_by_one_name_do_not_agree(make_facts):
    facts = stating(make_facts(licence=None), "other", "other", "other")
    (base, told), *others = facts.models.items()
    linked = replace(told, licence=Licence("other", link="https://x.org/licence"))

    part = section(model_card(replace(facts, models={base: linked, **dict(others)})), "Made from")

    assert "The licences of the parents differ: [`zoo/base`]" in part
    assert "states [other](<https://x.org/licence>); " in part


def test_what_the_model_is_stands_in_a_list(make_facts):
    config = {"text_config": {"num_hidden_layers": 6, "max_position_embeddings": 2048}}
    facts = make_facts(
        config=config | {"architectures": ["Gemma3"]}, chat=False, licence=None, repo=None
    )
    silent = {key: replace(told, languages=()) for key, told in facts.models.items()}

    for told, lines in (
        (
            make_facts(),
            [
                "**Parameters:** 1,544 in bfloat16",
                "**Architecture:** `LlamaForCausalLM`, 6 blocks",
                "**Context:** 2,048 tokens",
                "**Vocabulary:** 49,152 tokens",
                "**Chat template:** yes",
                "**Languages:** en, according to its parents' cards",
                f"**Published by:** [me](<{HUB}/me>). Please send questions and reports to the "
                f"[discussions](<{HUB}/me/zoo-merge/discussions>).",
                "**Licence:** apache-2.0 ([reason](#made-from))",
            ],
        ),
        (
            replace(facts, models=silent),
            [
                "**Parameters:** 1,544 in bfloat16",
                "**Architecture:** `Gemma3`, 6 blocks",
                "**Context:** 2,048 tokens",
                "**Chat template:** none",
                "**Languages:** not in its parents' cards",
                "**Licence:** none stated ([reason](#made-from))",
            ],
        ),
    ):
        text = model_card(told).text
        what = text.partition("## What it is")[2].partition("## Intended use")[0]
        assert re.findall(r"^- (.*)$", what, flags=re.M) == lines
        assert "[lewis/report.html](lewis/report.html) shows the data behind this card" in text


@pytest.mark.parametrize("broken", [{}, {"architectures": "x", "vocab_size": "many"}])
def test_a_configuration_that_says_nothing_of_use_is_no_error(make_facts, broken):
    text = model_card(make_facts(config=broken)).text

    assert "**Architecture:**" not in text
    assert "**Vocabulary:**" not in text


def test_the_intended_use_names_what_was_tested(make_facts):
    scored, unscored = (
        section(model_card(make_facts(scores=scores, chat=False)), "Intended use")
        for scores in (make_facts().scores, None)
    )

    meant = "- **Intended for:** text generation. See "
    assert f"{meant}[`zoo/base`](<{HUB}/zoo/base>), " in scored
    assert "Only `sums` was measured here." in scored
    assert "Nothing was measured here." in unscored


def test_a_picture_whose_colours_end_early_says_so_beneath(make_facts):
    facts = make_facts()
    maps = replace(facts.guided.maps, note="Colours end at 20 % <b>.")

    card = model_card(replace(facts, guided=replace(facts.guided, maps=maps)))

    assert "</picture>\n\nA caption. Colours end at 20 % &#60;b&#62;.\n" in card.text


def test_scores_that_are_not_finite_stay_out_of_the_metadata(make_facts, make_scores):
    card = model_card(make_facts(scores=make_scores(merged=float("nan"))))

    assert "model-index" not in card.content
    assert "| **this merge** | nan" in card.text
