"""Watch the processes of a launched run: hand signals on, notice who is stopped, hangs or dies, and leave nobody behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from peftkit.cgroups import control_groups
from peftkit.errors import PeftkitError
from peftkit.guides import WORKERS
from peftkit.run import Run
from peftkit.stop import STOPS

POLL_SECONDS = 0.2
OUTCOME_FILE = "outcome.json"
STOPPED_SECONDS = 20.0  # a debugger or a suspended machine stops processes for moments
STOPPING_SECONDS = 300.0  # without progress, after a signal asked for the end: time to write what is large
GRACE_SECONDS = 30.0  # for workers whose launcher is gone: they have SIGTERM and write a checkpoint
_STUCK = {psutil.STATUS_STOPPED: "stopped (state T)", psutil.STATUS_ZOMBIE: "a zombie (state Z)"}


class JobError(PeftkitError):
    """A launched run that a worker ended: it died, was stopped or hung."""

    def __init__(self, message: str, exit_code: int = 1, *, guide: str = WORKERS) -> None:
        super().__init__(message, guide=guide)
        self.exit_code = exit_code


def oom_kills() -> int:
    """How many processes of this control group (version 2) the kernel has ended because memory ran out; 0 where unknown."""
    with contextlib.suppress(OSError):
        for path in (folder / "memory.events" for folder in control_groups()):
            if path.is_file():
                events = dict(line.split() for line in path.read_text().splitlines())
                return int(events.get("oom_kill", 0))
    return 0


@dataclass
class Job:
    """The processes of a run on this machine.

    Attributes:
        process: the agent, parent of the workers.
        dir: the folder with signs of life and exit reports.
        run: the run directory, with the logs of the workers.
        hang_timeout: seconds without progress of any worker after which the job is ended; 0: never.
        others: processes below this one that are none of the job's.
        heard: the signals that this process got.
        kills: OOM kills in this control group before the job began.
    """

    process: subprocess.Popen[bytes]
    dir: Path
    run: Run
    hang_timeout: float
    others: set[int] = field(default_factory=set)
    heard: list[int] = field(default_factory=list)
    kills: int = field(default_factory=oom_kills)
    _last_sign: float = 0.0
    _silent_seconds: float = 0.0
    _stuck_seconds: dict[int, float] = field(default_factory=dict)

    def hand_on(self, number: int, frame: Any) -> None:
        """Send a signal that came to the launcher to every worker once; a second SIGINT ends all of them."""
        if number == signal.SIGINT and number in self.heard:
            self.kill()
        elif number not in self.heard:
            self.heard.append(number)
            workers = self.workers()
            for process in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            if not workers:
                self.kill()  # nothing has begun

    def workers(self) -> list[psutil.Process]:
        """The processes that the agent has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.process.pid).children())
        return []

    def kill(self) -> None:
        """End every process of the job at once."""
        for process in descendants():
            if process.pid not in self.others:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def signs(self) -> dict[int, dict[str, Any]]:
        """The last sign of life of each rank on this machine: what `peftkit.worker` writes, and its `time`."""
        found = {}
        for path in self.dir.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError):
                sign = json.loads(path.read_text(encoding="utf-8"))
                found[int(path.stem.removeprefix("rank-"))] = sign | {"time": path.stat().st_mtime}
        return dict(sorted(found.items()))

    def wait(self) -> int:
        """Wait for the end of all processes; the exit code of the job.

        Raises:
            JobError: a worker was ended by a signal, failed without a word at the terminal, was stopped, or hangs.
        """
        before = time.monotonic()
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            # Should all of this be suspended with its workers, that is no silence of theirs.
            problem = self._problem(min(now - before, 5 * POLL_SECONDS))
            before = now
            if problem:
                self._write_stacks()
                self.kill()
                self.process.wait()
                raise JobError(f"{problem}\nThe job was ended; `--resume --output {self.run.dir}` goes on from its checkpoint.")
        self._wait_for_orphans()
        return self._verdict()

    def _problem(self, seconds: float) -> str | None:
        """What is wrong now, `seconds` after the last look."""
        signs = self.signs()
        ranks = {sign["pid"]: f"rank {rank}" for rank, sign in signs.items()}
        for process in [psutil.Process(self.process.pid), *self.workers()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                state = process.status()
                self._stuck_seconds[process.pid] = (
                    self._stuck_seconds.get(process.pid, 0.0) + seconds if state in _STUCK else 0.0
                )
                if self._stuck_seconds[process.pid] >= STOPPED_SECONDS and self.process.poll() is None:
                    name = ranks.get(process.pid, "the workers' launcher" if process.pid == self.process.pid else "a worker")
                    return f"{name} (process {process.pid}) has been {_STUCK[state]} for {STOPPED_SECONDS:.0f} s"
        newest = max((sign["time"] for sign in signs.values()), default=0.0)
        self._silent_seconds = self._silent_seconds + seconds if newest == self._last_sign else 0.0
        self._last_sign = newest
        limit = min(self.hang_timeout, STOPPING_SECONDS) if self.heard else self.hang_timeout
        return self._describe_hang(signs, limit) if limit and self._silent_seconds >= limit else None

    def _describe_hang(self, signs: dict[int, dict[str, Any]], limit: float) -> str:
        silent = (
            f"no process has got on for {limit:.0f} s (`--hang-timeout`{', at most, after a signal' if self.heard else ''})"
        )
        if not signs:
            return f"{silent}: no worker has started"
        # A process that waits for others is in torch; the one that they wait for is often behind, or somewhere else.
        order = sorted(signs.items(), key=lambda item: (item[1]["count"], item[1]["in_torch"], item[0]))
        lines = [f"  rank {rank}: {sign['where']}, in {sign['at']}" for rank, sign in order]
        logs = self.run.logs_dir
        return f"{silent}. The stacks are in {logs}. Where they stand, the most likely cause first:\n" + "\n".join(lines)

    def _write_stacks(self) -> None:
        """Have every worker write down where it stands."""
        for sign in self.signs().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(sign["pid"]).send_signal(signal.SIGUSR2)
        time.sleep(1.0)

    def _wait_for_orphans(self) -> None:
        """Workers outlive their agent only where it was killed: they have SIGTERM, and end, or are ended."""
        deadline = time.monotonic() + GRACE_SECONDS
        while {process.pid for process in descendants()} - self.others and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self.kill()

    def _verdict(self) -> int:
        if self.process.returncode == 0:
            return 0
        outcome = _read(self.dir / OUTCOME_FILE)
        if "error" in outcome:
            raise JobError(f"the workers could not be started: {outcome['error']}")
        told = sorted(self.dir.glob("exit-*.json"), key=lambda path: path.stat().st_mtime_ns)
        reports = [report for report in map(_read, told) if report]
        failures = outcome.get("failures", {})
        if causes := [report for report in reports if not self._is_consequence(report, failures)]:
            return self._told(causes)
        if self.heard:
            return 128 + self.heard[0]
        for rank, code in failures.items():
            if code < 0:
                raise self._killed(int(rank), -code)
        if self.process.returncode < 0:
            raise JobError(f"the workers' launcher was ended by {_name(-self.process.returncode)}")
        silent = set(failures) - {str(report["rank"]) for report in reports}
        if reports and not silent:
            raise JobError(f"rank {reports[0]['rank']}: {reports[0]['message']}", guide="")
        first = min(silent, default="?")
        raise JobError(f"rank {first} ended without a word{self._last_lines(first)}")

    def _is_consequence(self, report: dict[str, Any], failures: dict[str, int]) -> bool:
        """Whether a worker ended only because another had: it lost its peer, or torchrun asked it to stop then."""
        was_asked = report["code"] in STOPS and not self.heard and bool(failures) and str(report["rank"]) not in failures
        return bool(report["lost_peer"]) or was_asked

    def _told(self, reports: list[dict[str, Any]]) -> int:
        """The exit code of the worker that failed first; what it says, unless it could say it at the terminal."""
        first = reports[0]
        code: int = first["code"]
        if code in STOPS or any(report["at_terminal"] and report["code"] == code for report in reports):
            return code
        text = f"rank {first['rank']}: {first['message']}\nIts log: {self.run.worker_log_path(first['rank'])}"
        raise JobError(text, code, guide="")

    def _killed(self, rank: int, number: int) -> JobError:
        message = f"rank {rank} was ended by {_name(number)}"
        ran_out = oom_kills() > self.kills
        if number == signal.SIGKILL:
            message += ": the kernel, when memory ran out" if ran_out else ": often the kernel, when memory ran out"
            message += ". A smaller training.micro_batch_size, gradient_checkpointing or a quantised base needs less"
        return JobError(message + self._last_lines(rank), 4 if ran_out and number == signal.SIGKILL else 1)

    def _last_lines(self, rank: int | str) -> str:
        """The end of a worker's log; rank 0 writes its lines to the run's."""
        path = self.run.log_path if str(rank) == "0" else self.run.worker_log_path(rank)
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            return f". The last lines of {path}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""
        return ""


def descendants() -> list[psutil.Process]:
    """All processes below this one that live; orphans among them come to it, see `peftkit.worker.adopt_orphans`."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}


def _name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"signal {number} ({signal.Signals(number).name})"
    return f"signal {number}"
