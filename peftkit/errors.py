"""Everything that a user sees when something is wrong, with the exit code of each.

PeftkitError               1   a bug of ours
├── RecipeError            2   the recipe or the command line (all problems at once)
├── DataError              3   rows that cannot be trained on
├── ResourceError          4   out of memory or disk
├── NonFiniteError         5   NaN or infinity in loss, gradient or weights
├── CertificateError       6   what was saved is not what was trained
├── LoadError              7   a model or adapter that cannot be loaded
└── Stopped           75 / 130   stopped by SIGTERM, SIGUSR1 or its time / by SIGINT, after a full checkpoint where there is one
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peftkit.guides import section_of


class PeftkitError(Exception):
    """An error with a message for users and an exit code; the CLI prints the one and returns the other.

    Args:
        message: what is wrong, the value found, what is allowed, what to do.
        guide: where docs/ tell more, see `peftkit.guides`; empty where they do not.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, guide: str = "") -> None:
        super().__init__(message)
        self.guide = guide

    @property
    def told(self) -> str:
        """The message as the CLI prints it: its last line says where more is told."""
        return f"{self}\nsee {self.guide}" if self.guide else str(self)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a recipe: where, what, and what to do.

    Attributes:
        where: `file:line`, or the `--set` override that brought the value in.
        key: dotted key, such as `training.learning_rate`; empty for the file as a whole.
        what: the sentence: what is wrong, the value found, what is allowed, what to do.
        exit_code: 2 for the recipe itself, 3 for data that is not there, 7 for a model that is not there.
        guide: where docs/ tell more.
    """

    where: str
    key: str
    what: str
    exit_code: int = 2
    guide: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.what) if part)


class RecipeError(PeftkitError):
    """A recipe or command line that cannot run; holds every problem found."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str, *, guide: str = "") -> None:
        if isinstance(problems, str):  # of the command line: they begin with their option
            problems = [Problem("", "", problems, guide=section_of(re.split(r"[: ]", problems)[0]))]
        self.problems = list(problems)
        # Broken YAML makes every other finding moot; only when the recipe is sound does a missing file decide.
        self.exit_code = min(problem.exit_code for problem in self.problems)
        guides = dict.fromkeys(problem.guide for problem in self.problems if problem.guide)
        super().__init__("\n".join(str(problem) for problem in self.problems), guide=guide or ", ".join(guides))


class DataError(PeftkitError):
    """Rows or files that cannot be trained on."""

    exit_code = 3


class ResourceError(PeftkitError):
    """Memory or disk ran out."""

    exit_code = 4


class NonFiniteError(PeftkitError):
    """NaN or infinity in the loss, a gradient or a weight."""

    exit_code = 5


class CertificateError(PeftkitError):
    """What was written does not reproduce what was trained."""

    exit_code = 6


class LoadError(PeftkitError):
    """A model, tokenizer, adapter or run directory that cannot be loaded."""

    exit_code = 7


class Stopped(PeftkitError):  # noqa: N818 - to be stopped is no error
    """The run was stopped by a signal or its time limit."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
