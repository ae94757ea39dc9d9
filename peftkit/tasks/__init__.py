"""The task types. One module per task, and this table: grep finds every one of them here."""

from peftkit.tasks.base import Task
from peftkit.tasks.causal_lm import CAUSAL_LM
from peftkit.tasks.seq_2_seq_lm import SEQ_2_SEQ_LM
from peftkit.tasks.seq_cls import SEQ_CLS

TASKS: dict[str, Task] = {task.name: task for task in (CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS)}
