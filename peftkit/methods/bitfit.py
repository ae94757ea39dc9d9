"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): every bias b of y = W x + b is trained, and the head; nothing is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave
from peftkit.section import Section


class BitFitSection(Section):
    """`adapter:` with `method: bitfit`."""

    method: Literal["bitfit"] = Field("bitfit", description="BitFit: the biases of the base model (and the head) are trained.")
    modules_to_save: ModulesToSave = None


# Model types without any bias by their default config (transformers 5.23), checked by a test.
_WITHOUT_BIASES = """
apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama doge ernie4_5
eurobert exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text glm4_moe
glm4_moe_lite granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hy_v3 hyperclovax
inkling2_text inkling_text internlm3 iquestcoder kolibri1 lfm2 lfm3 llama llama4_text longcat_flash longt5 mellum
mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral mpt mt5 nanochat olmo olmo2
olmo3 olmoe phi3 qwen3 qwen3_moe smollm3 solar_open switch_transformers t5 ultrabert umt5 vaultgemma youtu
"""
WITHOUT_BIASES = frozenset(_WITHOUT_BIASES.split())
SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "conv_bias", "router_bias")


def _lacks(config: Mapping[str, Any]) -> str:
    """Why a model of this config.json has nothing to train; empty where it has, or where that cannot be told."""
    if config.get("model_type") not in WITHOUT_BIASES or any(config.get(name) for name in SWITCHES):
        return ""
    return "its layers have no biases"


BITFIT = Method(
    name="bitfit",
    summary="The biases of the base model (Ben Zaken et al. 2021); for models that have any",
    section=BitFitSection,
    kind="subset",
    why_not="its layers have no biases",
    lacks=_lacks,
    trains=lambda name: name.endswith("bias"),
    several_adapters=False,
    learning_rate=5e-3,
    learning_rate_source="ours: all-MiniLM-L6-v2 on sentence polarity: 82.9% at 1e-3, 85.8% at 5e-3",
    task_learning_rates={"SEQ_CLS": (5e-3, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
)
