"""SEQ_CLS: one label for a text or a pair of texts."""

from peftkit.tasks.base import Task

SEQ_CLS = Task(
    name="SEQ_CLS",
    summary="one label per text (or pair of texts)",
    auto_class="AutoModelForSequenceClassification",
    reads=(("text", "label"),),
    metrics={"loss": False, "accuracy": True, "f1_macro": True, "f1_weighted": True, "mcc": True},
    default_metric="accuracy",
    generates=False,
    uses_chat_template=False,
    has_labels=True,
    train_on=(),
    runtime_module="peftkit.tasks.seq_cls_torch",
)
