"""What every tool is measured with: three places that all of them pass, watched from outside, so that no tool is changed.

The first look-up of a token's embedding marks the start of step 1, `Tensor.backward` shows the loss, and the end of an
optimizer's step ends a step. With the last step the figures are written and the process ends: what a tool does after
training is not measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class Job:
    """The common job, as `speed.py` writes it down for a runner.

    Attributes:
        model_dir: the base model with its tokenizer, as transformers saves them.
        rows_path: rows with `messages`, one user and one assistant turn each, in the order of training.
        tokens_path: the same rows as `input_ids`, `labels` (-100: not learned) and `attention_mask`.
        scratch_dir: an empty folder for this run.
        cache_dir: a folder that the next run of the same tool and job sees again.
        result_path: where the figures go.
        started: time.time() just before the process was started.
        settings: further settings of the tool, `key=value`.
    """

    model_dir: str
    rows_path: str
    tokens_path: str
    scratch_dir: str
    cache_dir: str
    result_path: str
    started: float
    steps: int
    batch_size: int
    max_length: int
    rank: int
    alpha: int
    targets: list[str]
    learning_rate: float
    device: str
    dtype: str
    seed: int
    settings: list[str]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the frozen weights."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def is_bf16(self) -> bool:
        """Whether the computation is in bf16 (autocast)."""
        return self.dtype == "bfloat16"

    def tokens(self) -> list[dict[str, list[int]]]:
        """The rows as token ids."""
        return [json.loads(line) for line in Path(self.tokens_path).read_text(encoding="utf-8").splitlines()]

    def messages(self) -> list[list[dict[str, str]]]:
        """The rows as chats."""
        lines = Path(self.rows_path).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]

    def settings_dict(self) -> dict[str, Any]:
        """The further settings, values read as JSON where they are JSON."""
        return {key: _value(text) for key, _, text in (setting.partition("=") for setting in self.settings)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def start() -> Job:
    """Read the job that the command line names, and begin to measure."""
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = Job(**{field.name: found[field.name] for field in fields(Job)})
    sys.argv[1:] = []  # some tools read it
    Meter(job).install()
    keep_file_order()
    return job


class Meter:
    """CPU seconds, wall seconds, memory and loss of each step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cpu_seconds: list[float] = []
        self.wall_seconds: list[float] = []
        self.losses: list[list[torch.Tensor]] = [[]]
        self.before: dict[str, float] = {}
        self.peak_at_start = 0

    def install(self) -> None:
        """Watch the three places."""
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self._on_forward)
        backward, meter = torch.Tensor.backward, self

        def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            meter.hook.remove()
            meter.losses[-1].append(tensor.detach())
            backward(tensor, *args, **kwargs)

        torch.Tensor.backward = watched  # type: ignore[method-assign, assignment]
        register_optimizer_step_post_hook(self._on_step)

    def _on_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        """The last look-up before the first backward pass starts the step, since a tool may try its model before it trains;
        what was in use at the first one is the memory before it.
        """
        if not isinstance(module, torch.nn.Embedding):
            return
        self.peak_at_start = max(self.peak_at_start, peak_bytes(self.job.device))
        forget_peak(self.job.device)
        in_use = peak_bytes(self.job.device)
        self.before = {
            "seconds_before_step_1": time.time() - self.job.started,
            "cpu_seconds_before_step_1": time.process_time(),
            "memory_before": self.before.get("memory_before", in_use),
        }

    def _on_step(self, *_: Any) -> None:
        if self.job.device == "cuda" and len(self.cpu_seconds) + 1 in (1, self.job.steps):
            torch.cuda.synchronize()
        self.cpu_seconds.append(time.process_time())
        self.wall_seconds.append(time.time() - self.job.started)
        self.losses.append([])
        if len(self.cpu_seconds) == self.job.steps:
            self._finish()

    def _finish(self) -> None:
        peak = peak_bytes(self.job.device)
        result = self.before | {
            "cpu_seconds": self.cpu_seconds,
            "wall_seconds": self.wall_seconds,
            "losses": [sum(float(loss) for loss in losses) for losses in self.losses[:-1]],
            "memory_peak": max(peak, self.peak_at_start),
            "memory_of_step": peak - self.before["memory_before"],
            "versions": versions(),
            "gpu": torch.cuda.get_device_name() if self.job.device == "cuda" else "",
        }
        Path(self.job.result_path).write_text(json.dumps(result), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def peak_bytes(device: str) -> int:
    """The most memory since the last `forget_peak`: of the process, or of tensors on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak(device: str) -> None:
    """Let the highest memory use begin anew from what is in use now (Linux: `man 5 proc`, clear_refs)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    """Versions of what the tools have in common."""
    names = ("torch", "transformers", "peft", "accelerate")
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}


def keep_file_order() -> None:
    """Samplers that would shuffle give the order of the file, so that every tool sees the same rows in each step."""

    def in_order(sampler: Any) -> Any:
        return iter(range(len(sampler.data_source)))

    torch.utils.data.RandomSampler.__iter__ = in_order  # type: ignore[method-assign]
    if importlib.util.find_spec("accelerate"):
        from accelerate.data_loader import SeedableRandomSampler

        SeedableRandomSampler.__iter__ = in_order
