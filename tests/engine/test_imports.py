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


def test_torchs_compiler_is_not_read_where_nothing_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
