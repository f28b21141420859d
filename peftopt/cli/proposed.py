"""The recipe to run next, printed or written: the run's own recipe, with the observed traffic as its workload."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftopt import corpus, store
from peftopt.cli.console import Console
from peftopt.errors import BROKEN
from peftopt.watch import proposal
from peftopt.watch.history import History
from peftopt.watch.proposal import Messages, Seen

PROMPTS = "traffic.jsonl"
"""The name of the prompts file in a recipe that is only printed."""


def propose(run: Path, history: History, logs: Sequence[Path], file: Path | None, console: Console) -> None:
    """Print the recipe, or write it to the file, with its prompts beside it. An existing file stays as it is. Raises
    MissingEnvironment where the file cannot be written."""
    source = run / "recipe.yaml"
    if not (source.is_file() and (run / "plan.json").is_file()):
        console.tell(f"{run} keeps no recipe: run one with the log's prompts as its workload")
        return
    if file and file.exists():
        console.tell(f"{file} exists already and stays as it is: the recipe to run next is not written")
        return
    traffic = proposal.of_history(history, _sampled_prompts(logs) if file else [])
    rows = proposal.rows(traffic)
    prompts = file.with_suffix(".prompts.jsonl") if file else Path(PROMPTS)
    folder = Path(store.read_plan(run / "plan.json").recipe.path).parent
    named = str(prompts.resolve() if file else prompts) if rows else ""
    text = "\n".join((*_comment(run, traffic), proposal.recipe(store.read_text(source), folder, traffic, named)))
    if file is None:
        console.tell("the recipe to run next; --propose FILE writes it, and its prompts")
        console.say(f"\n{text}")
        return
    hint = "name another: --propose FILE"
    if rows:
        store.write(prompts, "\n".join(rows) + "\n", hint)
    store.write(file, text, hint)
    console.tell(f"wrote the recipe to run next: peftopt check {file}, then peftopt run {file}")


def _comment(run: Path, traffic: Seen) -> Iterator[str]:
    yield f"# Proposed by peftopt watch: the recipe of {run.resolve().name}, with its users' traffic as the workload:"
    yield f"# {', '.join(_traffic_words(traffic))}."
    if traffic.prompts:
        yield "# The prompts are the users' own, from the log."
    elif traffic.prompt_tokens:
        yield "# The prompts are made up, as long as the users'; `peftopt serve --log-text` keeps the users' own."
    else:
        yield "# The prompts are the run's: the lengths of the users' prompts are not known."


def _traffic_words(traffic: Seen) -> Iterator[str]:
    yield f"up to {traffic.rate:.3g} requests/s"
    for what, lengths in (("prompts", traffic.prompt_tokens), ("answers", traffic.new_tokens)):
        if lengths:
            low, middle, high = (proposal.quantile(lengths, q) for q in (0.05, 0.5, 0.95))
            yield f"{what} of {low:.0f} to {high:.0f} tokens, {middle:.0f} in the middle"


def _sampled_prompts(logs: Sequence[Path]) -> list[Messages]:
    """A random sample of different prompts from the logs; empty for logs without texts."""
    generator, sample, count = random.Random(0), dict[str, Messages](), 0
    for prompt in _logged_prompts(logs):
        messages = proposal.logged(prompt)
        if prompt in sample or not _is_valid(messages):
            continue
        count += 1
        if len(sample) < proposal.MOST_PROMPTS:
            sample[prompt] = messages
        elif generator.random() < proposal.MOST_PROMPTS / count:
            del sample[generator.choice(list(sample))]
            sample[prompt] = messages
    return list(sample.values())


def _logged_prompts(logs: Sequence[Path]) -> Iterator[str]:
    for path in logs:
        with path.open("rb") as lines:
            for line in lines:
                if b'"prompt":' in line:
                    try:
                        prompt = json.loads(line)["prompt"]
                    except BROKEN:
                        continue
                    if isinstance(prompt, str) and prompt:
                        yield prompt


def _is_valid(messages: Messages) -> bool:
    try:
        corpus.row_from({"messages": messages})
    except ValueError:
        return False
    return True
