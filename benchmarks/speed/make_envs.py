"""An environment for each peer: `python benchmarks/speed/make_envs.py FOLDER`.

Each peer gets a virtual environment of its own in FOLDER, with torch first: `--torch` names what all share (here a CPU
build; on a GPU machine what the index gives). The peer then brings the transformers and peft that it asks for. An
environment that is complete is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """What to install.

    Attributes:
        packages: in one go, with the torch that is there already.
        unwanted: what is removed again: it comes along, is not needed for text and does not import beside a CPU build of torch.
        gpu_only: whether it can be used on a GPU alone.
    """

    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    gpu_only: bool = False


PEERS = {
    "trl": Peer(("trl==1.16.0", "peft==0.21.2")),
    "llamafactory": Peer(("llamafactory==0.9.5",), ("torchvision", "torchaudio")),
    "axolotl": Peer(("axolotl==0.19.0",), ("torchvision", "torchaudio")),
    "ms_swift": Peer(("ms-swift==4.6.0",), ("torchvision", "torchaudio")),
    "torchtune": Peer(("torchtune==0.6.1", "torchao==0.13.0"), ("torchvision", "torchaudio")),
    "litgpt": Peer(("litgpt==0.5.13",)),
    "unsloth": Peer(("unsloth==2026.10.9",), gpu_only=True),
}


def pip(python: Path, *arguments: str) -> None:
    """Run pip in an environment; its own words tell what went wrong."""
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def make(folder: Path, peer: Peer, torch: str) -> None:
    """One environment."""
    complete = folder / "complete.txt"
    if complete.exists():
        return
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip(python, "install", "--quiet", torch, "numpy", "setuptools<81", "wheel")
    pip(python, "install", "--quiet", torch, *peer.packages)
    if peer.unwanted:
        pip(python, "uninstall", "--quiet", "--yes", *peer.unwanted)
    frozen = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    complete.write_text(frozen, encoding="utf-8")


def main() -> None:
    """Make what is missing; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PEERS, help="default: all that this machine can use")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install as torch")
    parser.add_argument("--gpu", action="store_true", help="those for GPUs alone, too")
    options = parser.parse_args()
    names = options.only or [name for name, peer in PEERS.items() if options.gpu or not peer.gpu_only]
    failed = []
    for name in names:
        try:
            make(options.folder / name, PEERS[name], options.torch)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: {' '.join(map(str, error.cmd))}")
    if failed:
        sys.exit("not installed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
