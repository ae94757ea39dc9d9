"""`peftkit doctor`: what is installed, what of it works here, and how to mend the rest."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from peftkit import console
from peftkit.doctor.finding import Finding
from peftkit.doctor.machine import (
    compiler_finding,
    device_of,
    hub_findings,
    is_offline,
    libraries_finding,
    place_findings,
    torch_findings,
    trial_finding,
)
from peftkit.doctor.packages import package_findings
from peftkit.doctor.trial import Outcome, attempt_all
from peftkit.errors import LoadError

# Seconds after which a trial counts as hanging: importing peft takes 15 on a busy machine, the first compilation for a GPU 30.
_SECONDS, _COMPILE_SECONDS, _HUB_SECONDS = 60.0, 90.0, 15.0
_ON_EVERY_DEVICE = ("matmul", "attention", "quantized")
_ON_GPUS = ("compiled", "collective")


def doctor() -> list[Finding]:
    """Everything that was looked at."""
    asked = [] if is_offline() else [("hub", "", _HUB_SECONDS)]
    with console.progress(None, "trying what works here"):
        first = attempt_all([("machine", "", _SECONDS), ("libraries", "", _SECONDS), *asked])
        tried = [] if first["machine"].fault else _tried(device_of(first["machine"]))
    on_machine = [*torch_findings(first["machine"]), libraries_finding(first["libraries"]), *tried]
    return [*package_findings(), *on_machine, *place_findings(), *hub_findings(first.get("hub"))]


def _tried(device: str) -> list[Finding]:
    """What really works on the device."""
    names = [*_ON_EVERY_DEVICE, *(_ON_GPUS if device == "cuda" else ())]
    limits = {"compiled": _COMPILE_SECONDS}
    outcomes: dict[str, Outcome] = attempt_all([(name, device, limits.get(name, _SECONDS)) for name in names])
    found = [trial_finding(name, device, outcome) for name, outcome in outcomes.items()]
    return found if device == "cuda" else [*found, compiler_finding()]


def facts_of(found: list[Finding]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"broken": sum(item.state == "broken" for item in found), "findings": [asdict(item) for item in found]}


def print_findings(found: list[Finding]) -> None:
    """A table for each part, and the commands that mend what is to be mended."""
    for part in dict.fromkeys(item.part for item in found):
        rows = [[item.name, item.state, item.text] for item in found if item.part == part]
        console.print_wide_table(part, ["", "", ""], rows)
    for title, states in (("to mend:", ("broken",)), ("optional:", ("note", "missing"))):
        if lines := [f"  {item.name}: {item.remedy}" for item in found if item.state in states and item.remedy]:
            console.print_text("\n".join([title, *lines]))


def require_sound(found: list[Finding]) -> None:
    """Fail where something is broken.

    Raises:
        LoadError: naming what is.
    """
    if broken := [item for item in found if item.state == "broken"]:
        raise LoadError("\n".join(f"{item.name}: {item.text}. {item.remedy}" for item in broken))
