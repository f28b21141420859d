"""Drift of answer lengths: whether a variant talks longer or shorter than the baseline."""

from __future__ import annotations

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision, VariantDecision
from peftopt.report import words
from peftopt.report.plots import axes
from peftopt.report.plots.axes import Scale
from peftopt.report.plots.picture import Figure, kind_of
from peftopt.report.plots.rows import Row, Rows

STRIP = 16
FEWEST = 10
"""Prompts from which a distribution is drawn."""


def ratios(evidence: Evidence, variant: str) -> list[float]:
    """Tokens of each answer over those of the baseline's to the same prompt; of the baseline its second run's."""
    reference = evidence.rows(evidence.baseline)
    ours = evidence.rows(variant, 2) if variant == evidence.baseline else evidence.rows(variant)
    shared = sorted(ours.keys() & reference.keys())
    return [max(ours[row].new_tokens, 1) / max(reference[row].new_tokens, 1) for row in shared]


def figure(decision: Decision, evidence: Evidence) -> Figure | None:
    """The lengths of answers that end by themselves; None where none were checked, or all are as long."""
    found = {variant.name: ratios(evidence, variant.name) for variant in decision.variants}
    kept = [variant for variant in decision.variants if len(found[variant.name]) >= FEWEST]
    if not any(ratio != 1 for variant in kept for ratio in found[variant.name]):
        return None
    means = {variant.name: variant.figures.get("length") for variant in kept}
    edges = [x for mean in means.values() if mean for x in (mean.estimate, mean.low, mean.high)]
    edges += [x for variant in kept for x in axes.central(found[variant.name], 0.96)]
    across = Scale.around([1.0, *edges], log=True)
    title = f"Length of answers against {decision.baseline}'s"
    rows_ = Rows(title, [_row(decision, variant, found[variant.name]) for variant in kept], STRIP)
    rows_.axis([(share, f"{value:g}x") for share, value in across.ticks(first=[1.0])])
    rows_.through(across.at(1), "one")
    for number, variant in enumerate(kept):
        group, top = rows_.row(number)
        rows_.spread(number, group, across, found[variant.name])
        mean = means[variant.name]
        if mean and axes.drawable(mean.estimate, log=True):
            middle = top + STRIP / 2
            low, high = across.ends(mean)
            rows_.picture.line((low, middle), (high, middle), "interval", group)
            rows_.picture.dot((across.at(mean.estimate), middle), 4.5, "estimate", group)
    return Figure(
        title=title,
        caption=f"Tokens of an answer over those of {decision.baseline}'s to the same prompt, log scale: right of 1x "
        "is longer. The large dot is the ratio of all tokens with its interval. Behind it are the prompts: the line "
        "from P5 to P95, the band their middle half, dots the outermost. "
        f"{decision.baseline}'s own row is its second run: the drift that chance gives.",
        svg=str(rows_.picture),
        command="peftopt export-data RUN --table answers --to answers.csv",
        table=(
            ["variant", "prompts", "shorter", "as long", "longer", "all tokens"],
            [_cells(variant, found[variant.name]) for variant in kept],
        ),
        secondary=True,
    )


def _row(decision: Decision, variant: VariantDecision, of_prompts: list[float]) -> Row:
    value = words.figure("length", variant.figures.get("length"))
    shorter, longer = _counts(of_prompts)
    hint = f"{variant.name}: {value}; of {len(of_prompts)} answers {shorter} are shorter and {longer} longer"
    name = f"{variant.name}, second run" if variant.name == decision.baseline else variant.name
    return Row(name, kind_of(variant.name, variant.outcome, decision.baseline), value, hint)


def _counts(of_prompts: list[float]) -> tuple[int, int]:
    """How many are shorter, and longer."""
    return sum(ratio < 1 for ratio in of_prompts), sum(ratio > 1 for ratio in of_prompts)


def _cells(variant: VariantDecision, of_prompts: list[float]) -> list[str]:
    shorter, longer = _counts(of_prompts)
    same = len(of_prompts) - shorter - longer
    counts = (len(of_prompts), shorter, same, longer)
    return [words.clean(variant.name), *map(str, counts), words.figure("length", variant.figures.get("length"))]
