"""A process that looks at the variants of a comparison, so that the one that starts their runs never imports torch.

`python -m peftkit.commands.survey_variants` reads a JSON list of requests from stdin and prints an answer to each, a line of
JSON. A request has `recipe` and `overrides`, and `tokens` where steps are wanted, or `target`: a number of parameters, or
`{"of": 0}` for those of the first request. An answer is what `peftkit.engine.sizes` finds, or a `problem` with its exit code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.engine.sizes import steps_for_tokens, survey_variant
from peftkit.errors import PeftkitError
from peftkit.recipe import load_recipe


def answer(request: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer to one request, after those before."""
    path, target = Path(request["recipe"]), request.get("target")
    try:
        if "tokens" in request:
            return {"steps": steps_for_tokens(load_recipe(path, request["overrides"]), request["tokens"])}
        if isinstance(target, dict):
            target = before[target["of"]].get("trainable_params")
        return survey_variant(path, request["overrides"], target)
    except PeftkitError as error:
        return {"problem": str(error), "exit_code": error.exit_code}


def main(text: str) -> None:
    """Answer all requests."""
    answers: list[dict[str, Any]] = []
    for request in json.loads(text):
        answers.append(answer(request, answers))
        console.print_json(answers[-1])


if __name__ == "__main__":
    import sys

    main(sys.stdin.read())
