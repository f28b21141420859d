"""A comparison of runs in words: one sentence, cautions, and tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_uppercase

from peftopt.decision.comparing import ERROR, Compared, ComparedRun, Comparison, Contrast, Differing, Judged
from peftopt.metrics import counted, described, format_value, percent
from peftopt.records import Interval, Outcome
from peftopt.report import words
from peftopt.report.fingerprint import VARIANT
from peftopt.report.words import MISSING, Table, clean

MOST = len(ascii_uppercase)
"""Most runs to compare: each has a letter."""

UNKNOWN = "not known"

MODEL = ("base", "adapter", "adapter_shape", "tokenizer")
"""The hashes of a run's model files; the other hashes are of prompts."""

ABOUT_VALUES = (
    "Each value is a ratio to that run's own baseline, with its 95 % interval. Critical errors and other values that "
    "compare with the baseline already are shown as they are. Times of two runs are only compared as such ratios."
)
ABOUT_VERDICTS = (
    "Each run was judged alone, by its own recipe: a changed verdict is not by itself a measured difference."
)
ABOUT_DIFFERING = "Possible reasons for the differences below. Anything that is not listed is equal, or not known."


def sentence(comparison: Comparison) -> str:
    """Which variants the runs ship, how many values differ, and which verdicts and rules changed."""
    contrasts = [contrast for value in comparison.values for contrast in value.contrasts if contrast.statement]
    differ = sum(contrast.statement == "differs" for contrast in contrasts)
    of_values = f"{differ} of {len(contrasts)} compared values differ"
    return f"{'; '.join([_choice(comparison.runs), of_values, *_changes(comparison.verdicts)])}."


def _changes(verdicts: Sequence[Judged]) -> list[str]:
    """Variants whose verdict changed, and variants with changed rules beneath the same verdict."""
    if not verdicts:
        return ["no variant is shared"]
    variants = [verdict.variant for verdict in verdicts if verdict.changed and not verdict.rule]
    rules = [verdict for verdict in verdicts if verdict.changed and verdict.rule and verdict.variant not in variants]
    parts = [f"judged differently: {', '.join(variants)}" if variants else "all shared variants have the same verdict"]
    if rules:
        names = ", ".join(dict.fromkeys(verdict.variant for verdict in rules))
        parts.append(f"{counted(len(rules), 'rule')} changed beneath the same verdict: {names}")
    return parts


def _choice(runs: Sequence[ComparedRun]) -> str:
    chosen = [run.decision.chosen for run in runs]
    if len(set(chosen)) == 1:
        every = "Both runs" if len(runs) == 2 else f"All {len(runs)} runs"
        return f"{every} ship {chosen[0]}" if chosen[0] else f"{every} keep the adapter as it is served"
    return ", ".join(f"{run} ships {name}" if name else f"{run} ships nothing new" for run, name in labelled(chosen))


def labelled(values: Sequence[str | None]) -> Iterator[tuple[str, str | None]]:
    """Each run's letter with its value."""
    return zip(ascii_uppercase, values, strict=False)


def cautions(comparison: Comparison) -> list[str]:
    """Differences between the runs that a reader must know before the numbers."""
    differing = comparison.differing
    lines = []
    if _differ(differing, "machine", ("cpu", "cores", "gpu")):
        lines.append(
            "the machines differ: times and memory are compared only as ratios to each run's own baseline, and a ratio "
            "may itself depend on the machine"
        )
    bases = {run.decision.baseline for run in comparison.runs}
    chains = [each for each in differing if each.topic in {VARIANT + name for name in bases} and each.name == "chain"]
    if len(bases) > 1 or chains:
        lines.append("the baselines differ: a ratio to one is not a ratio to the other")
    if _differ(differing, "model", ("base", "adapter", "base and adapter")) or _differ(differing, "contents", MODEL):
        lines.append("the models differ: each is compared with its own baseline")
    contents = [each.name for each in differing if each.topic == "contents" and each.name not in MODEL]
    if contents or _differ(differing, "prompts"):
        lines.append("the prompts differ: differences of answers and times may come from them")
    unlike = [value.variant for value in comparison.values if _differ(differing, VARIANT + value.variant, ("chain",))]
    if unlike:
        lines.append(f"same name, other steps: {', '.join(dict.fromkeys(unlike))}")
    return [clean(line) for line in lines]


def remarks(comparison: Comparison) -> list[str]:
    """What is not compared: variants that only some runs have, and data that folders lack."""
    lines = []
    for having in dict.fromkeys(comparison.only.values()):
        names = ", ".join(name for name, runs in comparison.only.items() if runs == having)
        lines.append(f"only {_those(having)} measured {names}")
    lacks = dict.fromkeys(lack for run in comparison.runs for lack in run.lacks)
    for lack in lacks:
        lines.append(f"{_those([n for n, run in enumerate(comparison.runs) if lack in run.lacks])}: {lack}")
    return [clean(line) for line in lines]


def _those(runs: Sequence[int]) -> str:
    """The letters of some runs: "A", "A and C", "A, B and D"."""
    *most, last = (ascii_uppercase[n] for n in runs)
    return f"{', '.join(most)} and {last}" if most else last


def _differ(differing: Sequence[Differing], topic: str, names: Sequence[str] = ()) -> bool:
    return any(each.topic == topic and (not names or each.name in names) for each in differing)


def how_sure(comparison: Comparison) -> str:
    """The error rate of all statements together, and the test behind them."""
    family = counted(comparison.family, "test")
    return (
        f"“differs” is said with an error of {percent(ERROR)} for all {family} together: Welch's t on the standard "
        f"errors that the two intervals show (of ratios, on their logs), each at {percent(comparison.level, 2)} "
        "(Bonferroni). “none shown” is not a proof of equality: its interval contains the differences that the data "
        "allow. Sizes on disk are exact and need no test."
    )


# ---- tables ----------------------------------------------------------------------------------------


def runs(comparison: Comparison) -> Table:
    """A row for each run: its letter, its folder, its decision."""
    body = [
        [
            label,
            run.name,
            run.decision.recipe,
            run.decision.baseline,
            run.decision.minimize,
            run.decision.chosen or MISSING,
            run.decision.outcome,
        ]
        for label, run in zip(ascii_uppercase, comparison.runs, strict=False)
    ]
    return ["run", "folder", "recipe", "baseline", "minimize", "ships", "outcome"], _clean(body)


def differing(comparison: Comparison) -> Table:
    """A row for each fact that differs."""
    body = [[_fact(each), *(text or UNKNOWN for text in each.texts)] for each in comparison.differing]
    return ["what", *_letters(comparison)], _clean(body)


def _fact(each: Differing) -> str:
    return f"{each.topic.removeprefix(VARIANT)}: {each.name}"


def values(comparison: Comparison, others: Sequence[int] = ()) -> Table:
    """A row for each metric of each variant: each run's value, and the comparison of each further run with the first.
    `others`: only these further runs (1 = the second)."""
    letters = _letters(comparison)
    shown = others or range(1, len(letters))
    columns = [letters[n] for n in (0, *shown)]
    header = ["variant", "metric", *columns, *(f"{letters[n]} against {letters[0]}" for n in shown)]
    body = []
    for value in comparison.values:
        contrasts = [value.contrasts[n - 1] for n in shown]
        if others and not any(each.statement for each in contrasts):
            continue
        cells = [_value(value, value.values[n]) for n in (0, *shown)]
        body.append([value.variant, title(value.metric), *cells, *(contrast(value, each) for each in contrasts)])
    return header, _clean(body)


def title(metric: str) -> str:
    """A metric's title in reports: "speed@chat"."""
    spec = described(metric)
    _, at, workload = metric.partition("@")
    return f"{spec.title if spec else metric}{at}{workload}"


def _value(compared: Compared, value: Interval | None) -> str:
    return words.figure("ratio" if compared.scale == "ratio" else compared.metric, value)


def contrast(compared: Compared, each: Contrast) -> str:
    """ "differs 1.31x (1.01–1.68)", "none shown (0.69–1.25)", "cannot be told", "the same"."""
    value = each.value
    if value is None or not each.statement:
        return MISSING
    if each.statement == "same":
        return "the same"
    if each.statement == "cannot be told":
        return each.statement
    if compared.scale == "ratio":
        middle, space, bounds = words.figure("ratio", value).partition(" ")
    else:
        middle, low, high = (_signed(compared.metric, x) for x in (value.estimate, value.low, value.high))
        space, bounds = " ", f"({low} to {high})"
    return f"differs {middle}{space}{bounds}" if each.statement == "differs" else f"none shown {bounds}"


def _signed(metric: str, x: float) -> str:
    shown = format_value(metric, x)
    return f"+{shown}" if x > 0 else shown


def verdicts(comparison: Comparison) -> Table:
    """A row for each variant, and beneath it one for each of its rules that the runs judge differently."""
    shown = [verdict for verdict in comparison.verdicts if not verdict.rule or verdict.changed]
    body = [[v.variant, v.rule or "verdict", *_outcomes(v), "changed" if v.changed else MISSING] for v in shown]
    return ["variant", "rule", *_letters(comparison), "changed"], _clean(body)


def _outcomes(verdict: Judged) -> list[str]:
    decided = verdict.decided_by or [""] * len(verdict.outcomes)
    return [_outcome(outcome, rule) for outcome, rule in zip(verdict.outcomes, decided, strict=True)]


def _outcome(outcome: Outcome | None, rule: str) -> str:
    if outcome is None:
        return MISSING
    return f"{outcome} ({rule})" if rule else outcome


def unshared(comparison: Comparison) -> list[str]:
    """Rules by which only some runs judge a variant, in words."""
    lines = []
    for verdict in comparison.verdicts:
        having = [n for n, outcome in enumerate(verdict.outcomes) if outcome]
        if verdict.rule and not verdict.changed:
            outcome = next(outcome for outcome in verdict.outcomes if outcome)
            lines.append(clean(f"{verdict.variant}, {verdict.rule}: only in {_those(having)}, {outcome}"))
    return lines


def same(comparison: Comparison) -> list[tuple[str, str]]:
    """The facts that are known of all runs and equal, by topic."""
    return [(clean(topic), clean(", ".join(names))) for topic, names in comparison.same.items() if names]


def _letters(comparison: Comparison) -> list[str]:
    return list(ascii_uppercase[: len(comparison.runs)])


def _clean(body: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[clean(cell) for cell in row] for row in body]
