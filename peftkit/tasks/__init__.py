"""The task types. One module per task, and this table: grep finds every one of them here."""

from peftkit.tasks.base import Task
from peftkit.tasks.causal_lm import CAUSAL_LM
from peftkit.tasks.feature_extraction import FEATURE_EXTRACTION
from peftkit.tasks.question_ans import QUESTION_ANS
from peftkit.tasks.seq_2_seq_lm import SEQ_2_SEQ_LM
from peftkit.tasks.seq_cls import SEQ_CLS
from peftkit.tasks.token_cls import TOKEN_CLS

TASKS: dict[str, Task] = {
    task.name: task for task in (CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS, FEATURE_EXTRACTION)
}


def keys_of_others(task: Task) -> list[str]:
    """Recipe keys that were made for other tasks and have no effect for this one."""
    return sorted({key for other in TASKS.values() for key in other.own_keys} - {*task.own_keys})
