"""Where llama.cpp is found, as npm brings it (node-llama-cpp, ready-made for common machines), and what its converter reads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from peftkit.adapters import read_mapping
from peftkit.run import write_json

INSTALL = "npm install --ignore-scripts --omit=optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1"


def find_client(named: str | None) -> tuple[Path | None, str]:
    """The node_modules folder that has node-llama-cpp; None, and why there is none.

    Args:
        named: the folder around it, or `none`; None: the current one, or `node` in the Python environment.
    """
    if named == "none":
        return None, "`client: none`"
    if shutil.which("node") is None:
        return None, "llama.cpp is asked by way of node-llama-cpp, and `node` is not on the path"
    places = [Path(named)] if named else [Path(), Path(sys.prefix) / "node"]
    for place in places:
        if (place / "node_modules" / "node-llama-cpp").is_dir():
            return (place / "node_modules").resolve(), ""
    where = " or ".join(str(place.resolve()) for place in places)
    return None, f"there is no node_modules/node-llama-cpp in {where}; `{INSTALL}` in a folder, then `--set client=FOLDER`"


def find_go(named: str | None) -> str | None:
    """The `go` program; None where there is none.

    Args:
        named: its path, or `none`; None: the one on the path, or in the Python environment.
    """
    if named == "none":
        return None
    return shutil.which(named or "go") or (None if named else shutil.which("go", path=str(Path(sys.executable).parent)))


def name_added_tokens(folder: Path) -> None:
    """Write `added_tokens_decoder`, of which llama.cpp's converter takes special tokens, and which transformers 5 leaves out.

    Args:
        folder: one with tokenizer.json and tokenizer_config.json.
    """
    config, added = read_mapping(folder / "tokenizer_config.json"), read_mapping(folder / "tokenizer.json")["added_tokens"]
    if "added_tokens_decoder" in config:
        return
    decoder = {str(token["id"]): {name: part for name, part in token.items() if name != "id"} for token in added}
    write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
