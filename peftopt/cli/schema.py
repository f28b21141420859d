"""schema: JSON Schemas of peftopt's files, for editors and other programs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftopt.cli.shared import AsJson, app


def _names() -> list[str]:
    from peftopt import schema as schemas

    return [*schemas.FILES]


@app.command()
def schema(
    name: Annotated[
        str, typer.Argument(help="recipe, grid, decision, measurement or diagnosis.", autocompletion=_names)
    ] = "recipe",
    as_json: AsJson = False,
) -> None:
    """Print the JSON Schema of a recipe or a grid (editors complete by it), or of a file that a run writes."""
    from peftopt import schema as schemas
    from peftopt.cli.console import print_json

    text = schemas.text(name)
    if as_json:
        print_json(json.loads(text))
    else:
        print(text, end="")
