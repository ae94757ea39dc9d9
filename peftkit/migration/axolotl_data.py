"""axolotl's rows: paths, types of prompts and their columns, and what is learned of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peftkit.formats.messages import ROLES
from peftkit.migration.base import Draft, Note, is_on, listed, spread
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.paths import source_kind
from peftkit.recipe.schema import SourceSection

_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
# The prompt of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), which axolotl's types of this name write.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# style -> (system text around {system}, turn with an input, turn without).
_STYLES: Mapping[str, tuple[str, str, str]] = {
    "instruct": (
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": ("SYSTEM: {system}\n", "USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"),
    "phi": (
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
}
_ALPACA = {
    "alpaca": "instruct",
    "alpaca:instruct": "instruct",
    "alpaca:chat": "chat",
    "alpaca:phi": "phi",
    "alpaca_chat.load_qa": "chat",
}
_OF_CHAT = {"role": ("role", "from"), "content": ("content", "value"), "weight": ("weight",)}
# Keys of one data set, and of a type that is spelled out.
READ_OF_DATASET = (
    *("path", "name", "split", "type", "data_files", "revision", "shards", "ds_type", "field", "text_column"),
    *("field_messages", "field_tools", "message_property_mappings", "message_field_role", "message_field_content", "roles"),
    *("field_instruction", "field_input", "field_output", "system_prompt", "system_format", "format", "no_input_format"),
)
LEFT_OUT_OF_DATASET = spread(
    {
        "assistant turns are learned, but those with `train: false` or a weight of 0": """
            roles_to_train message_field_training
        """,
        "turns are learned whole; `segments` can be learned in parts": "message_field_training_detail",
        "the end of every turn that is learned is learned with it": "train_on_eos train_on_eot",
        "the tokenizer's own chat template is used": "chat_template chat_template_jinja conversation",
        "think blocks are read from `reasoning_content`, `reasoning` or `thinking` of a turn": """
            field_thinking template_thinking_key split_thinking
        """,
        "system turns stay": "drop_system_message",
        "a system text in a column of its own is read by the formats chat and instruction": "field_system",
        "rows are read as they are": "input_transform input_format field_human field_model",
        "all rows are read; `max_rows` takes the first ones": "shards_idx preprocess_shards skip",
        "code of the hub's repositories runs by `model.trust_remote_code` alone": "trust_remote_code",
        "distillation and preferences cannot be had here": """
            logprobs_field temperature field_chosen field_rejected field_prompt field_completion field_label prompt_format
            chosen_format rejected_format completion_format step_separator max_completion_length train_on_last_step_only
        """,
        "made-up rows are not trained on": "length sequence_length min_input_id max_input_id seed",
    }
)
_STOPS_SLICE = re.compile(r"(\w+)\[:(\d+)\]")


def read_data(draft: Draft) -> None:
    """Everything about rows."""
    for key, ours in (("datasets", "data.train"), ("test_datasets", "data.validation")):
        if draft.get(key) is not None:
            notes: list[str] = []
            sources = [_source(draft, key, item, notes) for item in _items(draft, key)]
            draft.put(ours, sources[0] if len(sources) == 1 else sources, key, why="; ".join(dict.fromkeys(notes)))
    _stream(draft)
    _validation(draft)
    _learned(draft)
    _length(draft)


def _items(draft: Draft, key: str) -> list[Mapping[str, Any]]:
    value = draft.get(key)
    items = value if isinstance(value, list) else [value]
    made = [{"path": item} if isinstance(item, str) else item for item in items]
    if not made or any(not isinstance(item, dict) or not item.get("path") for item in made):
        draft.refuse(key, "is a list of data sets, each with a `path`; the one here is not")
        return []
    return made


def _source(draft: Draft, key: str, item: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """One data set as a source of ours; what is to be known of it goes to the notes."""
    path = _path(draft, item)
    made: dict[str, Any] = {"path": path} | _layout(draft, key, item, notes)
    kind = source_kind(SourceSection(path=path), draft.recipe_dir)
    split = str(item.get("split") or "")
    if piece := _STOPS_SLICE.fullmatch(split):
        split, made["max_rows"] = piece[1], int(piece[2])
    if kind == "hub":
        made |= {"config": item["name"]} if isinstance(item.get("name"), str) else {}
        made |= {"revision": item["revision"]} if item.get("revision") else {}
    if split and kind in ("hub", "saved"):
        made["split"] = split
    _left_out(draft, key, item)
    if item.get("shards"):
        notes.append("`shards` takes a part of the rows there; `max_rows` does here")
    return made


def _left_out(draft: Draft, key: str, item: Mapping[str, Any]) -> None:
    """A note on each key of a data set that nothing here reads."""
    inner = item["type"] if isinstance(item.get("type"), dict) else {}
    for name in (*item, *inner):
        if name in READ_OF_DATASET or not is_on(item.get(name, inner.get(name))):
            continue
        known = name in LEFT_OUT_OF_DATASET
        why = LEFT_OUT_OF_DATASET[name] if known else did_you_mean(name, READ_OF_DATASET).removeprefix("; ") or "no such key"
        draft.notes[f"{key}.{name}"] = Note(f"{key}.{name}", "no_equal" if known else "unknown", "", why)


def _path(draft: Draft, item: Mapping[str, Any]) -> str:
    path, files = str(item["path"]), listed(item["data_files"]) if item.get("data_files") else []
    if not files:
        return draft.place(path)
    if len(files) > 1:
        draft.refuse("datasets", f"`{path}` has several data_files; name a folder, a glob, or one data set for each of them")
    if path in _BUILDERS:
        return draft.place(files[0])
    kind = source_kind(SourceSection(path=path), draft.recipe_dir)
    return f"hf://datasets/{path}/{files[0]}" if kind == "hub" else draft.place(f"{path}/{files[0]}")


def _layout(draft: Draft, key: str, item: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Format, columns and template of a type."""
    kind = item.get("type")
    if isinstance(kind, dict):
        return _defined(kind)
    name = str(kind or "chat_template")
    if name in _ALPACA:
        return {"format": "prompt_completion", "template": _template(*_STYLES[_ALPACA[name]], (_WITH_INPUT, _WITHOUT), {})}
    if name in ("chat_template", "chat_template.default", "sharegpt", "messages"):
        return _chat(draft, key, item, "conversations" if name == "sharegpt" else "messages")
    if name in ("completion", "pretrain"):
        field = str(item.get("field") or item.get("text_column") or "text")
        return {"format": "text"} | ({"columns": {"text": field}} if field != "text" else {})
    if name == "input_output":
        return {"format": "prompt_completion"}
    notes.append(f"the type `{name}` is not known here; the format is recognised by the columns: look at it by `peftkit data`")
    return {}


def _chat(draft: Draft, key: str, item: Mapping[str, Any], default: str) -> dict[str, Any]:
    field = str(item.get("field_messages") or default)
    columns = {"messages": field} if field not in ("messages", "conversations") else {}
    columns |= {"tools": str(item["field_tools"])} if item.get("field_tools") not in (None, "tools") else {}
    stated = item.get("message_property_mappings")
    mappings = dict(stated) if isinstance(stated, dict) else {}
    mappings |= {name: item[f"message_field_{name}"] for name in ("role", "content") if item.get(f"message_field_{name}")}
    wrong = [f"{ours}: {theirs}" for ours, theirs in mappings.items() if str(theirs) not in _OF_CHAT.get(ours, (ours,))]
    roles = item.get("roles")
    pairs = roles.items() if isinstance(roles, dict) else ()
    wrong += [f"role {name}" for role, names in pairs for name in listed(names) if ROLES.get(name) != ROLES.get(role, role)]
    if wrong:
        known = f"{', '.join(ROLES)} in `role` or `from`, and texts in `content` or `value`"
        draft.refuse(key, f"`{item['path']}` has {', '.join(wrong)}; turns here have {known}: rename them in the rows")
    return {"format": "chat"} | ({"columns": columns} if columns else {})


def _defined(kind: Mapping[str, Any]) -> dict[str, Any]:
    """A type that the file itself spells out: the same text, as a template."""
    fields = {name: str(kind.get(f"field_{name}") or name) for name in ("instruction", "input", "output", "system")}
    whole = str(kind.get("format") or "{instruction} {input} ")
    without = str(kind.get("no_input_format") or whole.replace("{input}", ""))
    system = str(kind.get("system_prompt") or "")
    template = _template(str(kind.get("system_format") or "{system}"), whole, without, (system, system), fields)
    return {"format": "prompt_completion", "template": template}


def _template(frame: str, whole: str, without: str, systems: tuple[str, str], fields: Mapping[str, str]) -> dict[str, str]:
    """A prompt as Jinja over the row's columns, with an input and without, and its completion."""
    head = [frame.replace("{system}", system) if system else "" for system in systems]
    texts = [_jinja(head[0] + whole, fields), _jinja(head[1] + without, fields)]
    column = fields.get("input", "input")
    prompt = (
        texts[0] if texts[0] == texts[1] else f"{{% if {column} | default('') %}}{texts[0]}{{% else %}}{texts[1]}{{% endif %}}"
    )
    return {"prompt": prompt, "completion": f"{{{{ {fields.get('output', 'output')} }}}}"}


def _jinja(text: str, fields: Mapping[str, str]) -> str:
    for name in ("instruction", "input"):
        text = text.replace(f"{{{name}}}", f"{{{{ {fields.get(name, name)} }}}}")
    return text


def _stream(draft: Draft) -> None:
    """Rows of a pretraining data set, which are always streamed there."""
    key = "pretraining_dataset" if draft.get("pretraining_dataset") is not None else "streaming"
    if key == "pretraining_dataset":
        notes: list[str] = []
        sources = [
            _source(draft, key, {"type": "pretrain", **item}, notes) | {"streaming": True} for item in _items(draft, key)
        ]
        draft.put("data.train", sources[0] if len(sources) == 1 else sources, key, why="; ".join(dict.fromkeys(notes)))
        draft.drop("streaming", "follows from pretraining_dataset")
    elif draft.is_on("streaming") and "data.train" in draft.entries:
        train = draft.value("data.train")
        for source in train if isinstance(train, list) else [train]:
            source["streaming"] = True
        draft.put("data.train", train, "datasets", "streaming", why=draft.entries["data.train"].why)
    streams = key == "pretraining_dataset" or draft.is_on("streaming")
    if streams and draft.get("streaming_multipack_buffer_size") is not None:
        draft.put("data.shuffle_buffer_size", draft.get("streaming_multipack_buffer_size"), "streaming_multipack_buffer_size")
    for name in ("streaming", "streaming_multipack_buffer_size"):
        if name not in draft.notes:
            draft.drop(name, "rows are not streamed")


def _validation(draft: Draft) -> None:
    size = draft.number("val_set_size", 0)
    if draft.get("test_datasets") is not None or not size:
        draft.drop("val_set_size", "has no effect beside test_datasets" if size else "no rows are held out")
    elif 0 < size < 1:
        draft.put("data.validation", size, "val_set_size")
    else:
        why = f"{size} rows there; here it is a fraction or a file of its own: choose one"
        draft.put("data.validation", 0.1, "val_set_size", why=why)


def _learned(draft: Draft) -> None:
    if draft.is_on("train_on_inputs"):
        draft.put("data.train_on", "all", "train_on_inputs")
    else:
        draft.drop("train_on_inputs", "answers alone are learned, as it is by default here")


def _length(draft: Draft) -> None:
    tool, strategy = draft.tool.read, draft.get("excess_length_strategy")
    train = draft.value("data.train", [])
    if strategy is not None:
        draft.put(
            "data.truncation", tool["excess_length_strategy"].values.get(str(strategy), strategy), "excess_length_strategy"
        )
    elif any(source.get("format") == "text" for source in (train if isinstance(train, list) else [train])):
        draft.add("data.truncation", "split", "longer texts become several examples, as in axolotl")
    why = "" if "data.truncation" in draft.entries else tool["sequence_len"].why
    draft.put("data.max_length", draft.get("sequence_len"), "sequence_len", why=why)
    if draft.is_on("sample_packing") and draft.value("model.attn_implementation") == "flex_attention":
        draft.drop(
            "sample_packing", "rows are not packed under flex_attention here; `sdpa` and flash_attention_2 can", "changed"
        )
    elif draft.is_on("sample_packing"):
        draft.put("data.packing", True, "sample_packing", why=tool["sample_packing"].why)
    else:
        draft.drop("sample_packing", "`data.packing: auto` lays rows end to end where that changes nothing but speed")
