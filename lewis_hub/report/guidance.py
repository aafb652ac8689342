"""What a card says of its guide: what it decided, from what, and when that pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lewis_hub.report import markdown
from lewis_hub.report.citations import GUIDES
from lewis_hub.report.facts import Guided
from lewis_hub.report.plots import PAIRED, WORDS

IMPORTANCE = ("lewis", "lewis_reference")
WHY = {  # of a guide that we know: how the sentence about its densities ends
    "lewis": ", from how importance on calibration texts changed from base to expert",
    "lewis_reference": ", from how importance on calibration texts, as the authors' own procedure "
    "measures it, changed from base to expert",
    "magnitude": ", from how far the weights moved, relative to the base's",
    "activation_shift": ", from how much a module's output on calibration texts differs from base "
    "to expert",
    "aim": ", the less, the more evenly the input channels matter to the base on calibration texts",
    "owl": ", from each block's share of outliers in the expert on calibration texts",
    "random": "; as a control, the densities of LEWIS were dealt out at random among the blocks",
    "inverse": "; as a control, the densities of LEWIS were turned upside down",
}
HOW = {  # the two guides of one paper measure it
    "lewis": "Importance was measured in one forward pass of each unpruned model, over the texts' "
    "own tokens. The procedure that the authors published, guide `lewis_reference`, differs: texts "
    "are padded and padding counts, no mask is handed on, each measured block is pruned to half "
    "before the next one runs, sums over a text's tokens are averaged over texts, and shares are "
    "rounded to 5 decimals.",
    "lewis_reference": "Importance was measured by the procedure that the authors published: texts "
    "were padded and padding counted, no mask was handed on, each measured block was pruned to "
    "half before the next one ran, sums over a text's tokens were averaged over texts, and shares "
    "were rounded to 5 decimals. Guide `lewis` differs: it takes one forward pass of the unpruned "
    "model over the texts' own tokens.",
}


def sentence(guided: Guided) -> str:
    """What the guide decided, in Markdown."""
    paper = GUIDES.get(guided.guide)
    name = guided.guide.upper().replace("_", " ") if paper else guided.guide
    guide = markdown.link(markdown.text(name), paper.url if paper else None)
    experts, why = guided.schedule.experts, WHY.get(guided.guide, "")
    weights = _spread(expert.weights for expert in experts)
    if weights and not any(expert.tensors for expert in experts):
        return (
            f"The guide {guide} multiplied each expert's weight by a factor of its own in every "
            f"weight matrix of the blocks: {weights}{why}."
        )
    densities = _spread(expert.tensors for expert in experts) or "1.00"
    also = f" It multiplied the expert's weight there by a factor: {weights}." if weights else ""
    return (
        f"Of each task vector (expert minus base) the guide {guide} kept a fraction of its own in "
        f"every weight matrix of the blocks: {densities}{why}.{also}"
    )


def measured_how(guided: Guided) -> str:
    """What tells the guide's measure from one that is nearly the same; nothing of most."""
    return HOW.get(guided.guide, "")


def picture_note(guided: Guided) -> str:
    """What the pictures show."""
    told = "Density is the fraction of an expert's task vector that was kept."
    measures = guided.profile.measures if guided.profile else ()
    if not measures:
        return told
    first = measures[0]
    if first in IMPORTANCE:
        return (
            "The maps of importance show, per module, how much the calibration texts' weighted "
            "activations changed from base to expert, relative to the base. The guide shares each "
            "component's change out over the blocks; the maps of density show what it kept. "
        ) + told
    what = WORDS.get(first, first)
    how = "relative to the base" if first in PAIRED else "and its change from base to expert"
    return f"The first map shows, per module, the {what}, {how}. {told}"


def limits(guided: Guided) -> Iterator[str]:
    """What a reader should beware of."""
    yield from (markdown.text(note) for note in guided.notes)
    if guided.profile and any(entry.n_tokens for entry in guided.profile.sources):
        yield (
            "The densities suit tasks that resemble the calibration texts; elsewhere they may "
            "help nothing."
        )


def _spread(values: Iterator[Mapping[str, float]]) -> str:
    """The lowest and the highest of all; nothing where there are none."""
    every = [value for one in values for value in one.values()]
    if not every:
        return ""
    low, high = min(every), max(every)
    return f"{low:.2f}" if low == high else f"between {low:.2f} and {high:.2f}"
