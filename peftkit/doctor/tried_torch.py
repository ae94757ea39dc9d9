"""What is tried in a process of its own, which may crash or hang without harm.

`python -m peftkit.doctor.tried_torch NAME DEVICE FILE` writes what it found into the file as JSON; why it failed is the last
line on stderr. Nothing is imported before the trial that needs it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LIBRARIES = ("accelerate", "transformers", "datasets", "peft", "bitsandbytes")
_FLASH_ATTENTION = ("flash_attn", "flash_attn_interface")
_HUB_SECONDS = 8.0


def machine(device: str) -> dict[str, Any]:
    """How torch was built, and the devices that it sees."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda or torch.version.hip,
        "threads": torch.get_num_threads(),
        "bf16_instructions": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "mps": torch.backends.mps.is_available(),
        "gpus": [],
        "cuda_fault": "",
    }
    if torch.cuda.is_available():
        facts = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["gpus"] = [{"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]} for gpu in facts]
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except RuntimeError as error:  # says what `is_available` keeps to itself
            found["cuda_fault"] = str(error).splitlines()[0]
    return found


def libraries(device: str) -> dict[str, Any]:
    """Import what every run imports; seconds that it took."""
    start = time.perf_counter()
    for name in _LIBRARIES:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM

    return {"seconds": round(time.perf_counter() - start, 1), "example": AutoModelForCausalLM.__name__}


def matmul(device: str) -> dict[str, Any]:
    """A product of matrices in bfloat16 beside the same in float32."""
    import torch

    one = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact = one @ one
    error = ((one.bfloat16() @ one.bfloat16()).float() - exact).norm() / exact.norm()
    if not error < 0.02:
        raise RuntimeError(f"bfloat16 is off by {error:.3g} of the norm")
    return {"error": error.item()}


def attention(device: str) -> dict[str, Any]:
    """Which kernels of scaled_dot_product_attention run, forward and backward; which packages of flash attention there are."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    if device == "cuda":
        kernels["cudnn"] = SDPBackend.CUDNN_ATTENTION
    works = []
    for name, kernel in kernels.items():
        rows = torch.randn(1, 2, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        try:
            with sdpa_kernel(kernel):
                scaled_dot_product_attention(rows, rows, rows, is_causal=True).sum().backward()
            works.append(name)
        except RuntimeError:  # there is no such kernel for this device
            continue
    if not works:
        raise RuntimeError("no kernel of scaled_dot_product_attention runs")
    return {"kernels": works, "packages": [name for name in _FLASH_ATTENTION if importlib.util.find_spec(name)]}


def quantized(device: str) -> dict[str, Any]:
    """A layer of bitsandbytes in 4 bits, forward and backward, beside the one that it stands for."""
    import bitsandbytes
    import torch

    plain = torch.nn.Linear(256, 256, bias=False)
    layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    layer, rows = layer.to(device), torch.randn(8, 256).to(device).requires_grad_()
    made, exact = layer(rows), plain.to(device)(rows)
    made.sum().backward()
    error = (made - exact).norm() / exact.norm()
    if not error < 0.3 or rows.grad is None or not bool(rows.grad.isfinite().all()):
        raise RuntimeError(f"4 bits are off by {error:.3g} of the norm")
    return {"error": error.item()}


def compiled(device: str) -> dict[str, Any]:
    """A function that torch.compile compiles, which needs a C compiler (and Python's headers) on a GPU too."""
    import torch

    def double_sine(rows: Any) -> Any:
        return (rows.sin() * 2).sum()

    rows = torch.ones(1024, device=device)
    if not torch.allclose(torch.compile(double_sine)(rows), double_sine(rows)):
        raise RuntimeError("a compiled function gives another result")
    return {}


def collective(device: str) -> dict[str, Any]:
    """A sum over one process: by NCCL on GPUs, else by gloo."""
    import tempfile

    import torch
    from torch import distributed

    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        total = torch.ones(4, device=device)
        distributed.all_reduce(total)
        distributed.destroy_process_group()
    version = ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else ""
    return {"backend": backend, "version": version, "sum": float(total.sum())}


def hub(device: str) -> dict[str, Any]:
    """Whether the hub answers, and whom the token (which is never shown) belongs to."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    found: dict[str, Any] = {"endpoint": constants.ENDPOINT, "fault": "", "has_token": get_token() is not None, "user": None}
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        if found["has_token"]:
            found["user"] = HfApi().whoami()["name"]
    except Exception as error:  # by name alone: what a client writes may quote headers
        response = getattr(error, "response", None)
        found["fault"] = f"HTTP {response.status_code}" if response is not None else type(error).__name__
    return found


TRIALS: dict[str, Callable[[str], dict[str, Any]]] = {
    trial.__name__: trial for trial in (machine, libraries, matmul, attention, quantized, compiled, collective, hub)
}


if __name__ == "__main__":
    name, device, file = sys.argv[1:]
    Path(file).write_text(json.dumps(TRIALS[name](device)), encoding="utf-8")
