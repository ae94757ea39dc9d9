"""The only module that prints: results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.console import Console
from rich.text import Text

from peftkit.errors import PeftkitError, Problem, RecipeError, Stopped

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

T = TypeVar("T")

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def print_text(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_part(text: str) -> None:
    """A piece of a streamed answer, without a new line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(data: Any) -> None:
    """One JSON object on one line."""
    print_text(json.dumps(data, ensure_ascii=False))


def flush() -> None:
    """Write out what is buffered."""
    sys.stdout.flush()
    sys.stderr.flush()


def print_note(text: str) -> None:
    """Something to know, on stderr."""
    err.print(Text(text))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table of results: numbers to the right."""
    _print_table(title, columns, rows, "right")


def print_wide_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of sentences: every column to the left, the names in the first one unbroken."""
    _print_table(title, columns, rows, "left")


def print_figures(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of many short columns, which are folded on a terminal alone: a file has room for them."""
    roomy = out if out.is_terminal else Console(width=400, highlight=False)
    roomy.print(_table(title, columns, rows, "left"))


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], justify: Literal["left", "right"]) -> None:
    out.print(_table(title, columns, rows, justify))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], justify: Literal["left", "right"]) -> Table:
    from rich.table import Table  # costs 5 ms that `validate` need not pay

    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify=justify if index else "left", overflow="fold", no_wrap=justify == "left" and not index)
    for row in rows:
        table.add_row(*(Text(show(cell)) for cell in row))
    return table


def print_bars(title: str, bars: Sequence[tuple[str, int]]) -> None:
    """A histogram of bars."""
    print_text(title)
    highest, width = max((count for _, count in bars), default=0), max((len(name) for name, _ in bars), default=0)
    for name, count in bars:
        length = round(40 * count / highest) if highest else 0
        print_text(f"  {name:>{width}} {'#' * length}{' ' if length else ''}{count:,}")


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Numbers as a row of bars from lowest to highest; `!` where one is not finite; ASCII where blocks cannot be written."""
    blocks = "▁▂▃▄▅▆▇█"
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        blocks = "_.-~=+*#"
    count = min(width, len(values))
    parts = [values[number * len(values) // count : (number + 1) * len(values) // count] for number in range(count)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, room = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0) or 1.0
    return "".join(blocks[round(7 * (mean - low) / room)] if math.isfinite(mean) else "!" for mean in means)


_STYLES = {"learned": "bold green", "special": "dim cyan", "plain": ""}


def print_tokens(title: str, parts: Iterable[tuple[str, str]]) -> None:
    """A text in pieces, each of a kind; what is learned is coloured and, where there are no colours, between « and »."""
    text = Text(f"{title}\n" if title else "")
    for kind, part in parts:
        marked = f"«{part}»" if kind == "learned" and not out.is_terminal else part
        text.append(marked, style=_STYLES[kind])
    out.print(text)


def print_error(title: str, text: str) -> None:
    """An error: a panel on a terminal, plain lines elsewhere."""
    if err.is_terminal:
        from rich.panel import Panel

        err.print(Panel(Text(text), title=title, title_align="left", border_style="red"))
    else:
        sys.stderr.write(f"{title}:\n{text}\n")


@contextlib.contextmanager
def problems_as_json(wanted: bool) -> Iterator[None]:
    """Where JSON is wanted, an error's problems go to stdout too, as `{"problems": [...]}`."""
    try:
        yield
    except PeftkitError as error:
        if wanted:
            found = error.problems if isinstance(error, RecipeError) else [Problem("", "", str(error), error.exit_code)]
            print_json({"problems": [{"where": item.where, "key": item.key, "what": item.what} for item in found]})
        raise


def show(value: Any) -> str:
    """A value in a table: numbers with separators or four digits."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def show_bytes(size: float) -> str:
    """A size in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


class LineReporter:
    """Progress of a run as plain lines on stderr and in its log file.

    Args:
        log: takes every line too; the run's `train.log`.
        speaks: False in all processes but the first.
    """

    def __init__(self, log: Callable[[str], None], speaks: bool = True) -> None:
        self.log, self.speaks = log, speaks

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins."""
        self.note(f"training: {total_steps - first_step} steps")

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        """A step was logged."""
        self.note(step_text(line, total_steps))

    def advance(self, step: int) -> None:
        """A step is done."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """A split was evaluated."""
        self.note(f"{line['split']} after step {line['step']}: {metrics_text(line['metrics'])}")

    def note(self, text: str) -> None:
        """Something to know."""
        if self.speaks:
            self.log(text)
            print_note(text)

    def stop(self) -> None:
        """Training is over."""


class BarReporter(LineReporter):
    """Progress of a run as a bar that stays at the bottom of a terminal; lines go to the log file alone."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__(log)
        self.bar = _bar("step {task.completed}/{task.total}", "{task.description}", transient=True)
        self.task: TaskID | None = None

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins."""
        self.task = self.bar.add_task("", total=total_steps, completed=first_step)
        self.bar.start()

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        """A step was logged."""
        text = step_text(line, total_steps)
        self.log(text)
        if self.task is not None:
            self.bar.update(self.task, description=text.partition("  ")[2].rpartition("  ")[0])

    def advance(self, step: int) -> None:
        """A step is done."""
        if self.task is not None:
            self.bar.update(self.task, completed=step)

    def stop(self) -> None:
        """Training is over."""
        self.bar.stop()


def reporter(process_index: int, log: Callable[[str], None]) -> LineReporter:
    """The reporter that fits: a bar on a terminal, lines elsewhere, silence in all processes but the first."""
    if process_index == 0 and err.is_terminal:
        return BarReporter(log)
    return LineReporter(log, speaks=process_index == 0)


def step_text(line: dict[str, Any], total_steps: int) -> str:
    """A logged step in words."""
    speed = line["target_tokens"] / line["seconds"] if line["seconds"] else 0.0
    left = (total_steps - line["step"]) * line["seconds"] / line["step"]
    memory = show_bytes(line.get("memory_bytes", 0))
    return (
        f"step {line['step']}/{total_steps}  loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  "
        f"grad norm {line['grad_norm']:.3f}  {speed:,.0f} targets/s  {memory}  {left:.0f} s left"
    )


def metrics_text(metrics: dict[str, Any]) -> str:
    """Single metrics in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, int | float))


@contextlib.contextmanager
def progress(total: int | None, text: str, *, speaks: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, where this process `speaks`; yields a function that advances it."""
    if not err.is_terminal or not speaks:
        yield lambda done: None
        return
    with _bar(text, "{task.completed}/{task.total}" if total is not None else "{task.completed}") as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


def _bar(before: str, after: str, *, transient: bool = False) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn(before), BarColumn(), TextColumn(after), TimeRemainingColumn(), console=err, transient=transient)


def is_interactive() -> bool:
    """Whether a person types at a terminal."""
    return sys.stdin.isatty()


def is_dialogue() -> bool:
    """Whether a person reads and types at a terminal, and can be asked something."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask_until(question: str, default: str, check: Callable[[str], T]) -> T:
    """What `check` makes of the answer; Enter stands for the default, and a wrong answer is told why and asked for again.

    Raises:
        Stopped: Ctrl-C, or the input has ended.
    """
    import typer

    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - arrows move in the line instead of writing signs

    def checked(text: str) -> T:
        try:
            return check(text.strip())
        except PeftkitError as error:
            raise typer.BadParameter(str(error)) from error

    try:
        answer: T = typer.prompt(question, default=default, show_default=bool(default), value_proc=checked)
    except typer.Abort as error:
        raise Stopped("interrupted; nothing has been written", 130) from error
    return answer


def ask(prompt: str) -> str:
    """A line from the user.

    Raises:
        EOFError: the input has ended.
    """
    return input(prompt) if is_interactive() else input()
