"""`peftkit doctor`: versions, trials that crash and hang, places, the hub; and what it says of them."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from peftkit.commands import doctor as command
from peftkit.doctor import machine, packages, tried_torch
from peftkit.doctor.finding import Finding
from peftkit.doctor.trial import Outcome, attempt, attempt_all
from tests.conftest import Result

Cli = Callable[..., Result]
NEEDED = ["peft>=0.21.2", "torch>=2.13", "gone>=1", 'plotter>=3; extra == "plot"', 'absent; extra == "s3"', 'x; extra == "dev"']
FACTS: dict[str, Any] = {
    "torch": "2.13.0", "cuda_build": "13.0", "threads": 8, "bf16_instructions": True, "amx": False, "mps": False,
    "gpus": [{"name": "H100", "bytes": 80 * 2**30, "capability": [9, 0]}], "cuda_fault": "",
}  # fmt: skip


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed versions, to be changed."""
    own = Message()
    for name, values in {
        "Requires-Dist": NEEDED,
        "Provides-Extra": ["plot", "s3", "dev"],
        "Requires-Python": [">=3.11"],
    }.items():
        for value in values:
            own.add_header(name, value)
    found = {"peft": "0.21.2", "torch": "2.13.0+cu130", "gone": "1.0", "plotter": "3.1"}
    monkeypatch.setattr(packages, "metadata", lambda name: own)
    monkeypatch.setattr(packages, "installed", found.get)
    return found


def by_name(found: list[Finding]) -> dict[str, Finding]:
    """Findings by name."""
    return {item.name: item for item in found}


def test_installed_versions_are_held_against_those_that_are_needed(versions: dict[str, str]) -> None:
    found = by_name(packages.package_findings())
    assert {name: item.state for name, item in found.items()} == {
        "python": "ok", "peft": "ok", "torch": "ok", "gone": "ok", "plot": "ok", "s3": "missing",
    }  # fmt: skip
    assert (found["s3"].text, found["s3"].remedy) == ("without absent", 'pip install --upgrade "peftkit[s3]"')


def test_packages_that_are_missing_or_too_old_are_named_with_their_command(versions: dict[str, str]) -> None:
    versions |= {"torch": "2.9.1", "plotter": "2.0"}
    del versions["gone"]
    found = by_name(packages.package_findings())
    assert (found["torch"].state, found["torch"].text) == ("broken", "2.9.1 does not fit; it must be >=2.13")
    assert (found["gone"].state, found["gone"].remedy) == ("broken", 'pip install --upgrade "gone>=1"')
    assert (found["plot"].state, found["plot"].text) == ("missing", "plotter 2.0 is not >=3")


def test_a_peft_newer_than_the_measured_one_is_noted(versions: dict[str, str]) -> None:
    versions["peft"] = "0.22.0"
    found = by_name(packages.package_findings())["peft"]
    assert (found.state, found.text) == (
        "note",
        "0.22.0 is newer than 0.21.2, with which the tables of docs/methods.md were made",
    )


def test_what_this_machine_has_installed_fits() -> None:
    assert {item.state for item in packages.package_findings()} <= {"ok", "missing", "note"}


def test_a_trial_that_crashes_fails_or_hangs_is_told() -> None:
    module = "tests.doctor_trials"
    assert attempt("works", "cpu", 20, module) == Outcome({"device": "cpu"})
    assert attempt("crashes", "cpu", 20, module).fault == "crashed (SIGSEGV)"
    assert attempt("fails", "cpu", 20, module).fault == "ImportError: libcudart.so.13: cannot open shared object file"
    start = time.monotonic()
    assert attempt("hangs", "cpu", 1, module).fault == "did not end within 1 s"
    assert time.monotonic() - start < 10


def test_the_machine_is_really_looked_at_in_a_process_of_its_own() -> None:
    found = attempt_all([("machine", "", 120.0)])["machine"]
    assert found.fault == ""
    assert by_name(machine.torch_findings(found))["torch"].text.startswith(found.facts["torch"])


@pytest.mark.parametrize("name", ["matmul", "attention", "quantized", "collective"])
def test_a_trial_works_on_a_cpu(name: str) -> None:
    found = machine.trial_finding(name, "cpu", Outcome(tried_torch.TRIALS[name]("cpu")))
    assert (found.state, found.name.endswith(" on the CPU")) == ("ok", True)


def test_a_trial_of_the_compiler_compares_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "compile", lambda function: function)  # the real one takes half a minute on a CPU
    assert tried_torch.compiled("cpu") == {}
    monkeypatch.setattr(torch, "compile", lambda function: lambda rows: function(rows) + 1)
    with pytest.raises(RuntimeError, match="another result"):
        tried_torch.compiled("cpu")


def test_a_gpu_is_described_and_what_fails_on_it_is_broken() -> None:
    outcome = Outcome(FACTS)
    assert machine.device_of(outcome) == "cuda"
    assert by_name(machine.torch_findings(outcome))["GPU"].text == "H100 (80 GiB, sm_90)"
    works = machine.trial_finding("attention", "cuda", Outcome({"kernels": ["flash", "math"], "packages": ["flash_attn"]}))
    assert (works.name, works.text) == ("attention on the GPU", "kernels: flash, math; flash_attn is installed")
    fails = machine.trial_finding("compiled", "cuda", Outcome(fault="RuntimeError: Failed to find C compiler"))
    assert (fails.state, fails.remedy.startswith("apt install gcc")) == ("broken", True)


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        ({"cuda_build": None}, "broken", "torch is built for CPUs"),
        ({"cuda_fault": "The NVIDIA driver on your system is too old"}, "broken", "too old"),
        ({}, "note", "runs take the CPU"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], state: str, words: str
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    found = by_name(machine.torch_findings(Outcome(FACTS | {"gpus": []} | facts)))["GPU"]
    assert (found.state, words in found.text) == (state, True)


def test_a_compiler_that_is_not_there_is_something_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.compiler_finding().state == "missing"
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/false")
    assert "makes no program that runs" in machine.compiler_finding().text


def test_places_without_room_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [item.name for item in machine.place_findings()] == ["cache of models", "runs"]
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**29}))
    assert [item.state for item in machine.place_findings()] == ["note", "note"]
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert [item.state for item in machine.place_findings()] == ["broken", "broken"]


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub on this machine that knows one token."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == "Bearer hf_good"
            body = json.dumps({"name": "ada", "type": "user"} if is_known else {"error": "Invalid"}).encode()
            self.send_response(200 if is_known or self.path == "/" else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815 - a name of http.server

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield
    server.shutdown()


@pytest.mark.parametrize(
    ("token", "state", "text"),
    [("hf_good", "ok", "of ada"), ("hf_bad", "broken", "is refused by the hub, public models too"), ("", "missing", "none")],
)
def test_the_hub_is_asked_and_the_token_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, fake_hub: None, token: str, state: str, text: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
    outcome = attempt("hub", "", 60)
    found = by_name(machine.hub_findings(outcome))
    assert (found["hub"].state, found["token"].state) == ("ok", state)
    assert found["token"].text.startswith(text)
    assert "hf_" not in f"{outcome}{found}"


def test_a_hub_that_cannot_be_reached_or_must_not_be_asked_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (found,) = machine.hub_findings(attempt("hub", "", 60))
    assert (found.state, "cannot be reached (ConnectError)" in found.text) == ("note", True)
    (found,) = machine.hub_findings(None)
    assert (found.state, "HF_HUB_OFFLINE is set" in found.text) == ("note", True)


def patched(monkeypatch: pytest.MonkeyPatch, **faults: str) -> None:
    """Trials that fail as stated, and else do what they would on a CPU."""
    facts = {"machine": FACTS | {"gpus": []}, "libraries": {"seconds": 1.0}, "attention": {"kernels": ["math"], "packages": []}}
    outcomes = {name: Outcome(facts.get(name, {}), faults.get(name, "")) for name in tried_torch.TRIALS}
    monkeypatch.setattr(command, "attempt_all", lambda trials: {name: outcomes[name] for name, _, _ in trials})
    monkeypatch.setattr(command, "is_offline", lambda: True)


def test_a_sound_machine_ends_with_0_and_missing_extras_are_told(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    patched(monkeypatch)
    result = cli("doctor")
    assert result.code == 0
    assert "optional:" in result.out
    assert 's3: pip install --upgrade "peftkit[s3]"' in result.out
    assert "to mend:" not in result.out


def test_a_broken_part_ends_with_7_and_what_mends_it(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]
) -> None:
    patched(monkeypatch, quantized="crashed (SIGSEGV)")
    result = cli("doctor", "--json")
    assert (result.code, result.json["broken"]) == (7, 1)
    (broken,) = [item for item in result.json["findings"] if item["state"] == "broken"]
    assert (broken["name"], broken["text"]) == ("bitsandbytes on the CPU", "crashed (SIGSEGV)")
    assert "pip install --upgrade --force-reinstall" in result.err
    assert "to mend:" in cli("doctor").out


def test_a_torch_that_crashes_takes_nothing_along(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: dict[str, str]
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    result = cli("doctor", "--json")
    texts = {item["name"]: item["text"] for item in result.json["findings"] if item["state"] == "broken"}
    assert result.code == 7
    assert texts == dict.fromkeys(("torch", "libraries"), "cannot be imported: crashed (SIGSEGV)")
