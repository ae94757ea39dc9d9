"""One row of every dataset type that LLaMA-Factory and axolotl document, and what a short `data:` section makes of it.

`auto` takes each of them, after the renaming (`columns`) or the text (`template`) that its line gives; where auto would take
another format, the line names the right one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from jinja2.sandbox import SandboxedEnvironment

from peftkit.formats import FORMATS, detect_format
from peftkit.formats.base import RowError

Row = dict[str, Any]


def said(role: str, content: str, **more: Any) -> Row:
    """One turn of ours, and of OpenAI's."""
    return {"role": role, "content": content, **more}


def shared(role: str, value: str, **more: Any) -> Row:
    """One turn as ShareGPT writes it."""
    return {"from": role, "value": value, **more}


ASKED = [said("user", "Who left?"), said("assistant", "Ada.")]
ASKED_MORE = [said("user", "Who left?\nAda left."), said("assistant", "Ada.")]
BE = said("system", "Be brief.")
WORSE = [ASKED[0], said("assistant", "Bob.")]
PREFERRED = {"chosen": ASKED, "rejected": WORSE}
HUMAN, GPT = shared("human", "Who left?"), shared("gpt", "Ada.")
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
ADDED = [
    said("user", "Add 2."),
    said("assistant", "", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]),
    *(said("tool", "5"), said("assistant", "It is 5.")),
]


@dataclass(frozen=True)
class Layout:
    """One documented dataset type.

    Attributes:
        name: the tool and what it calls the type.
        row: a row of it.
        canonical: what we make of it.
        columns: `data.*.columns`, dots leading inwards.
        template: `data.*.template`.
        format: `data.*.format`, where auto takes another.
    """

    name: str
    row: Row
    canonical: Row
    columns: Mapping[str, str] = field(default_factory=dict)
    template: Mapping[str, str] = field(default_factory=dict)
    format: str = "auto"


LLAMA_FACTORY = [
    Layout("alpaca", {"instruction": "Who left?", "input": "", "output": "Ada."}, {"messages": ASKED}),
    Layout("alpaca with input", {"instruction": "Who left?", "input": "Ada left.", "output": "Ada."}, {"messages": ASKED_MORE}),
    Layout(
        "alpaca with system and history",
        {"instruction": "Who left?", "input": "", "output": "Ada.", "system": "Be brief.", "history": [["Hi", "Ho"]]},
        {"messages": [BE, said("user", "Hi"), said("assistant", "Ho"), *ASKED]},
    ),
    Layout("alpaca, true in KTO", {"instruction": "Who left?", "output": "Ada.", "kto_tag": True}, {"messages": ASKED}),
    Layout("pre-training", {"text": "Ada left."}, {"text": "Ada left."}),
    Layout("alpaca preference", {"instruction": "Who left?", "input": "", "chosen": "Ada.", "rejected": "Bob."}, PREFERRED),
    Layout("sharegpt", {"conversations": [HUMAN, GPT, HUMAN, GPT]}, {"messages": ASKED * 2}),
    Layout("sharegpt with system column", {"conversations": [HUMAN, GPT], "system": "Be brief."}, {"messages": [BE, *ASKED]}),
    Layout(
        "sharegpt with system turn", {"conversations": [shared("system", "Be brief."), HUMAN, GPT]}, {"messages": [BE, *ASKED]}
    ),
    Layout(
        "sharegpt with tools",
        {
            "conversations": [
                *(shared("human", "Add 2."), shared("function_call", '{"name": "add", "arguments": {"a": 2}}')),
                *(shared("observation", "5"), shared("gpt", "It is 5.")),
            ],
            "system": "",
            "tools": json.dumps([ADD]),
        },
        {"messages": ADDED, "tools": [{"type": "function", "function": ADD}]},
    ),
    Layout("sharegpt, true in KTO", {"conversations": [HUMAN, GPT], "kto_tag": True}, {"messages": ASKED}),
    Layout(
        "sharegpt preference",
        {"conversations": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": shared("gpt", "Bob.")},
        {name: [ASKED[0], ASKED[1] | {"weight": 0.0}, *turns] for name, turns in PREFERRED.items()},
    ),
    Layout("openai", {"messages": [BE, *ASKED]}, {"messages": [BE, *ASKED]}),
]  # fmt: skip

AXOLOTL = [
    Layout("alpaca", {"instruction": "Who left?", "input": "Ada left.", "output": "Ada."}, {"messages": ASKED_MORE}),
    Layout("jeopardy", {"question": "Who left?", "category": "people", "answer": "Ada."}, {"messages": ASKED}),
    Layout(
        "oasst", {"INSTRUCTION": "Who left?", "RESPONSE": "Ada."}, {"messages": ASKED},
        columns={"instruction": "INSTRUCTION", "output": "RESPONSE"},
    ),
    Layout("gpteacher", {"instruction": "Who left?", "input": "Ada left.", "response": "Ada."}, {"messages": ASKED_MORE}),
    Layout(
        "reflection",
        {"instruction": "Who left?", "input": "", "output": "Bob.", "reflection": "Bob stayed.", "corrected": "Ada."},
        {"messages": [ASKED[0], said("assistant", "Bob.\nReflection: Bob stayed.\nCorrected: Ada.")]},
        template={"output": "{{ output }}\nReflection: {{ reflection }}\nCorrected: {{ corrected }}"},
    ),
    *(
        Layout(
            name,
            {"question": "Who left?", "choices": ["Ada.", "Bob."], "solution": "Ada.", "explanation": "Bob stayed."},
            {"messages": [said("user", "Who left?\n- Ada.\n- Bob."), said("assistant", answer)]},
            template={"instruction": "{{ question }}{% for choice in choices %}\n- {{ choice }}{% endfor %}", "output": output},
        )
        for name, output, answer in (
            ("explainchoice", "{{ explanation }} So: {{ solution }}", "Bob stayed. So: Ada."),
            ("concisechoice", "{{ solution }}", "Ada."),
        )
    ),
    Layout(
        "summarizetldr", {"article": "Ada left.", "summary": "Ada."},
        {"messages": [said("user", "Summarize:\nAda left."), said("assistant", "Ada.")]},
        columns={"output": "summary"}, template={"instruction": "Summarize:\n{{ article }}"},
    ),
    Layout("alpaca_chat", {"instruction": "Who left?", "input": "Ada left.", "response": "Ada."}, {"messages": ASKED_MORE}),
    Layout("alpaca_chat.load_qa", {"question": "Who left?", "answer": "Ada."}, {"messages": ASKED}),
    Layout(
        "alpaca_chat.load_camel_ai", {"message_1": "Who left?", "message_2": "Ada."}, {"messages": ASKED},
        columns={"instruction": "message_1", "output": "message_2"},
    ),
    Layout(
        "alpaca_w_system.load_open_orca", {"system_prompt": "Be brief.", "question": "Who left?", "response": "Ada."},
        {"messages": [BE, *ASKED]},
    ),
    Layout(
        "context_qa", {"article": "Ada left.", "question": "Who left?", "answer": "Ada."}, {"messages": ASKED_MORE},
        columns={"input": "article"},
    ),
    Layout("context_qa.load_v2", {"context": "Ada left.", "question": "Who left?", "answer": "Ada."}, {"messages": ASKED_MORE}),
    Layout(
        "context_qa.load_404", {"article": "Ada left.", "unanswerable_question": "Who stayed?"},
        {"messages": [said("user", "Who stayed?\nAda left."), said("assistant", "The text does not say.")]},
        columns={"instruction": "unanswerable_question", "input": "article"}, template={"output": "The text does not say."},
    ),
    Layout(
        "creative_acr.load_answer", {"instruction": "Who left?", "revision": "Ada."}, {"messages": ASKED},
        columns={"output": "revision"},
    ),
    Layout(
        "creative_acr.load_critique",
        {"scores": "3", "critiques": "Too long.", "instruction": "Who left?", "answer": "Ada left."},
        {"messages": [said("user", "Who left?\nAnswer: Ada left."), said("assistant", "Too long. Score: 3")]},
        template={"input": "Answer: {{ answer }}", "output": "{{ critiques }} Score: {{ scores }}"},
    ),
    Layout(
        "creative_acr.load_revise",
        {"scores": "3", "critiques": "Too long.", "instruction": "Who left?", "answer": "Ada left.", "revision": "Ada."},
        {"messages": [said("user", "Who left?\nAnswer: Ada left.\nCritique: Too long."), said("assistant", "Ada.")]},
        columns={"output": "revision"}, template={"input": "Answer: {{ answer }}\nCritique: {{ critiques }}"},
    ),
    Layout(
        "metharme", {"prompt": "Who left?", "generation": "Ada."}, {"prompt": "Who left?", "completion": "Ada."},
        columns={"completion": "generation"},
    ),
    Layout("completion", {"text": "Ada left."}, {"text": "Ada left."}),
    Layout("completion with `field`", {"content": "Ada left."}, {"text": "Ada left."}, columns={"text": "content"}),
    Layout(
        "input_output", {"segments": [{"label": False, "text": "<s>Who left?\n"}, {"label": True, "text": "Ada.</s>"}]},
        {"segments": [{"text": "<s>Who left?\n", "train": False}, {"text": "Ada.</s>", "train": True}]},
    ),
    Layout(
        "pre-tokenized", {"input_ids": [27, 29, 9], "attention_mask": [1, 1, 1], "labels": [27, -100, 9]},
        {"input_ids": [27, 29, 9], "labels": [27, -100, 9]},
    ),
    Layout("sharegpt", {"conversations": [HUMAN, GPT]}, {"messages": ASKED}),
    Layout(
        "pygmalion", {"conversations": [{"role": "human", "value": "Who left?"}, {"role": "bot", "value": "Ada."}]},
        {"messages": ASKED},
    ),
    Layout("chat_template", {"messages": ASKED}, {"messages": ASKED}),
    Layout("chat_template with field_messages", {"turns": ASKED}, {"messages": ASKED}, columns={"messages": "turns"}),
    *(
        Layout(
            f"chat_template with message_field_training: {name}",
            {"conversations": [shared("system", "Be brief.", **no), HUMAN | no, GPT | no, HUMAN | no, GPT | {name: yes}]},
            {"messages": [BE, ASKED[0], ASKED[1] | {"weight": 0.0}, ASKED[0], ASKED[1] | {"weight": 1.0}]},
        )
        for name, no, yes in (
            *(("train", {"train": False}, True), ("training", {"training": False}, True), ("weight", {"weight": 0}, 1)),
        )
    ),
    Layout(
        "chat_template with tools",
        {
            "tools": [{"type": "function", "function": ADD | {"parameters": '{"type": "object"}'}}],
            "messages": [
                said("user", "Add 2."),
                {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": '{"a": 2}'}}]},
                said("tool", "5", name="add", tool_call_id="c1"), said("assistant", "It is 5."),
            ],
        },
        {
            "tools": [{"type": "function", "function": ADD | {"parameters": {"type": "object"}}}],
            "messages": [
                ADDED[0], said("assistant", "", tool_calls=[ADDED[1]["tool_calls"][0] | {"id": "c1"}]),
                said("tool", "5", name="add", tool_call_id="c1"), ADDED[3],
            ],
        },
    ),
    Layout(
        "chat_template with content parts and reasoning",
        {"messages": [ASKED[0], ASKED[1] | {"content": [{"type": "text", "text": "Ada."}], "reasoning_content": "Hm."}]},
        {"messages": [ASKED[0], ASKED[1] | {"reasoning_content": "Hm."}]},
    ),
    Layout(
        "dpo chatml.argilla", {"instruction": "Who left?", "chosen_response": "Ada.", "rejected_response": "Bob."}, PREFERRED,
        columns={"chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    Layout("dpo chatml.argilla_chat", PREFERRED, PREFERRED),
    Layout(
        "dpo chatml.icr", {"input": "Who left?", "chosen": "Ada.", "rejected": "Bob."}, PREFERRED, columns={"prompt": "input"}
    ),
    Layout(
        "dpo chatml.intel", {"system": "Be brief.", "question": "Who left?", "chosen": "Ada.", "rejected": "Bob."},
        {"chosen": [BE, *ASKED], "rejected": [BE, *WORSE]},
    ),
    Layout("dpo chatml.prompt_pairs", {"prompt": "Who left?", "chosen": "Ada.", "rejected": "Bob."}, PREFERRED),
    Layout("dpo chatml.ultra", {"prompt": "Who left?", **PREFERRED}, PREFERRED),
    Layout(
        "dpo zephyr.nectar", {"prompt": "Who left?", "answers": [{"answer": "Ada.", "rank": 1}, {"answer": "Bob.", "rank": 2}]},
        PREFERRED, columns={"chosen": "answers.0.answer", "rejected": "answers.1.answer"},
    ),
    Layout("dpo chat_template.default", {"messages": ASKED[:1], "chosen": ASKED[1], "rejected": WORSE[1]}, PREFERRED),
    Layout("orpo chat_template.argilla", {"prompt": "Who left?", **PREFERRED}, PREFERRED),
    Layout("kto chatml.argilla", {"instruction": "Who left?", "completion": "Ada."}, {"messages": ASKED}),
    Layout(
        "kto chatml.argilla_chat", {"chosen": ASKED[:1], "completion": ASKED[1:]}, {"messages": ASKED},
        columns={"prompt": "chosen"},
    ),
    Layout("kto llama3.argilla_chat", {"completion": ASKED}, {"messages": ASKED}, columns={"messages": "completion"}),
    Layout("kto chatml.intel", {"system": "", "question": "Who left?", "completion": "Ada."}, {"messages": ASKED}),
    Layout("kto chatml.ultra", {"prompt": "Who left?", "completion": "Ada."}, {"prompt": "Who left?", "completion": "Ada."}),
    Layout(
        "kto user_defined, true", {"system": "Be brief.", "prompt": "Who left?", "completion": "Ada.", "label": True},
        {"messages": [BE, *ASKED]}, columns={"instruction": "prompt"}, format="instruction",
    ),
]  # fmt: skip

LAYOUTS = [*(("LLaMA-Factory", layout) for layout in LLAMA_FACTORY), *(("axolotl", layout) for layout in AXOLOTL)]


def prepared(layout: Layout) -> Row:
    """The row as the sources hand it to a format: renamed and templated, with its own columns still there."""
    result = dict(layout.row)
    for ours, theirs in layout.columns.items():
        value: Any = layout.row
        for part in theirs.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        result[ours] = value
    environment = SandboxedEnvironment()
    return result | {name: environment.from_string(text).render(layout.row) for name, text in layout.template.items()}


@pytest.mark.parametrize("layout", [layout for _, layout in LAYOUTS], ids=[f"{tool} {layout.name}" for tool, layout in LAYOUTS])
def test_a_documented_layout_loads_with_a_short_section(layout: Layout) -> None:
    row = prepared(layout)
    item = detect_format(frozenset(row)) if layout.format == "auto" else FORMATS[layout.format]
    assert item is not None
    assert item.convert(row, True) == layout.canonical


KTO = "a bad answer, which must not be learned; leave such rows out"
MULTIMODAL = "is not empty; only text can be learned"
PARTS = "turns are learned whole, `segments` in parts"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        # The other answers of a KTO set are there to be avoided: learning one, even as one row among many, is the opposite.
        ({"instruction": "Who left?", "input": "", "output": "Bob.", "kto_tag": False}, KTO),
        ({"conversations": [HUMAN, shared("gpt", "Bob.")], "kto_tag": False}, KTO),
        ({"conversations": [HUMAN, shared("gpt", "Bob.")], "kto_tag": "false"}, KTO),
        ({"prompt": "Who left?", "completion": "Bob.", "label": False}, KTO),
        ({"instruction": "Who left?", "completion": "Bob.", "label": False}, KTO),
        ({"conversations": [HUMAN, GPT], "images": ["a.png"]}, MULTIMODAL),
        ({"conversations": [HUMAN, GPT], "videos": ["a.mp4"]}, MULTIMODAL),
        ({"conversations": [HUMAN, GPT], "audios": ["a.mp3"]}, MULTIMODAL),
        ({"instruction": "Who left?", "output": "Ada.", "images": ["a.png"]}, MULTIMODAL),
        ({"messages": [ASKED[0] | {"content": [{"type": "image", "path": "a.png"}]}, ASKED[1]]}, "has the type 'image'"),
        # axolotl can learn parts of turns, and users' turns; here turns are learned whole, and users' only by `train_on: all`.
        ({"conversations": [HUMAN, GPT | {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]}, PARTS),
        ({"messages": [ASKED[0], ASKED[1] | {"content": [{"type": "text", "text": "Ada.", "train": True}]}]}, PARTS),
        ({"conversations": [HUMAN | {"train": True}, GPT]}, "only assistant turns are learned one by one"),
    ],
)  # fmt: skip
def test_a_layout_that_would_be_learned_wrongly_is_refused(row: Row, words: str) -> None:
    item = detect_format(frozenset(row))
    assert item is not None
    with pytest.raises(RowError) as caught:
        item.convert(row, True)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 3?", "completions": ["2 + 3 is 5.", "So 6."], "labels": [True, False]},  # axolotl stepwise_supervised
        {"source": "demo", "state": "Ada left.", "questions": {}, "labels": {}},  # axolotl decision.jsonl
    ],
)
def test_a_layout_of_another_objective_is_not_taken_for_one_of_ours(row: Row) -> None:
    assert detect_format(frozenset(row)) is None
