"""What the targets `vllm` and `sglang` share: options, and what a server must be told that trains nothing itself."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from peftkit.exports.base import Dtype, Finding, Form
from peftkit.exports.subject import Subject
from peftkit.section import Section


class ServingOptions(Section):
    """Options of the targets `vllm` and `sglang`."""

    form: Form = Field("adapter", description="merged: one model, for adapters that the server does not take.")
    dtype: Dtype = Field("auto", description="Dtype of a merged model's weights; auto: the base's.")
    name: str = Field("adapter", pattern=r"^[\w.\-]+$", description="What clients ask for as their model.")


def base_findings(subject: Subject, options: ServingOptions) -> Iterator[Finding]:
    """What holds for the base and its template, whatever the server."""
    if options.form == "adapter" and options.dtype != "auto":
        yield Finding(True, "dtype has no effect on an adapter, whose tensors are as they were trained", "leave it out")
    if options.form == "adapter" and subject.quantization is not None:
        yield Finding(
            False, f"it was trained on a base quantised by {subject.quantization}; on the full weights answers differ a little"
        )
    encoding = subject.facts.get("encoding") or {}
    if variables := encoding.get("chat_template_kwargs"):
        yield Finding(False, f"the template was rendered with {variables}: send them with every request (chat_template_kwargs)")
    if subject.facts.get("system_prompt"):
        yield Finding(False, "rows without a system message had one in training, which every request must bring here")
