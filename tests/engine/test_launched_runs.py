"""Two processes that are killed, stopped, hung or asked to stop: the job ends soon, says why, and leaves nobody behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import curve, lines_of, peftkit_process, tiny_recipe, train

STARTS_WITHIN_SECONDS, ENDS_WITHIN_SECONDS = 150, 60
# A real hang, and a real lack of memory, of the process that gets SIGURG.
SITE = """
import os, signal
def act(number, frame):
    import resource, time
    if os.environ["TEST_ACT"] == "hang":
        time.sleep(3600)
    resource.setrlimit(resource.RLIMIT_AS, (1, 1))
    bytearray(2**30)
if os.environ.get("LOCAL_RANK") == "1":
    signal.signal(signal.SIGURG, act)
"""


@dataclass
class Launched:
    """A job that trains, and its processes."""

    process: subprocess.Popen[str]
    agent: psutil.Process
    workers: list[psutil.Process]  # by rank

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr, once everything has ended, which it must within a minute."""
        every = [self.agent, *self.workers]
        _, err = self.process.communicate(timeout=ENDS_WITHIN_SECONDS)
        _, left = psutil.wait_procs(every, timeout=ENDS_WITHIN_SECONDS)
        assert left == [], err
        return self.process.returncode, err


def wait_for_training(process: subprocess.Popen[str], run: Path) -> None:
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while not ((run / "metrics.jsonl").is_file() and lines_of(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def recipe(models_dir: Path, tmp_path: Path) -> Path:
    """More steps than any test waits for."""
    return tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"max_steps": 100_000, "save_steps": 50_000})


@contextlib.contextmanager
def launched(recipe: Path, run: Path, *arguments: Any, cold: bool = False) -> Iterator[Launched]:
    """Two processes that train."""
    process = peftkit_process("train", recipe, "--output", run, "--processes", 2, *arguments, cold=cold)
    try:
        wait_for_training(process, run)
        agent = psutil.Process(process.pid).children()[0]
        workers = sorted(agent.children(), key=lambda worker: worker.pid)  # torchrun starts them in the order of their ranks
        yield Launched(process, agent, workers)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_is_killed_ends_the_job(recipe: Path, tmp_path: Path, rank: int) -> None:
    with launched(recipe, tmp_path / "run") as job:
        job.workers[rank].kill()
        code, err = job.ended()
    assert code == 1
    assert f"rank {rank} was ended by signal 9 (SIGKILL): often the kernel, when memory ran out" in err
    assert "a bug of ours" not in err
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("victim", ["agent", "launcher"])
def test_workers_whose_launcher_is_killed_write_a_checkpoint_and_end(recipe: Path, tmp_path: Path, victim: str) -> None:
    with launched(recipe, tmp_path / "run") as job:
        job.agent.kill() if victim == "agent" else job.process.kill()
        code, err = job.ended()
    assert code == (75 if victim == "agent" else -9), err
    step = json.loads((tmp_path / "run/status.json").read_text())["step"]
    assert (tmp_path / f"run/checkpoints/step-{step:06d}").is_dir()


def test_a_worker_that_is_stopped_ends_the_job(recipe: Path, tmp_path: Path) -> None:
    with launched(recipe, tmp_path / "run") as job:
        job.workers[1].suspend()
        code, err = job.ended()
    assert code == 1
    assert f"rank 1 (process {job.workers[1].pid}) has been stopped (state T) for 20 s" in err


@pytest.mark.parametrize(
    ("act", "code", "words", "logged"),
    [
        ("hang", 1, "the most likely cause first:\n  rank 1: step", "sitecustomize.py"),
        ("exhaust", 4, "rank 1: ", "memory"),
    ],
)
def test_a_worker_that_hangs_or_has_no_memory_ends_the_job(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, code: int, words: str, logged: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("TEST_ACT", act)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", os.getcwd())]))
    with launched(recipe, tmp_path / "run", "--hang-timeout", 30, cold=True) as job:
        job.workers[1].send_signal(signal.SIGURG)
        found, err = job.ended()
    assert (found, words in err) == (code, True), err
    assert logged in (tmp_path / "run/logs/rank-1.log").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_the_workers_which_write_a_checkpoint(recipe: Path, tmp_path: Path, number: int, code: int) -> None:
    with launched(recipe, tmp_path / "run") as job:
        job.process.send_signal(number)
        found, err = job.ended()
    assert (found, "after step" in err) == (code, True)
    step = json.loads((tmp_path / "run/status.json").read_text())["step"]
    assert (tmp_path / f"run/checkpoints/step-{step:06d}").is_dir()


def test_a_signal_to_every_process_of_a_job_is_one_signal(recipe: Path, tmp_path: Path) -> None:
    with launched(recipe, tmp_path / "run") as job:  # as Slurm and systemd send them
        for process in (job.process, job.agent, *job.workers):
            process.send_signal(signal.SIGTERM)
        found, err = job.ended()
    assert (found, "after step" in err, "death signal" in err) == (75, True, False)


def test_a_second_interrupt_ends_all_at_once(recipe: Path, tmp_path: Path) -> None:
    with launched(recipe, tmp_path / "run") as job:
        job.workers[1].suspend()  # so that the first one does not end the job
        for _ in range(2):
            job.process.send_signal(signal.SIGINT)
            time.sleep(1)
        assert job.ended()[0] == 130


def test_a_loss_that_is_not_finite_ends_the_job_with_its_code(recipe: Path, tmp_path: Path) -> None:
    settings = ("--set", "training.learning_rate=1e36", "--set", "training.max_grad_norm=null")
    process = peftkit_process("train", recipe, "--output", tmp_path / "run", "--processes", 2, *settings)
    _, err = process.communicate(timeout=STARTS_WITHIN_SECONDS)
    assert process.returncode == 5, err


def losses_of(run: Path) -> list[float]:
    """The loss of every step."""
    return [loss for (loss,) in curve(run, "loss")]


def machine(recipe: Path, run: Path, rank: int, port: int, *arguments: Any) -> subprocess.Popen[str]:
    """One of two machines, with one process."""
    of_machine = ("--num-machines", 2, "--machine-rank", rank, "--main-process-ip", "127.0.0.1", "--main-process-port", port)
    return peftkit_process("train", recipe, "--output", run, "--processes", 1, *of_machine, *arguments)


def free_port() -> int:
    """A port that nobody listens at now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_machines_train_as_one_process_and_the_first_alone_writes(models_dir: Path, tmp_path: Path) -> None:
    recipe, port = tiny_recipe("CAUSAL_LM", models_dir, tmp_path), free_port()
    train(recipe, tmp_path / "alone")
    machines = [machine(recipe, tmp_path / f"machine-{rank}", rank, port) for rank in (0, 1)]
    ends = [process.communicate(timeout=STARTS_WITHIN_SECONDS) for process in machines]
    assert [process.returncode for process in machines] == [0, 0], ends
    assert losses_of(tmp_path / "machine-0") == pytest.approx(losses_of(tmp_path / "alone"), abs=1e-5)
    assert [path.name for path in (tmp_path / "machine-1").rglob("*") if path.is_file()] == ["rank-1.log"]
    assert f"machine 1 of 2, 1 process(es) each, meeting at 127.0.0.1:{port}" in ends[1][1]


def test_a_machine_whose_worker_dies_ends_the_other_one(recipe: Path, tmp_path: Path) -> None:
    port = free_port()
    first, second = (machine(recipe, tmp_path / f"machine-{rank}", rank, port) for rank in (0, 1))
    try:
        wait_for_training(first, tmp_path / "machine-0")
        psutil.Process(second.pid).children()[0].children()[0].kill()
        errors = [process.communicate(timeout=ENDS_WITHIN_SECONDS)[1] for process in (first, second)]
    finally:
        first.terminate()
        second.terminate()
    assert [first.returncode, second.returncode] == [1, 1], errors
    assert "another process of this job has ended or cannot be reached" in errors[0]
    assert "rank 1 was ended by signal 9" in errors[1]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2."""
    names = [f"peftkit{os.getpid()}-{end}" for end in "ab"]
    ends = [f"pk{os.getpid() % 100000}{end}" for end in "ab"]
    script = [*(f"netns add {name}" for name in names), f"link add {ends[0]} type veth peer name {ends[1]}"]
    for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
        script += [f"link set {end} netns {name}", f"-n {name} addr add 10.77.0.{number}/24 dev {end}"]
        script += [f"-n {name} link set {end} up", f"-n {name} link set lo up"]
    try:
        for line in script:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_find_the_network_between_them(models_dir: Path, tmp_path: Path, hosts: list[str]) -> None:
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)
    train(recipe, tmp_path / "alone")
    of_job = ["--num-machines", "2", "--main-process-ip", "10.77.0.1", "--processes", "1", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-m", "peftkit", "train", str(recipe), *of_job, "--machine-rank"]
    machines = [
        subprocess.Popen(["ip", "netns", "exec", host, *command, str(rank)], text=True, stderr=subprocess.PIPE)
        for rank, host in enumerate(hosts)
    ]
    ends = [process.communicate(timeout=STARTS_WITHIN_SECONDS)[1] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], ends
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "alone"), abs=1e-5)
