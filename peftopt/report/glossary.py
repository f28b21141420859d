"""The terms of a report, for first-time readers. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from peftopt.metrics import described

HOW_TO_READ = (
    "0.81x (0.78–0.84) is a ratio to the baseline and its interval: the range of true ratios that fit the data, at "
    "95 % unless another level is given. Below 1 is faster; an interval that contains 1 shows no difference. The "
    "minimized speed has the interval that judges it. Its level is higher, since the race is judged more than once and "
    "all variants share the error. Memory and load time show the range over their launches.",
    "Ratios are paired: every variant ran once in each block, in random order, so a change of the machine affects all "
    "of them. The baseline's own row is a second copy of it against itself: the noise that a gain has to exceed.",
    "Inconclusive means that the interval still contains the limit. It is not a pass: measure more.",
    "Critical errors carry their n: 0 of 320 shows a rate below 0.93 %, not lower; “below 1 %” needs 299 prompts.",
)

TERMS = {
    "variant": "A way to serve the adapter: a chain of techniques on an engine.",
    "baseline": "The adapter as it is served today. All variants are compared with it.",
    "merge, quantize, compile": "The adapter folded into the base's weights; weights in fewer bits; the model's steps "
    "turned into one program.",
    "accepted": "Every rule of the variant is shown to hold.",
    "rejected": "One rule is shown not to hold.",
    "inconclusive": "The measurements allow both. More measurements would decide.",
    "not judged": "Nothing could be measured, or it is the baseline.",
    "decided by": "The first rule that rejected the variant or left it open; for an accepted variant, the rule that "
    "shows its gain.",
    "block": "One turn of each variant, in random order. Ratios are taken within a block.",
    "launch": "One process of a variant, from start to end. What affects a launch affects all its blocks.",
    "disturbed": "Other work took processors, memory or power during the block. It still counts: noise, not bias.",
    "workload": "The timed requests, such as short prompts one by one or many at once.",
    "P50, P95": "Half of the requests are faster than P50, 95 of 100 are faster than P95.",
    "TTFT, TPOT": "Time to the first token; mean time of each token after it.",
    "n": "The number of blocks, prompts or launches behind a value.",
    "critical error": "An answer that only the variant breaks: empty, endless, unreadable, or wrong where the prompt "
    "is tagged as critical.",
    "near tie": "A wrong answer to a critical prompt that depends on a token that the adapter itself hardly preferred. "
    "It is named and not counted.",
    "flip": "A prompt that the baseline answers right and the variant wrong, or the other way round.",
    "KL divergence": "How much two models' predictions of the next token differ, in nats. 0 is no difference.",
    "perplexity": "How unlikely a model finds the right answers, over the baseline's. Above 1x is worse.",
    "certificate": "The checks of a merged model before anything was measured.",
}
"""The terms of the page with their meanings."""


def glossary(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """The terms and the page's metrics, each with its meaning."""
    specs = [spec for spec in (described(metric) for metric in dict.fromkeys(metrics)) if spec]
    columns = {spec.title: f"{spec.meaning[:1].upper()}{spec.meaning[1:]}." for spec in specs}
    return [*TERMS.items(), *((title, meaning) for title, meaning in columns.items() if title not in _KNOWN)]


_KNOWN = {*TERMS, "P50", "P95", "critical errors"}
