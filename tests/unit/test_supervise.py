"""How a launched job ends, with scripts in the place of agent and workers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit import supervise
from peftkit.launch import JOB_DIR, Launch, launch
from peftkit.run import Run
from peftkit.supervise import JobError
from peftkit.worker import is_lost_peer

ONE_MACHINE = {"num_machines": 1, "num_processes": 2}
HEAD = f"""
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["{JOB_DIR}"])
def tell(code, rank, lost_peer=False, at_terminal=False):
    text = json.dumps(dict(code=code, rank=rank, message=f"words of {{rank}}", lost_peer=lost_peer, at_terminal=at_terminal))
    (folder / f"exit-{{rank}}.json").write_text(text)
    time.sleep(0.02)
def end(**outcome):
    (folder / "outcome.json").write_text(json.dumps(outcome))
    sys.exit(1)
def send(name):
    os.kill(os.getppid(), getattr(signal, name))
    signal.pause()
"""
Ends = Callable[..., int]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ends:
    """The exit code of a job whose agent is a script."""

    def run(script: str, hang_timeout: float = 0.0) -> int:
        monkeypatch.setattr("peftkit.launch.launch_command", lambda *arguments: [sys.executable, "-c", HEAD + script])
        return launch(ONE_MACHINE, Run(tmp_path / "run"), Launch(2, hang_timeout=hang_timeout), [])

    return run


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("tell(7, 0, at_terminal=True); end(failures={0: 7})", 7),
        ("tell(3, 1); tell(3, 0, at_terminal=True); end(failures={1: 3, 0: 3})", 3),
        ("tell(75, 1); end(failures={1: 75})", 75),
        ("send('SIGTERM')", 143),
        ("send('SIGINT')", 130),
        ("send('SIGUSR1')", 138),
    ],
)
def test_the_launcher_ends_as_its_workers(ends: Ends, script: str, code: int) -> None:
    assert ends(script) == code


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("tell(5, 1); tell(1, 0, lost_peer=True); end(failures={1: 5, 0: 1})", 5, "^rank 1: words of 1\nIts log: .*rank-1.log"),
        (
            "tell(1, 0, lost_peer=True); end(failures={1: -9, 0: 1})",
            1,
            r"^rank 1 was ended by signal 9 \(SIGKILL\): often the k",
        ),
        ("end(failures={3: -11})", 1, r"^rank 3 was ended by signal 11 \(SIGSEGV\)$"),
        # torchrun has asked rank 1 to stop
        ("tell(75, 1); end(failures={0: -9})", 1, r"^rank 0 was ended by signal 9 \(SIGKILL\)"),
        ("tell(75, 1); end(failures={0: 3})", 1, "^rank 0 ended without a word"),
        ("tell(1, 2, lost_peer=True); end(failures={2: 1})", 1, "^rank 2: words of 2"),
        ("end(error='ConnectionError: port')", 1, "the workers could not be started: ConnectionError: port"),
        ("end(failures={1: 3})", 1, "^rank 1 ended without a word"),
        ("os.kill(os.getpid(), 9)", 1, r"the workers' launcher was ended by signal 9 \(SIGKILL\)"),
    ],
)
def test_the_cause_of_a_failed_job_is_told(ends: Ends, script: str, code: int, words: str) -> None:
    with pytest.raises(JobError, match=words) as failed:
        ends(script)
    assert failed.value.exit_code == code


def test_a_worker_that_the_kernel_ended_for_its_memory_is_exhaustion(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("peftkit.cgroups.ROOT", tmp_path)
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 2\n")
    with pytest.raises(JobError, match=r"SIGKILL\): the kernel, when memory ran out") as failed:
        ends(f"pathlib.Path({str(events)!r}).write_text('oom_kill 3'); end(failures={{1: -9}})")
    assert failed.value.exit_code == 4


def test_oom_kills_are_read_from_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkit.cgroups.ROOT", tmp_path)
    assert supervise.oom_kills() == 0
    (tmp_path / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    assert supervise.oom_kills() == 3


def test_a_job_without_signs_of_progress_is_ended(ends: Ends) -> None:
    signs = "".join(f"(folder / 'rank-{rank}.json').write_text('{sign(rank)}'); " for rank in (0, 1))
    words = r"no process has got on for 1 s .*:\n  rank 1: step 3, in read \(rows.py:7\)\n  rank 0: step 4, in all_reduce "
    with pytest.raises(JobError, match=words):
        ends(f"{signs} time.sleep(60)", 1.0)


def sign(rank: int) -> str:
    """A sign of life of a process that is not there: rank 0 waits for rank 1."""
    at = ("all_reduce (c10d.py:9)", "read (rows.py:7)")[rank]
    facts = {"pid": 2**22 + rank, "count": 4 - rank, "where": f"step {4 - rank}", "at": at, "in_torch": rank == 0}
    return json.dumps(facts)


def test_a_job_that_starts_no_worker_is_ended(ends: Ends) -> None:
    with pytest.raises(JobError, match=r"no process has got on for 1 s .*: no worker has started"):
        ends("time.sleep(60)", 1.0)


def test_a_job_that_hangs_when_it_is_asked_to_stop_is_ended_sooner(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "STOPPING_SECONDS", 1.0)
    worker = "subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, lambda *_: 0); time.sleep(60)'])"
    with pytest.raises(JobError, match=r"got on for 1 s \(`--hang-timeout`, at most, after a signal\)"):
        ends(f"import subprocess; {worker}; time.sleep(0.5); send('SIGTERM'); time.sleep(60)", 1800.0)


def test_a_stopped_process_ends_the_job(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "STOPPED_SECONDS", 1.0)
    with pytest.raises(JobError, match=r"the workers' launcher \(process \d+\) has been stopped \(state T\) for 1 s"):
        ends("os.kill(os.getpid(), signal.SIGSTOP)")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2"), True),
        (type("DistBackendError", (RuntimeError,), {})("aborted"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("gloo"), False),
    ],
)
def test_an_error_of_a_process_whose_peer_is_gone_is_known(error: Any, lost: bool) -> None:
    assert is_lost_peer(error) == lost
