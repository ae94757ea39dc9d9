"""Answers of a file that is not answered to its end: kept beside the output, so that the same command goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import RecipeError
from peftkit.run import write_text


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
        RecipeError: the file holds answers of another job, or something else.
    """

    def __init__(self, output: Path, job: str) -> None:
        self.path = output.with_name(f"{output.name}.part")
        self.answers: dict[int, dict[str, Any]] = {}
        first, *lines = self._lines(output) or [{"job": job}]
        if first["job"] != job and not lines:
            first = {"job": job}
        if first["job"] != job:
            raise RecipeError(
                f"--output {output}: {self.path} holds {len(lines)} answers of another input, adapter or settings; repeat that "
                "command to go on with it, remove the file, or name another output"
            )
        self.answers = {line["row"]: line["answer"] for line in lines}
        # Anew: what a kill has cut short is left out.
        write_text(self.path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in [first, *lines]))
        self._file = self.path.open("a", encoding="utf-8")

    def _lines(self, output: Path) -> list[dict[str, Any]]:
        """The first line and the answers; nothing where there is no file, or an empty one."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
            first, *lines = [json.loads(line) for line in text.split("\n")[:-1]] or [{"job": ""}]  # the last is cut short
            if (text and not first["job"]) or not all(isinstance(line["answer"], dict) and line["row"] >= 0 for line in lines):
                raise KeyError
        except (IsADirectoryError, ValueError, TypeError, KeyError) as error:
            raise RecipeError(
                f"--output {output}: unfinished answers are kept in {self.path}, and what is there holds something else; "
                "move it away, or name another output"
            ) from error
        return [first, *lines] if text else []

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
        self.answers = {}

    def __enter__(self) -> UnfinishedAnswers:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if not self.answers:
            self.path.unlink(missing_ok=True)
