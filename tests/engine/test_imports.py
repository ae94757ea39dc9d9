"""What importing the torch side costs."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
own = torch.compile
import peftkit.commands.train
assert torch.compile is own
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
import bitsandbytes.functional as functional
weight = torch.randn(64, 64)
packed, state = functional.quantize_4bit(weight, quant_type="nf4")
assert (functional.dequantize_4bit(packed, state) - weight).abs().max() < 1.0
codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
assert codes.dtype == torch.int8
"""

SHAPES = """
import peftkit.engine
import torch
from peftkit.engine.hardware import resident_bytes
weight = torch.randn(1376, 512).bfloat16()
with torch.inference_mode():
    for length in range(200, 500):
        if length == 230:
            before = resident_bytes()
        torch.nn.functional.linear(torch.randn(length, 512).bfloat16(), weight) @ weight
print(resident_bytes() - before)
"""


def test_kernels_for_rows_of_every_length_are_not_kept() -> None:
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150 * 2**20  # 400 MiB of kernels for 270 lengths, where they are


def test_torchs_compiler_is_not_read_where_nothing_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
