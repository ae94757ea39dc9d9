"""What the trials mean: the machine, its libraries, the hub; and places on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from peftkit.doctor.finding import Finding
from peftkit.doctor.trial import Outcome

_GIB = 2**30
_LOW_CACHE_BYTES, _LOW_RUNS_BYTES = 10 * _GIB, _GIB  # a model of 7B in 16 bits has 14 GiB; a checkpoint of a LoRA some MiB
_COMPILER_SECONDS = 20.0
_TORCH_INDEX = "pip install --upgrade torch --index-url https://download.pytorch.org/whl/cu130"


def device_of(machine: Outcome) -> str:
    """The device type that runs would take."""
    facts = machine.facts
    return "cuda" if facts.get("gpus") else "mps" if facts.get("mps") else "cpu"


def torch_findings(machine: Outcome) -> list[Finding]:
    """Torch, its CUDA build, GPUs and the CPU."""
    if machine.fault:
        remedy = 'pip install --force-reinstall "torch>=2.13"'
        return [Finding("machine", "torch", "broken", f"cannot be imported: {machine.fault}", remedy)]
    facts = machine.facts
    build = f"built for CUDA {facts['cuda_build']}" if facts["cuda_build"] else "built for CPUs"
    extra = [
        text for text, is_there in (("bfloat16 instructions", facts["bf16_instructions"]), ("AMX", facts["amx"])) if is_there
    ]
    cpu = f"threads: {facts['threads']}, {' and '.join(extra) or 'no bfloat16 instructions'}"
    return [Finding("machine", "torch", "ok", f"{facts['torch']}, {build}"), _gpu(facts), Finding("machine", "CPU", "ok", cpu)]


def _gpu(facts: Mapping[str, Any]) -> Finding:
    if facts["gpus"]:
        names = [
            f"{gpu['name']} ({gpu['bytes'] / _GIB:.0f} GiB, sm_{''.join(map(str, gpu['capability']))})" for gpu in facts["gpus"]
        ]
        return Finding("machine", "GPU", "ok", ", ".join(names))
    if facts["mps"]:
        return Finding("machine", "GPU", "ok", "Apple GPU")
    has_driver = shutil.which("nvidia-smi") is not None
    if has_driver and not facts["cuda_build"]:
        what = "there is an NVIDIA driver, but torch is built for CPUs"
        return Finding("machine", "GPU", "broken", what, _TORCH_INDEX)
    if facts["cuda_fault"] and has_driver:
        remedy = "nvidia-smi shows the driver; it must be as new as torch's CUDA, or torch older"
        return Finding("machine", "GPU", "broken", facts["cuda_fault"], remedy)
    return Finding("machine", "GPU", "note", "none that torch can use: runs take the CPU")


def libraries_finding(outcome: Outcome) -> Finding:
    """Whether what every run imports can be imported."""
    if outcome.fault:
        remedy = "pip install --upgrade --force-reinstall the package that the message names"
        return Finding("machine", "libraries", "broken", f"cannot be imported: {outcome.fault}", remedy)
    return Finding("machine", "libraries", "ok", f"imported in {outcome.facts['seconds']} s")


_WORKS = {
    "matmul": ("bfloat16", "is computed right", "set `training.mixed_precision: no` and `model.dtype: float32`"),
    "attention": ("attention", "", "set `model.attn_implementation: eager`"),
    "quantized": ("bitsandbytes", "4 bits work", 'pip install --upgrade --force-reinstall "bitsandbytes>=0.50"'),
    "compiled": ("torch.compile", "compiles", "apt install gcc g++ python3-dev (a C compiler and Python's headers)"),
    "collective": ("NCCL", "", "several GPUs cannot train together; NCCL_DEBUG=INFO tells more"),
}


def trial_finding(name: str, device: str, outcome: Outcome) -> Finding:
    """What a trial on a device says."""
    shown, works, remedy = _WORKS[name]
    where = {"cuda": "on the GPU", "mps": "on the GPU"}.get(device, "on the CPU")
    if outcome.fault:
        return Finding("machine", f"{shown} {where}", "broken", outcome.fault, remedy)
    facts = outcome.facts
    if name == "attention":
        packages = f"; {', '.join(facts['packages'])} is installed" if facts["packages"] else ""
        works = f"kernels: {', '.join(facts['kernels'])}{packages}"
    if name == "collective":
        works = f"{facts['version']} sums"
    return Finding("machine", f"{shown} {where}", "ok", works)


def compiler_finding() -> Finding:
    """Whether a C++ compiler is there and makes something that runs, which torch.compile needs on a CPU."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    name, remedy = "torch.compile on the CPU", "apt install g++"
    if compiler is None:
        return Finding("machine", name, "missing", "no C++ compiler; `training.torch_compile` needs one", remedy)
    with tempfile.TemporaryDirectory(prefix="peftkit-doctor-") as folder:
        source, program = Path(folder) / "a.cpp", Path(folder) / "a"
        source.write_text("int main() { return 0; }\n")
        works = True
        try:
            for command in ([compiler, str(source), "-o", str(program)], [str(program)]):
                subprocess.run(command, check=True, capture_output=True, timeout=_COMPILER_SECONDS)
        except (OSError, subprocess.SubprocessError):
            works = False
    what = f"{compiler} works" if works else f"{compiler} makes no program that runs; `training.torch_compile` needs one"
    return Finding("machine", name, "ok" if works else "missing", what, "" if works else remedy)


def place_findings() -> list[Finding]:
    """Room on disk where models are kept and where runs go."""
    return [
        _place("cache of models", Path(constants.HF_HUB_CACHE), _LOW_CACHE_BYTES, "HF_HOME=/another/disk moves it"),
        _place("runs", Path("runs"), _LOW_RUNS_BYTES, "`--output` or `output.dir` names another place"),
    ]


def _place(name: str, path: Path, low: int, remedy: str) -> Finding:
    folder = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Finding("places", name, "broken", f"{folder} may not be written to", remedy)
    free = shutil.disk_usage(folder).free
    text = f"{path.absolute()}: {free / _GIB:,.1f} GiB free"
    return Finding("places", name, "note" if free < low else "ok", text, remedy if free < low else "")


def hub_findings(outcome: Outcome | None) -> list[Finding]:
    """The hub and the token; `outcome` is None where the hub must not be asked."""
    if outcome is None:
        what = "HF_HUB_OFFLINE is set: the hub is not asked, models must be folders or in the cache"
        return [Finding("hub", "hub", "note", what, "unset HF_HUB_OFFLINE to load from the hub")]
    facts = outcome.facts
    if outcome.fault or (facts["fault"] and not facts["fault"].startswith("HTTP 401")):
        what = f"cannot be reached ({outcome.fault or facts['fault']}): models must be folders or in the cache"
        return [Finding("hub", "hub", "note", what, "HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy")]
    reached = Finding("hub", "hub", "ok", facts["endpoint"])
    if facts["fault"]:
        return [reached, Finding("hub", "token", "broken", "is refused by the hub, public models too", "hf auth login")]
    if facts["has_token"]:
        return [reached, Finding("hub", "token", "ok", f"of {facts['user']}")]
    return [reached, Finding("hub", "token", "missing", "none: gated models cannot be loaded", "hf auth login")]


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids asking the hub."""
    return bool(constants.HF_HUB_OFFLINE)
