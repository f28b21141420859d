"""The words of a report, for who reads one for the first time. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from peftopt.metrics import described

HOW_TO_READ = (
    "0.81x (0.78–0.84) is a ratio to the baseline and its interval, the range of true ratios that the data allow: at "
    "95 % where no other level is said. Below 1 is faster; an interval that holds 1 shows no difference. The speed "
    "that is minimized has the interval by which it is judged, at a higher level, since it is looked at more than once "
    "and every variant shares the error; memory and load time show the range of their launches.",
    "Ratios are paired: every variant ran once in each block, in random order, so what the machine did to one it "
    "did to all. The baseline's own row is a second copy against itself: the noise that a gain has to exceed.",
    "Inconclusive means that the interval still holds the limit. It is not a pass: measure more.",
    "Critical errors carry their n: 0 of 320 shows a rate below 0.93 %, no less; “below 1 %” takes 299 prompts.",
)

TERMS = {
    "variant": "A way to serve the adapter: a chain of techniques on an engine.",
    "baseline": "The adapter as it is served today. All variants are compared with it.",
    "merge, quantize, compile": "The adapter folded into the base's weights; weights in fewer bits; the model's steps "
    "turned into one program.",
    "accepted": "Every rule of the variant is shown to hold.",
    "rejected": "One rule is shown not to hold.",
    "inconclusive": "The measurements allow both. More of them would tell.",
    "not judged": "Nothing could be measured, or it is the baseline.",
    "decided by": "The first rule that turned the variant down or left it open; of an accepted one the rule that shows "
    "its gain.",
    "block": "One turn of each variant, in random order. Ratios are taken within a block.",
    "launch": "The life of one process of a variant. Its blocks share its fate.",
    "disturbed": "Something else took processors, memory or power during the block. It is kept: it is noise, no bias.",
    "workload": "The requests that were timed, such as short prompts one by one or many at once.",
    "P50, P95": "Half of the requests are faster than P50, 95 of 100 are faster than P95.",
    "TTFT, TPOT": "Time to the first token; mean time of each token after it.",
    "n": "How many blocks, prompts or launches a value rests on.",
    "critical error": "An answer that only the variant breaks: empty, endless, unreadable, or wrong where the prompt "
    "is tagged as critical.",
    "near tie": "A critical answer that turned on a token which the adapter itself hardly preferred. It is named and "
    "not counted.",
    "flip": "A prompt that one of the two answers right and the other wrong.",
    "KL divergence": "How far two models' expectations of the next token lie apart, in nats. 0 is the same.",
    "perplexity": "How surprised a model is by the right answers, here over the baseline's. Above 1.00x is worse.",
    "certificate": "What was checked of a merged model before anything was measured.",
}
"""Terms of the page and what they mean."""


def glossary(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """The terms, and the metrics that the page has a column of, each with its meaning."""
    specs = [spec for spec in (described(metric) for metric in dict.fromkeys(metrics)) if spec]
    columns = {spec.title: f"{spec.meaning[:1].upper()}{spec.meaning[1:]}." for spec in specs}
    return [*TERMS.items(), *((title, meaning) for title, meaning in columns.items() if title not in _KNOWN)]


_KNOWN = {*TERMS, "P50", "P95", "critical errors"}
