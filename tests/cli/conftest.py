"""Trained runs that the tests of `infer`, `merge` and `evaluate` share, and a headless browser for pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import instruction_rows, label_rows, write_jsonl
from tests.fake_hub import FakeHub, point_at
from tests.runs import tiny_recipe, train

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _trained(task: str, models_dir: Path, folder: Path) -> Path:
    """A run that has learned something, so that its answers differ from row to row, with a test file of six rows."""
    rows = label_rows(30) if task == "SEQ_CLS" else instruction_rows(30)
    if task == "SEQ_2_SEQ_LM":
        rows = [{"source": row["instruction"], "target": row["output"]} for row in rows]
    test = write_jsonl(folder / "test.jsonl", rows[-6:])
    adapter = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    if task != "SEQ_CLS":
        adapter["modules_to_save"] = ["lm_head"]
    training = {"max_steps": 60, "learning_rate": 0.02, "logging_steps": 60, "micro_batch_size": 8}
    recipe = tiny_recipe(task, models_dir, folder, adapter=adapter, training=training, data={"test": str(test)})
    if task != "SEQ_CLS":
        recipe.write_text(recipe.read_text() + "generation: {max_new_tokens: 8}\n")
    train(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def lm_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAUSAL_LM run on the tiny Llama, rows in format `instruction`."""
    return _trained("CAUSAL_LM", models_dir, tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def cls_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SEQ_CLS run on the tiny BERT with the classes neg and pos."""
    return _trained("SEQ_CLS", models_dir, tmp_path_factory.mktemp("cls"))


@pytest.fixture(scope="session")
def s2s_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SEQ_2_SEQ_LM run on the tiny T5."""
    return _trained("SEQ_2_SEQ_LM", models_dir, tmp_path_factory.mktemp("s2s"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address; nothing may be said on the console, and no request may go to what `is_own` does not know."""
    said: list[str] = []
    contexts = []

    def opened(address: str, is_own: Callable[[str], bool], **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if is_own(request.url) else said.append(request.url))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on loopback with an empty cache on this side; the user `ann` has the token `hf_ann`."""
    with FakeHub() as server:
        point_at(server, monkeypatch, tmp_path / "home")
        server.tokens = {"hf_ann": "ann"}
        yield server
