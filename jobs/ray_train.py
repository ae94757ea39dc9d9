"""Train on a Ray cluster: `ray job submit -- python jobs/ray_train.py RECIPE OUTPUT --machines 2 --processes 4`.

Ray Train places one worker on each machine and restarts all of them when one fails; each runs `peftkit train`, which starts and
watches the processes of its machine. OUTPUT is on a disk that all machines see. Needs `pip install 'peftkit[ray]'`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

STOPPED = 75  # after a full checkpoint


def train_on_machine(facts: dict[str, Any]) -> None:
    """Run the command on this machine; Ray says which one it is, and where the first one listens."""
    context = ray.train.get_context()
    command = [sys.executable, "-m", "peftkit", "train", facts["recipe"], "--output", facts["output"]]
    command += ["--processes", str(facts["processes"])]
    if (Path(facts["output"]) / "resolved.yaml").is_file():
        command += ["--resume"]
    if context.get_world_size() > 1:
        # Ray's own process group has the port of the environment; ours takes the one after it.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
        command += ["--num-machines", str(context.get_world_size()), "--machine-rank", str(context.get_world_rank())]
        command += ["--main-process-ip", address, "--main-process-port", str(port)]
    # The workers' variables are peftkit's to set.
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    }
    code = subprocess.run(command, env=ours, check=False).returncode
    if code:
        raise RuntimeError(f"peftkit ended with exit code {code}" + (": stopped after a checkpoint" if code == STOPPED else ""))


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("output")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="of each machine")
    parser.add_argument("--gpus", type=int, help="of each machine; default: one a process; 0: train on CPUs")
    parser.add_argument("--retries", type=int, default=3, help="how often Ray starts again after a failure")
    stated = parser.parse_args()
    gpus = stated.processes if stated.gpus is None else stated.gpus
    resources = {"GPU": float(gpus)} if gpus else {"CPU": float(stated.processes)}
    facts = {"recipe": os.path.abspath(stated.recipe), "output": os.path.abspath(stated.output), "processes": stated.processes}
    trainer = TorchTrainer(
        train_on_machine,
        train_loop_config=facts,
        scaling_config=ScalingConfig(num_workers=stated.machines, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=stated.retries)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
