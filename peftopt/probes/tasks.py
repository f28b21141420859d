"""A task of lm-evaluation-harness, asked of an open engine: the harness's questions and scores, our answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftopt import progress
from peftopt.engines import Engine
from peftopt.errors import BadInput, MissingEnvironment
from peftopt.loadtest.importers.lm_eval import scores
from peftopt.measurements import Sample, Task
from peftopt.probes import quality
from peftopt.records import YAML, task_name

BATCH = 16
"""Requests that are answered together, as many as their length allows."""

LONGEST = 2048
"""Tokens of a text whose likelihood is asked for as a whole; a longer one goes in windows."""


def run(engine: Engine, given: str, rows: int) -> Task:
    """The task's score of each row, by its first metric.

    `given` is a name that the harness knows, or the path of a task file; data files that it names are looked for
    beside it. At most `rows` rows (0 = all). The chat template is applied where there is one, and answers are greedy.
    Source: lm_eval.evaluator.simple_evaluate, lm-evaluation-harness 0.4. Raises BadInput for a task that the harness
    cannot load, and MissingEnvironment without the harness.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise MissingEnvironment("lm-evaluation-harness is not installed", "pip install 'peftopt[eval]'") from error

    name, home = task_name(given), Path(given).resolve().parent if given.endswith(YAML) else None
    asked = _harness(engine)
    with contextlib.chdir(home or Path.cwd()):
        try:
            found = lm_eval.simple_evaluate(
                asked,
                tasks=[name],
                limit=rows or None,
                task_manager=TaskManager(include_path=str(home) if home else None, include_defaults=home is None),
                apply_chat_template=bool(asked.tokenizer.chat_template),
                bootstrap_iters=0,
            )
        except (KeyError, ValueError, OSError) as error:
            hint = "`lm_eval ls tasks` lists what it knows; data from a hub has to be in the cache already"
            raise BadInput(f"lm-evaluation-harness cannot run {given}: {error}", hint) from error
    told = scores(found["samples"])
    samples = tuple(Sample(**sample) for sample in told.pop("samples"))
    return Task(source=f"lm-evaluation-harness {lm_eval.__version__}", task=name, samples=samples, **told)


def _harness(engine: Engine) -> Any:
    """The engine as one of the harness's models."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Asked(TemplateLM):  # type: ignore[misc]
        """See lm_eval.api.model.LM for what each method promises."""

        tokenizer = engine.tokenizer
        tokenizer_name = str(getattr(tokenizer, "name_or_path", ""))

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            add = not self.tokenizer.chat_template if add_special_tokens is None else add_special_tokens
            return list(self.tokenizer(string, add_special_tokens=add).input_ids)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, answer) for _, context, answer in requests]
            return _in_batches(pairs, lambda pair: len(pair[0]) + len(pair[1]), self._likelihoods)

        def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            if not engine.scores:
                hint = "choose a task that generates"
                raise BadInput("this engine only generates, and the task asks for likelihoods", hint)
            found = engine.score([context for context, _ in pairs], [answer for _, answer in pairs])
            return [(sum(s.logprobs), s.best == list(answer)) for s, (_, answer) in zip(found, pairs, strict=True)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, LONGEST, 1)
            asked = [(context, answer) for context, answer in map(make_disjoint_window, windows)]
            return sum(logprob for logprob, _ in self._likelihoods(asked))

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            wanted = [(self.tok_encode(context), dict(settings)) for context, settings in (r.args for r in requests)]
            if any(settings.get("do_sample") and settings.get("temperature") for _, settings in wanted):
                raise BadInput("the task samples its answers, and here they are greedy", "set do_sample: false in it")
            return _in_batches(wanted, lambda each: len(each[0]), self._answers)

        def _answers(self, wanted: Sequence[tuple[list[int], dict[str, Any]]]) -> list[str]:
            most = max(int(settings.get("max_gen_toks", 256)) for _, settings in wanted)
            found = engine.generate([prompt for prompt, _ in wanted], most, stop=True)
            return [
                _until(engine.decode(g.tokens), settings.get("until") or ())
                for g, (_, settings) in zip(found, wanted, strict=True)
            ]

    return Asked()


@dataclass(frozen=True)
class _Question:
    """What is asked, which number it has in the task, and its length in tokens."""

    number: int
    asked: Any
    length: int


def _in_batches(asked: Sequence[Any], length: Callable[[Any], int], answer: Callable[[list[Any]], Any]) -> list[Any]:
    """Answers in the order of the questions, those of about one length asked together."""
    questions = [_Question(n, one, length(one)) for n, one in enumerate(asked)]
    found: dict[int, Any] = {}
    for group in quality.batches(sorted(questions, key=lambda q: q.length), BATCH):
        found |= zip((q.number for q in group), answer([q.asked for q in group]), strict=True)
        progress.report("tasks", len(found), len(asked))
    return [found[n] for n in range(len(asked))]


def _until(text: str, stops: str | Sequence[str]) -> str:
    """A text up to the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
