"""Trials that go wrong, for `attempt`: called as `peftkit.doctor.tried_torch` is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    name, device, file = sys.argv[1:]
    if name == "hangs":
        subprocess.Popen(["sleep", "60"])  # as a compiler would, it has the pipes of its parent
        time.sleep(60)
    if name == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "fails":
        raise ImportError("libcudart.so.13: cannot open shared object file")
    Path(file).write_text(json.dumps({"device": device}))
