"""Write the pages of the docs that are read from the code: docs/metrics.md, docs/cli.md, docs/data.md, and in
docs/deploying.md what `peftopt export` writes; docs/faults.md, from the marks of the tests; and the JSON Schemas in
schemas/.

    python docs/generate.py            # write the pages
    python docs/generate.py --check    # exit 1, and write nothing, where a page is out of date

The pages come from the table of metrics, from records and from the options of the command line, not from a terminal:
no width, colour or theme changes them. tests/test_docs.py compares them with the files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))  # the code beside these pages, whatever is installed

TESTS = FOLDER.parent / "tests"

BETTER = {"lower": "lower", "higher": "higher", "either": "neither"}


def pages() -> Mapping[str, str]:
    """The generated pages by file name."""
    from peftopt import schema

    schemas = {f"../schemas/{schema.file(name).name}": text for name, text in schema.generated().items()}
    return {
        "metrics.md": metrics_page(),
        "cli.md": cli_page(),
        "deploying.md": deploying_page(),
        "data.md": data_page(),
        "faults.md": faults_page(),
        **schemas,
    }


def metrics_page() -> str:
    """Every metric that `require:` and `minimize:` can name, and every other one that a report shows."""
    from peftopt import metrics

    def row(name: str, spec: metrics.Spec) -> list[str]:
        named = f"`{name}@WORKLOAD`" if spec.per_workload else f"`{name}`"
        return [named, spec.unit, BETTER[spec.better], spec.meaning]

    def required(name: str, spec: metrics.Spec) -> list[str]:
        units = ", ".join(f"`{unit}`" for unit in metrics.UNITS[spec.unit] if unit)
        relative = spec.unit == "ratio" or not spec.compared
        return [*row(name, spec), " or ".join(filter(None, (units, "`x`" if relative else "")))]

    task = metrics.spec_of(f"{metrics.TASK}NAME")
    assert task is not None
    named = {**metrics.METRICS, f"{metrics.TASK}NAME": task}
    header = ["metric", "unit", "better", "meaning"]
    return f"""# Metrics

<!-- docs/generate.py writes this page. Change peftopt/metrics.py, then run the script. -->

## In a recipe

`require:` can name each of these metrics. The last column lists the units of a limit.
`x` compares with the baseline: `throughput@bulk >= 1.1x`.

`minimize:` takes a time of one workload: `latency`, `ttft` or `tpot` ([recipes](recipes.md#keys)).
`WORKLOAD` is a name under `workloads:`. `NAME` is a task of `quality.tasks`.

{table([*header, "limit in"], [required(*item) for item in named.items()])}

- A metric of time or throughput belongs to one workload. Its name ends with `@` and the workload.
- A P95 needs 72 requests or more. A P99 needs 368 or more. With fewer, the requirement is inconclusive.
- The unit "share" is from 0 to 1: `95 %` and `0.95` are the same limit. Reports write a percentage.
- "Neither": the metric says how much changed. A limit may bound it from either side.

## Only in reports

A report shows these metrics too. A recipe cannot name them.

{table(header, [row(*item) for item in metrics.REPORTED.items()])}
"""


def cli_page() -> str:
    """Every verb with its arguments and options."""
    from typer.main import get_command

    from peftopt.cli.shared import app

    whole = get_command(app)
    verbs = dict(_verbs(whole, "peftopt"))
    links = [[f"[`{name}`](#{name.replace(' ', '-')})", _cell(verb.help)] for name, verb in verbs.items()]
    sections = [_section(name, verb) for name, verb in verbs.items()]
    return "\n\n".join(
        [
            "# Command line",
            "<!-- docs/generate.py writes this page. Change peftopt/cli, then run the script. -->",
            "`peftopt --help` lists the verbs. `peftopt VERB --help` shows the text of this page.\n"
            "`peftopt --version` prints the version.\n"
            "Results go to stdout. Progress and warnings go to stderr.\n"
            "[In scripts and shells](scripting.md): exit codes, the shape of `--json`, colours, completion.",
            table(["verb", "what it does"], links),
            f"{whole.epilog}",
            *sections,
        ]
    ) + "\n"  # fmt: skip


def deploying_page() -> str:
    """The page as it is, with what `export` writes today under each line that names an export."""
    page = (FOLDER / "deploying.md").read_text(encoding="utf-8")
    return re.sub(r"<!-- export (\w+) (.*) -->\n```\w*\n(?:.*\n)*?```\n", _exported, page)


def data_page() -> str:
    """The page as it is, with the columns of a table under each line that names one."""
    page = (FOLDER / "data.md").read_text(encoding="utf-8")
    return re.sub(r"<!-- columns (\w+) -->\n.*?(?=\n## )", _columns, page, flags=re.DOTALL)


def faults_page() -> str:
    """Every fault of the list, what happens then, and the tests that show it."""
    import yaml

    listed = yaml.safe_load((TESTS / "data" / "faults.yaml").read_text(encoding="utf-8"))
    marked = marked_faults()

    def row(number: int, name: str) -> list[str]:
        shown = [f"{_cell(what)} (`{test}`)" for what, test in marked.get(number, [])]
        return [str(number), _cell(name), "<br>".join(shown)]

    return f"""# Faults

<!-- docs/generate.py writes this page from tests/data/faults.yaml and the marks of tests. Change these, then run. -->

What peftopt does when something breaks. Each row names the tests that inject the fault: `make test` runs them.
What happens is said by the mark of the test that shows it.

Exit codes: 0 accepted or done, 1 rejected, 2 bad input, 3 inconclusive, 4 environment or nothing measured, 5 a bug,
130 interrupted. No fault of this list ends in a traceback.

- `tests/helpers/faulty_io.py` makes the N-th operation on files fail, or lets it be the last of its process. It counts
  over a command and its workers. `make test` tries a sample of operations; `python benchmarks/kills.py` tries them all.
- `tests/test_resumed.py` kills, resumes, corrupts and doubles a run in random order.
- `python benchmarks/fuzz.py` gives peftopt broken files for as long as it is told.
- What peftopt trusts, and what it does not: [SECURITY.md](../SECURITY.md).

{table(["#", "fault", "what happens, and the test that shows it"], [row(*each) for each in listed.items()])}
"""


def marked_faults() -> Mapping[int, Sequence[tuple[str, str]]]:
    """For each fault what happens and the test that shows it, as the marks `@pytest.mark.fault(number, what)` say."""
    found: dict[int, list[tuple[str, str]]] = {}
    for file in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for test in tree.body:
            marks = test.decorator_list if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) else []
            for mark in marks:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    number, what = map(ast.literal_eval, mark.args)
                    found.setdefault(number, []).append((what, f"{file.name}::{test.name}"))
    return found


def _columns(block: re.Match[str]) -> str:
    from peftopt.api.columns import tables

    types = {float: "number", int: "whole number", bool: "true or false", str: "text", list: "list", dict: "mapping"}
    described = tables()[block[1]]
    rows = [
        [f"`{each.name}`", types[each.kind] + (", or empty" if each.optional else ""), each.unit, _cell(each.meaning)]
        for each in described.columns
    ]
    header = ["column", "type", "unit", "what it is"]
    return f"<!-- columns {block[1]} -->\nA row is {described.row}.\n\n{table(header, rows)}\n"


def _exported(block: re.Match[str]) -> str:
    from peftopt.cli.export import Here, Target, deployed
    from peftopt.deploy import files

    target, arguments = block[1], block[2]
    where = Here(Path("/srv/peftopt"), "/opt/peftopt/bin/python", "/opt/peftopt/environments")
    text = files.TARGETS[target](deployed(arguments.split(), Target(target), where)).files[0].text
    language = "ini" if target == "systemd" else "yaml"
    return f"<!-- export {target} {arguments} -->\n```{language}\n{text.rstrip()}\n```\n"


def _verbs(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that has no commands of its own, by all its words."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, each in inner.items():
        yield from _verbs(each, f"{name} {word}")


def _section(name: str, verb: Any) -> str:
    context = verb.context_class(verb, info_name=name)
    usage = " ".join([name, *verb.collect_usage_pieces(context)])
    records = [record for parameter in verb.params if (record := parameter.get_help_record(context))]
    rows = [[f"`{_term(term)}`", _cell(text)] for term, text in records]
    listed = table(["argument or option", "what it says"], rows) if rows else ""
    return "\n\n".join(filter(None, [f"## {name}", verb.help, f"```\n{usage}\n```", listed]))


def _term(text: str) -> str:
    """An option and its type: no list, since its help says that it repeats, and no bar, which would end the cell."""
    return re.sub(r"list\[(\w+)\]", lambda inner: inner[1].lower(), text).replace("|", " or ")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[required]", "Required.").replace("<", "&lt;")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the cells are taken as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check say which of them are out of date. Returns the exit code."""
    stale = [name for name, text in pages().items() if _written(name) != text]
    if list(arguments) == ["--check"]:
        for name in stale:
            print(f"docs/{name} is out of date: run python docs/generate.py", file=sys.stderr)
        return bool(stale)
    for name in stale:
        (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def _written(name: str) -> str:
    file = FOLDER / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
