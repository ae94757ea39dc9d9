"""Answers of a file that is not answered to its end: kept beside the output, so that the same command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import RecipeError


def fingerprint(folder: Path, rows: list[dict[str, Any]], settings: Any) -> str:
    """What answers depend on: equal ones are the same job.

    Args:
        folder: of the adapter; that its weights are the same is told by their size and time.
        rows: as read.
        settings: of the call, as plain data.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    text = json.dumps([str(folder.absolute()), files, rows, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class UnfinishedAnswers:
    """The file `OUTPUT.part`: a line that says which job it belongs to, then a line for each answer.

    Args:
        output: where the answers go when all are there.
        job: see `fingerprint`.

    Raises:
        RecipeError: the file holds answers of another job.
    """

    def __init__(self, output: Path, job: str) -> None:
        self.path = output.with_name(f"{output.name}.part")
        self.answers: dict[int, dict[str, Any]] = {}
        first, *lines = self._lines() or [{"job": job}]
        if first.get("job") != job:
            raise RecipeError(
                f"--output {output}: {self.path} holds {len(lines)} answers of another input, adapter or settings; repeat that "
                "command to go on with it, remove the file, or name another output"
            )
        self.answers = {line["row"]: line["answer"] for line in lines}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as handle:  # anew: what a kill has cut short is left out
            handle.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in [first, *lines])
        self._file = self.path.open("a", encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the last one is empty, or cut short

    def add(self, answers: Mapping[int, dict[str, Any]]) -> None:
        """Keep answers, by the numbers of their rows."""
        self.answers |= answers
        for number, answer in answers.items():
            self._file.write(json.dumps({"row": number, "answer": answer}, ensure_ascii=False) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """All answers are in the output."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> UnfinishedAnswers:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
