"""The job files: they parse, hold to their schemas, and call commands that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from peftkit.cli import app

JOBS = Path(__file__).parents[1] / "jobs"
DOCUMENT = Path(__file__).parents[1] / "docs/many_gpus.md"


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of a job file."""
    return list(yaml.safe_load_all((JOBS / name).read_text(encoding="utf-8")))


def scripts() -> dict[str, str]:
    """The shell scripts in the job files, and the guide's."""
    job, train = documents("kubernetes_job.yaml")[1], documents("kubeflow_trainjob.yaml")[0]
    return {
        "slurm": (JOBS / "slurm.sbatch").read_text(encoding="utf-8"),
        "kubernetes": job["spec"]["template"]["spec"]["containers"][0]["args"][0],
        "kubeflow": train["spec"]["trainer"]["args"][0],
        "skypilot": documents("skypilot.yaml")[0]["run"],
        "guide": "\n".join(re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)),
    }


def commands(script: str) -> list[list[str]]:
    """The arguments of each `peftkit` command in a script."""
    lines = script.replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\s)peftkit (train|plan|validate|evaluate)\s.*", line.split("#")[0]) for line in lines]
    words = [shlex.split(match[0]) for match in found if match]
    # A list of options in a variable, and what the shell does with the command.
    return [[word for word in line[1:] if word not in ("&", "${resume[@]}")] for line in words]


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "kubeflow", "skypilot", "guide"])
def test_the_commands_in_job_files_exist(name: str) -> None:
    root = typer.main.get_command(app)
    found = commands(scripts()[name])
    assert found
    for command, *arguments in found:
        numbers = [re.sub(r"^\$\{?[A-Za-z_]\w*(:-\d+)?\}?$", "1", argument) for argument in arguments]
        root.commands[command].make_context(command, numbers, resilient_parsing=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "kubeflow", "skypilot"])
def test_the_scripts_in_job_files_are_bash(name: str) -> None:
    result = subprocess.run(["bash", "-n"], input=scripts()[name], text=True, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_jobs_start_again_where_a_run_was_stopped_after_a_checkpoint() -> None:
    rules = documents("kubernetes_job.yaml")[1]["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert codes == {"Ignore": [75], "FailJob": [2, 3, 4, 5, 6, 7]}
    assert documents("skypilot.yaml")[0]["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert "scontrol requeue" in scripts()["slurm"]
    assert all("--resume" in script for name, script in scripts().items() if name != "guide")


def test_the_train_job_is_one_of_kubeflow_trainer() -> None:
    job = documents("kubeflow_trainjob.yaml")[0]
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"


def test_the_ray_launcher_uses_options_that_exist() -> None:
    tree = ast.parse((JOBS / "ray_train.py").read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_on_machine")
    texts = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    options = {text for text in texts if re.fullmatch(r"--[a-z-]+", text)}
    known = {name for option in typer.main.get_command(app).commands["train"].params for name in option.opts}  # type: ignore[attr-defined]
    assert options
    assert options <= known


def test_kubernetes_takes_the_job() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for document in documents("kubernetes_job.yaml"):
        validator.validate(document, validator.latest_version(), strict=True)


def test_skypilot_takes_the_task() -> None:
    sky = pytest.importorskip("sky")
    assert sky.Task.from_yaml(str(JOBS / "skypilot.yaml")).num_nodes == 2


def test_ray_takes_the_launcher() -> None:
    pytest.importorskip("ray.train.torch")
    spec = importlib.util.spec_from_file_location("ray_train", JOBS / "ray_train.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
