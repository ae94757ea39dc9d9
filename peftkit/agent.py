"""The process between launcher and workers: accelerate's launcher, ending quietly with a file that says how they ended.

`python -m peftkit.agent LAUNCHER_PID OUTCOME_FILE ARGUMENTS...`, arguments as for `accelerate launch`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.worker import end_with_parent


def main(launcher_pid: int, outcome_path: Path, arguments: Sequence[str]) -> int:
    """Start the workers and wait for them; the exit code."""
    end_with_parent(signal.SIGUSR2)
    if os.getppid() != launcher_pid:
        return 1  # it died before the kernel was told
    # Slurm and systemd signal every process of a job. The workers write a checkpoint then, which may take its time; torchrun
    # would end them after 30 s. A handler that does nothing, unlike SIG_IGN, is not inherited by the workers.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def give_up(number: int, frame: Any) -> None:
        raise SignalException("the launcher is gone", signal.SIGTERM)  # which the workers get, and SIGKILL 30 s later

    signal.signal(signal.SIGUSR2, give_up)
    # Its reports are long, and are told in one sentence by `peftkit.supervise`.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        parsed = launch_command_parser().parse_args(arguments)
        parsed.signals_to_handle = "SIGHUP,SIGQUIT"  # torchrun's option, which accelerate hands on; its default takes ours too
        launch_command(parsed)
    except (ChildFailedError, subprocess.CalledProcessError) as error:  # the second: a single process, started without torchrun
        several = error.failures.items() if isinstance(error, ChildFailedError) else ()
        failures = {rank: failure.exitcode for rank, failure in several} or {0: getattr(error, "returncode", 1)}
        outcome_path.write_text(json.dumps({"failures": failures}), encoding="utf-8")
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:
        outcome_path.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
