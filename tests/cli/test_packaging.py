"""Wheel and sdist: what is in them, and that peftkit works from the wheel alone, in a folder without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = {
    "exports/llama_cpp.mjs",
    "exports/render.go",
    "publish/card.md.jinja",
    "py.typed",
    "report/page/page.js",
    "serving/page.html",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both, built without a network; a warning is an error."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-W", "error", "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warn" not in (result.stdout + result.stderr).lower()
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a folder."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


def files_below(*folders: str) -> set[str]:
    """Files of the checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return set(listed.splitlines())


def test_the_wheel_holds_the_package_recipes_and_launch_files_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {f"peftkit/{name}" for name in DATA} <= names
    known = files_below("peftkit") | {f"peftkit/shipped/{name}" for name in files_below("recipes", "configs")}
    if not known:
        pytest.skip("no git checkout")
    assert names == known


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_tests_or_caches(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "recipes/quickstart.yaml", "configs/ddp.yaml"} <= names
    assert [name for name in names if name.startswith("tests") or "__pycache__" in name or name.endswith(".pyc")] == []


def test_peftkit_works_from_the_wheel_with_the_recipes_that_it_brings(installed: Path, cls_run: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, "-m", "peftkit", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert run("--version").startswith("peftkit ")
    assert "valid" in run("validate", "recipes/quickstart.yaml")
    assert json.loads(run("schema"))["properties"]
    run("report", str(cls_run), "--output", str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_a_recipe_and_a_launch_file_that_are_not_here_are_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.launch_file import read_launch_file
    from peftkit.recipe import load_recipe
    from peftkit.shipped import here_or_shipped

    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("recipes/quickstart.yaml")).path == ROOT / "recipes" / "quickstart.yaml"
    assert read_launch_file(Path("configs/fsdp2.yaml"))["distributed_type"] == "FSDP"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("task: SEQ_CLS\n")
    assert here_or_shipped(Path("recipes/quickstart.yaml")) == Path("recipes/quickstart.yaml")
