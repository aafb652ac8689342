from pathlib import Path

import pytest

from lewis_hub.display import TextTable, to_html
from lewis_hub.evaluate.scores import MetricScore, Scores, TaskScores
from lewis_hub.guides.schedule import DensitySchedule, ExpertSchedule
from lewis_hub.hub.publish import Published
from lewis_hub.pipeline import Merged
from lewis_hub.workflow.calibrate import Calibrated
from lewis_hub.workflow.check import CheckReport, SourceReport
from lewis_hub.workflow.verify import Verdict

URL = "https://hub/me/<merge>"
PUBLISHED = Published("me/merge", URL, "c" * 40, f"{URL}/commit/c", changed=True)
EXPERT = f"expert:org/<math>@{'a' * 40}"
SCORES = Scores(
    {
        "gsm8k": TaskScores(
            n=1319,
            version="1",
            models={
                "base": {"exact_match,none": MetricScore(0.25, 0.012)},
                EXPERT: {"exact_match,none": MetricScore(0.5, None)},
                "merged": {},
            },
            paired=(),
        )
    }
)
SCORED = "gsm8k, exact_match,none (n = 1,319): base 0.250 ± 0.012, org/<math> 0.500, merged -"
REPORT = CheckReport(
    sources=(
        SourceReport("base", "a/b@main", "c" * 40, 2_500_000, "BF16", 10, 8, None, tied=True),
    ),
    problems=("a <b> does not fit",),
    notes=(),
    download_bytes=1,
    output_bytes=2_000,
    disk_bytes=3_000_000,
    states_bytes=0,
    memory_bytes=4_000_000_000,
)
SCHEDULE = DensitySchedule((ExpertSchedule("org/math", 1.0, {"a.weight": 0.25, "b.weight": 0.75}),))


class Lock:
    digest = "sha256:0123456789abcdef"


def test_html_is_a_table_and_lines_with_all_texts_escaped():
    table = TextTable(("<a>", "b"), (("&", "'"),))

    assert to_html(table, "x < y") == (
        "<table><thead><tr><th>&lt;a&gt;</th><th>b</th></tr></thead>"
        "<tbody><tr><td>&amp;</td><td>&#x27;</td></tr></tbody></table><div>x &lt; y</div>"
    )


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (SCORES, SCORED),
        (PUBLISHED, f"Published {URL} ({URL}/commit/c)"),
        (Merged("merged", Path("out"), SCORES), f"Merged into out\n{SCORED}"),
        (Merged("unchanged", Path("out"), None), "Nothing changed: this merge is in out"),
        (
            Merged("unchanged", Path("out"), None, published=PUBLISHED),
            f"Published {URL} ({URL}/commit/c)",
        ),
        (
            REPORT,
            "download 1 B, disk 3.0 MB, memory at most 4.0 GB, merged model 2.0 kB\n"
            "problem: a <b> does not fit",
        ),
        (
            Calibrated(Path("out"), None, SCHEDULE, {"a.weight": 1, "b.weight": 1}),
            "Calibrated, in out\n"
            "org/math: 2 tensors scheduled, mean 0.500, from 0.250 to 0.750 at b",
        ),
        (
            Verdict(Lock, (), 7, "none"),
            "7 files match the lock sha256:0123456789ab…; signature: none",
        ),
        (Verdict(Lock, ("a: b",), 7, "none"), "problem: a: b"),
    ],
)
def test_a_result_is_shown_in_a_few_lines(result, text):
    assert repr(result) == text


def test_a_notebook_shows_scores_and_sources_as_tables():
    assert SCORES._repr_html_() == (
        "<table><thead><tr><th>task</th><th>metric</th><th>n</th><th>base</th>"
        "<th>org/&lt;math&gt;</th><th>merged</th></tr></thead>"
        "<tbody><tr><td>gsm8k</td><td>exact_match,none</td><td>1,319</td><td>0.250 ± 0.012</td>"
        "<td>0.500</td><td>-</td></tr></tbody></table>"
    )
    assert Merged("merged", Path("<o>"), SCORES)._repr_html_() == (
        f"<div>Merged into &lt;o&gt;</div>{SCORES._repr_html_()}"
    )
    assert "<td>a/b@main</td><td>cccccccc</td><td>2.5 MB</td>" in REPORT._repr_html_()
    assert "<div>problem: a &lt;b&gt; does not fit</div>" in REPORT._repr_html_()
    assert PUBLISHED._repr_html_().startswith("<div>Published https://hub/me/&lt;merge&gt; (")
