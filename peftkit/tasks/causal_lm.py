"""CAUSAL_LM: predict the next token."""

from peftkit.tasks.base import Task

LANGUAGE_METRICS = {"loss": False, "perplexity": False, "token_accuracy": True}

CAUSAL_LM = Task(
    name="CAUSAL_LM",
    summary="language model that continues text; instruction and chat tuning, continued pretraining",
    auto_class="AutoModelForCausalLM",
    reads=(("messages",), ("prompt", "completion"), ("text",)),
    metrics=LANGUAGE_METRICS,
    default_metric="loss",
    generates=True,
    uses_chat_template=True,
    has_head=False,
    has_labels=False,
    train_on=("completion", "all"),
    runtime_module="peftkit.tasks.causal_lm_torch",
)
