"""What `auto` becomes on which machine, what a machine refuses, and the resolved recipe that says it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.plan import Hardware, Plan, make_plan, num_steps, steps_per_epoch, warmup_steps
from peftkit.recipe import load_recipe
from peftkit.resolved import resolved_yaml
from tests.conftest import ROWS, write_jsonl
from tests.unit.conftest import Load

CPU = Hardware("cpu", "the CPU", True, 2**34)
GPU = Hardware("cuda", "H100", True, 2**36)
OLD_GPU = Hardware("cuda", "T4", False, 2**34)
MPS = Hardware("mps", "Apple GPU", True, 2**34)
FOUR = Hardware("cuda", "H100", True, 2**36, num_processes=4)
PlanFor = Callable[..., Plan]


@pytest.fixture
def plan_for(load: Load, recipe: dict[str, Any]) -> PlanFor:
    """The plan of the valid recipe with overrides, for one machine."""
    return lambda hardware, *overrides: make_plan(load(recipe, *overrides), hardware)


@pytest.mark.parametrize(
    ("hardware", "overrides", "dtype", "precision"),
    [
        (CPU, [], "float32", "no"),
        (MPS, [], "float32", "no"),
        (GPU, [], "bfloat16", "bf16"),
        (FOUR, [], "bfloat16", "bf16"),
        (OLD_GPU, [], "float32", "no"),
        (GPU, ["adapter.method=full"], "float32", "no"),
        (GPU, ["adapter.method=full", "training.mixed_precision=bf16"], "float32", "bf16"),
        (GPU, ["adapter.method=head"], "bfloat16", "bf16"),
        (GPU, ["training.mixed_precision=no"], "float32", "no"),
        (GPU, ["training.mixed_precision=bf16"], "bfloat16", "bf16"),
        (GPU, ["training.mixed_precision=fp16"], "float16", "fp16"),
        (OLD_GPU, ["training.mixed_precision=fp16"], "float16", "fp16"),
        (OLD_GPU, ["model.dtype=float16"], "float16", "fp16"),
        (GPU, ["model.dtype=float32"], "float32", "no"),
        (CPU, ["model.dtype=bfloat16"], "bfloat16", "bf16"),
        (CPU, ["training.mixed_precision=bf16"], "float32", "bf16"),
        (GPU, ["model.dtype=bfloat16", "training.mixed_precision=no"], "bfloat16", "no"),
    ],
)
def test_dtype_and_precision_fit_the_machine_and_the_recipe(
    plan_for: PlanFor, hardware: Hardware, overrides: list[str], dtype: str, precision: str
) -> None:
    plan = plan_for(hardware, *overrides)
    assert (plan.dtype, plan.mixed_precision) == (dtype, precision)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (32, "auto", 1, 8), (6, "auto", 1, 6), (32, "auto", 8, 4), (9, "auto", 4, 2), (4, "auto", 4, 1),
        (32, 16, 1, 16), (32, 3, 4, 3),
    ],
)  # fmt: skip
def test_the_micro_batch_is_a_share_of_the_batch_and_at_most_8(
    plan_for: PlanFor, batch: int, micro: int | str, processes: int, expected: int
) -> None:
    hardware = Hardware("cuda", "H100", True, 2**36, processes)
    plan = plan_for(hardware, f"training.batch_size={batch}", f"training.micro_batch_size={micro}")
    assert plan.micro_batch_size == expected


@pytest.mark.parametrize(
    ("override", "rate"),
    [
        ("adapter.method=lora", 2e-4),
        ("adapter.method=full", 5e-5),
        ("adapter.method=head", 1e-2),
        ("training.learning_rate=3", 3.0),
    ],
)
def test_the_learning_rate_is_that_of_the_method_unless_stated(plan_for: PlanFor, override: str, rate: float) -> None:
    assert plan_for(CPU, override).learning_rate == rate


def test_every_decision_is_listed_with_its_reason(plan_for: PlanFor) -> None:
    choices = {choice.key: (choice.value, choice.reason) for choice in plan_for(GPU).choices}
    assert choices == {
        "model.dtype": ("bfloat16", "H100 computes in bfloat16"),
        "training.mixed_precision": ("bf16", "the weights are bfloat16"),
        "training.micro_batch_size": (8, "at most 8, and 32 over 1 process(es)"),
        "training.learning_rate": (2e-4, "QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), table 9"),
    }


def test_nothing_is_decided_where_the_recipe_decides(plan_for: PlanFor) -> None:
    stated = ["model.dtype=float32", "training.mixed_precision=no", "training.micro_batch_size=4", "training.learning_rate=0.1"]
    assert plan_for(GPU, *stated).choices == ()


@pytest.mark.parametrize(
    ("hardware", "override", "key", "words"),
    [
        (CPU, "training.mixed_precision=fp16", "training.mixed_precision", "float16 training needs a GPU"),
        (CPU, "model.dtype=float16", "model.dtype", "float16 training needs a GPU"),
        (OLD_GPU, "training.mixed_precision=bf16", "training.mixed_precision", "T4 has no bfloat16; use fp16"),
        (OLD_GPU, "model.dtype=bfloat16", "model.dtype", "T4 has no bfloat16"),
        (CPU, "training.optim=paged_adamw_8bit", "training.optim", "pages between GPU and CPU memory"),
        (MPS, "training.optim=paged_adamw_32bit", "training.optim", "pages between GPU and CPU memory"),
        (CPU, "training.activation_offloading=true", "training.activation_offloading", "this machine has no such GPU"),
        (MPS, "training.torch_compile=true", "training.torch_compile", "not for an Apple GPU; use false"),
        (CPU, "model.attn_implementation=flash_attention_2", "model.attn_implementation", "needs a CUDA GPU; use sdpa"),
        (FOUR, "training.batch_size=3", "training.batch_size", "3 sequences cannot feed 4 processes"),
    ],
)
def test_what_a_machine_cannot_do_is_refused(
    plan_for: PlanFor, hardware: Hardware, override: str, key: str, words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(hardware, override)
    (found,) = caught.value.problems
    assert (found.where, found.key, found.exit_code) == (f"--set {override}", key, 2)
    assert words in found.what


def test_loftq_is_for_cuda(plan_for: PlanFor) -> None:
    loftq = ["adapter.init_lora_weights=loftq", "adapter.loftq_config={loftq_bits: 4}"]
    with pytest.raises(RecipeError, match=r"adapter\.init_lora_weights: `loftq` needs a CUDA GPU, this machine has none"):
        plan_for(CPU, *loftq)
    assert plan_for(GPU, *loftq).recipe.adapter.loftq_config.loftq_bits == 4


def test_full_fine_tuning_of_float16_weights_is_refused_everywhere(plan_for: PlanFor) -> None:
    with pytest.raises(RecipeError, match=r"model\.dtype: weights that are trained themselves lose their updates in float16"):
        plan_for(GPU, "adapter.method=full", "model.dtype=float16")


def test_everything_that_a_machine_refuses_comes_at_once(plan_for: PlanFor) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(CPU, "training.optim=paged_adamw_8bit", "model.attn_implementation=flash_attention_2", "model.dtype=float16")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("rows", "overrides", "steps"),
    [
        (32, [], 3),
        (33, [], 6),
        (1, [], 3),
        (64, ["training.num_train_epochs=0.5"], 1),
        (1, ["training.num_train_epochs=0.1"], 1),
        (320, ["training.num_train_epochs=1.25"], 13),
        (1000, ["training.max_steps=7"], 7),
        (10, ["training.batch_size=1"], 30),
    ],
)
def test_the_number_of_steps_follows_from_rows_epochs_and_batch(
    plan_for: PlanFor, rows: int, overrides: list[str], steps: int
) -> None:
    assert num_steps(plan_for(CPU, *overrides), rows) == steps


def test_the_number_of_steps_does_not_depend_on_the_machine(plan_for: PlanFor) -> None:
    assert {steps_per_epoch(plan_for(hardware), 100) for hardware in (CPU, GPU, FOUR)} == {4}


@pytest.mark.parametrize(("value", "steps"), [(0, 0), (0.1, 10), (0.015, 2), (1, 1), (25, 25), (0.999, 100)])
def test_warm_up_is_a_count_or_below_1_a_fraction(plan_for: PlanFor, value: float, steps: int) -> None:
    assert warmup_steps(plan_for(CPU, f"training.warmup_steps={value}"), 100) == steps


@pytest.mark.parametrize(
    ("overrides", "keeps_best"),
    [
        ([], True),
        (["data.validation=null"], False),
        (["training.load_best_model_at_end=false"], False),
        (["training.metric_for_best_model=token_accuracy"], True),
        (["task=SEQ_CLS", "data.train.path=train.jsonl"], True),
    ],
)
def test_the_best_adapter_is_kept_where_there_is_validation(plan_for: PlanFor, overrides: list[str], keeps_best: bool) -> None:
    assert plan_for(CPU, *overrides).keeps_best == keeps_best


RESOLVED: list[tuple[str, list[str]]] = [
    ("CAUSAL_LM", []),
    ("SEQ_2_SEQ_LM", []),
    ("SEQ_CLS", []),
    ("CAUSAL_LM", ["training.max_steps=3"]),
    ("CAUSAL_LM", ["data.validation=null"]),
    ("CAUSAL_LM", ["data.validation=null", "data.test=CAUSAL_LM.jsonl", "evaluation.batch_size=4"]),
    ("CAUSAL_LM", ["data.max_length=64", "data.train_on=all", "generation.do_sample=true", "generation.top_p=0.5"]),
    ("CAUSAL_LM", ["training.max_grad_norm=null", "model.config_overrides={a: null, b: 1e-4, c: no}"]),
    ("CAUSAL_LM", ["name='1e4'", "model.revision='12e3'", "data.system_prompt='no'", "data.train.columns={output: '0o7'}"]),
    ("CAUSAL_LM", ["data.system_prompt=' 12:30 é 🙂 \"x\": #'", "adapter.target_modules='.*\\.(q|v)_proj'"]),
    ("CAUSAL_LM", ["adapter.layer_replication=[[0, 2], [1, 3]]", "adapter.velora_config={scale: 1e-4}"]),
    ("CAUSAL_LM", ["adapter.rank_pattern={'^q$': 3}", "adapter.init_lora_weights=false", "adapter.layers_to_transform=3",
                   "adapter.target_modules=[q]"]),
    ("CAUSAL_LM", ["training.loraplus_lr_ratio=16", "training.lr_scheduler_type=cosine_with_min_lr",
                   "training.lr_scheduler_kwargs={min_lr: 1e-6}"]),
    ("CAUSAL_LM", ["adapter.method=full"]),
    ("SEQ_CLS", ["adapter.method=head", "data.labels=['1e4', 'no', '~', '', '0x1f']"]),
    ("SEQ_CLS", ["training.early_stopping_patience=3", "training.metric_for_best_model=mcc", "output.report_to=[tensorboard]"]),
]  # fmt: skip


@pytest.mark.parametrize("hardware", [CPU, GPU], ids=["cpu", "cuda"])
@pytest.mark.parametrize(("task", "overrides"), RESOLVED)
def test_the_resolved_recipe_is_a_recipe_that_resolves_to_itself(
    load: Load, recipe: dict[str, Any], tmp_path: Path, hardware: Hardware, task: str, overrides: list[str]
) -> None:
    write_jsonl(tmp_path / f"{task}.jsonl", [ROWS[task]])
    plan = make_plan(load(recipe, f"task={task}", f"data.train={task}.jsonl", *overrides), hardware)
    path = tmp_path / "elsewhere" / "resolved.yaml"
    path.parent.mkdir()
    path.write_text(resolved_yaml(plan), encoding="utf-8")
    again = make_plan(load_recipe(path), hardware)
    assert resolved_yaml(again) == path.read_text(encoding="utf-8")
    assert again.recipe.adapter == plan.recipe.adapter
    assert again.choices == ()


def test_the_resolved_recipe_states_every_decision_and_absolute_paths(plan_for: PlanFor, tmp_path: Path) -> None:
    for name in ("base", "words"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat.jinja").write_text("x")
    changes = ["model.name_or_path=./base", "model.tokenizer_name_or_path=words", "model.chat_template=chat.jinja"]
    plan = plan_for(GPU, *changes, "data.test='*.jsonl'", "training.max_grad_norm=null")
    (tmp_path / "r.yaml").write_text(resolved_yaml(plan))
    resolved = load_recipe(tmp_path / "r.yaml").recipe
    assert (resolved.model.name_or_path, resolved.model.tokenizer_name_or_path) == (f"{tmp_path}/base", f"{tmp_path}/words")
    assert (resolved.model.chat_template, resolved.model.dtype) == (f"{tmp_path}/chat.jinja", "bfloat16")
    assert resolved.data is not None
    assert resolved.data.test is not None
    assert (resolved.data.train[0].path, resolved.data.test[0].path) == (f"{tmp_path}/train.jsonl", f"{tmp_path}/*.jsonl")
    training = resolved.training
    assert (training.learning_rate, training.micro_batch_size, training.max_grad_norm) == (2e-4, 8, None)


def test_a_classifier_wants_a_higher_learning_rate_of_lora_than_a_language_model() -> None:
    rates = {task: METHODS["lora"].learning_rate_for(task)[0] for task in ("CAUSAL_LM", "SEQ_CLS")}
    assert rates == {"CAUSAL_LM": 2e-4, "SEQ_CLS": 1e-3}
