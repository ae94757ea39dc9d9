"""`peftkit push`: an adapter or a merged model, with its model card, to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.adapters import RENDERINGS
from peftkit.errors import RecipeError
from peftkit.publish.stage import stage
from peftkit.publish.subject import Published, read_published
from peftkit.publish.upload import check_repo_id, require_token, upload
from peftkit.run import new_folder


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        path: run directory, adapter folder, or a folder that `merge` wrote.
        repo_id: owner/name on the hub.
        private: whether a new repository is for its owner alone.
        dry_run: folder to write instead; None: upload.
        base: hub id of the base model, where it was trained on a folder.
        force: publish without a passed certificate.
    """

    path: Path
    repo_id: str
    private: bool = False
    dry_run: Path | None = None
    base: str | None = None
    force: bool = False


def push(asked: Request) -> dict[str, Any]:
    """Upload, or write what would be uploaded; returns what `--json` prints.

    Raises:
        RecipeError, LoadError, CertificateError: see `read_published`, `stage` and `upload`.
    """
    check_repo_id(asked.repo_id)
    found = read_published(asked.path, asked.base, force=asked.force)
    result = {"repo_id": asked.repo_id, "base": found.base or None, "kind": "model" if found.is_model else "adapter"}
    if asked.dry_run is not None:
        if asked.dry_run.exists() and (not asked.dry_run.is_dir() or any(asked.dry_run.iterdir())):
            raise RecipeError(f"--dry-run {asked.dry_run}: is not empty; name a new folder")
        with new_folder(asked.dry_run) as folder:
            files = stage(found, asked.repo_id, folder, _renderings(found))
        return result | {"files": _sizes(asked.dry_run, files), "folder": str(asked.dry_run), "url": None}
    require_token()
    with tempfile.TemporaryDirectory(prefix="peftkit-push-") as name:
        files = stage(found, asked.repo_id, Path(name), _renderings(found))
        url = upload(Path(name), asked.repo_id, private=asked.private)
        return result | {"files": _sizes(Path(name), files), "folder": None, "url": url}


def _renderings(found: Published) -> list[dict[str, Any]]:
    """For who downloads an adapter to check that rows become the same tokens there, without a row of ours."""
    if found.is_model or not (found.folder / RENDERINGS).is_file():
        return []
    from peftkit.engine.parity import fixed_renderings  # seconds of imports that refusals need not wait for

    return fixed_renderings(found.folder)


def _sizes(folder: Path, files: list[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in files}


def print_push(result: dict[str, Any]) -> None:
    """What travels, what stays, and where it is."""
    for name, size in result["files"].items():
        console.print_text(f"  {name} ({console.show_bytes(size)})")
    console.print_text("never uploaded: rows, predictions, checkpoints, logs, paths of this machine")
    where = result["url"] or f"{result['folder']} (nothing was uploaded)"
    console.print_text(f"{result['kind']} {result['repo_id']}: {where}")
