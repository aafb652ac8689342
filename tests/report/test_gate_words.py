"""What the quality gate found, in words for a card and for a message."""

from lewis_hub.evaluate.gate import Check, GateVerdict
from lewis_hub.report.findings import gate_section, gate_sentences, refusal

PASSED = Check("gsm8k", "exact_match,strict", "uniform", 0.0, "stop", True, 0.5, 0.4, 0.1, (0, 0.2))
MISSED = Check(
    "wiki",
    "ppl,none",
    "expert:me/x@c0ffee0123456789c0ffee0123456789c0ffee01",
    0.5,
    "stop",
    False,
    9.0,
    7.0,
    2.0,
    (1.0, 3.0),
)
UNKNOWN = Check(
    "gsm8k", "acc,none", "me/y", 0.0, "stop", True, 0.5, why="the repo does not exist yet"
)


def test_each_check_is_a_sentence_and_what_was_missed_comes_first():
    assert list(gate_sentences(GateVerdict((PASSED, MISSED, UNKNOWN)))) == [
        "On wiki (ppl) the merged model is worse than me/x: 9.000 against 7.000 (difference "
        "+2.000, 95 % interval +1.000 to +3.000, tolerance 0.500).",
        "On gsm8k (exact_match,strict) the merged model is not significantly worse than its "
        "uniform twin: 0.500 against 0.400 (difference +0.100, 95 % interval 0.000 to +0.200).",
        "On gsm8k (acc) the merged model is not compared with me/y: the repo does not exist yet.",
    ]


def test_a_refusal_tells_only_what_was_missed():
    assert refusal(GateVerdict((PASSED, MISSED))).startswith(
        "on wiki (ppl) the merged model is worse than me/x: "
    )
    assert "gsm8k" not in refusal(GateVerdict((PASSED, MISSED)))


def test_names_on_the_card_are_shown_as_they_are():
    evil = Check("<img src=x>", "a|b,none", "base", 0.0, "stop", True, 1.0, 1.0, 0.0, (0.0, 0.0))

    section = gate_section(GateVerdict((evil,)))

    assert "The gate accepted this merge." in section
    assert "<img" not in section
    assert "a|b" not in section
