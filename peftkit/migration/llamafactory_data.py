"""LLaMA-Factory's rows: names in dataset_info.json, their columns and tags, and what is learned of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, RecipeError
from peftkit.formats.messages import ROLES
from peftkit.migration.base import Draft, listed
from peftkit.migration.places import find_place, from_recipe
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.yaml_file import parse_scalar

_INFO = "dataset_info.json"
_MAX_BYTES = 20_000_000
# Our column -> the one of dataset_info.json.
_ALPACA = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
_PAIRS = {
    "instruction": "prompt",
    "input": "query",
    "chosen": "chosen",
    "rejected": "rejected",
    "system": "system",
    "tools": "tools",
}
_ALPACA_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output"}
_CHAT = {"messages": "messages", "system": "system", "tools": "tools", "kto_tag": "kto_tag"}
_MEDIA = ("images", "videos", "audios")
_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "assistant"),
    "system_tag": ("system", "system"),
}
_STOPS = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted", "interleave_once": "all_exhausted"}


def read_data(draft: Draft) -> None:
    """Everything about rows."""
    _model(draft)
    if draft.get("dataset") is not None:
        train = [_source(draft, "dataset", name) for name in listed(draft.get("dataset"))]
        _mix(draft, train)
        streams = draft.is_on("streaming")
        train = [source | ({"streaming": True} if streams else {}) for source in train]
        keys = ("dataset", "dataset_dir", "max_samples", *(("streaming",) if streams else ()))
        why = (
            ""
            if _info(draft) or draft.get("dataset_dir") == "ONLINE"
            else f"no {_INFO} was found: put the names of the files here"
        )
        draft.put("data.train", train[0] if len(train) == 1 else train, *keys, why=why)
        if streams and draft.get("buffer_size") is not None:
            draft.put("data.shuffle_buffer_size", draft.get("buffer_size"), "buffer_size")
    for key in ("streaming", "buffer_size"):
        if key not in draft.notes:
            draft.drop(key, "rows are not streamed")
    _validation(draft)
    _learned(draft)
    _length(draft)


def _model(draft: Draft) -> None:
    name = draft.get("model_name_or_path")
    if name is None:
        draft.refuse("model_name_or_path", "is missing: the base model")
    else:
        place = draft.place(name)
        draft.put("model.name_or_path", place, "model_name_or_path")


def _info(draft: Draft) -> tuple[Path, Mapping[str, Any]] | None:
    """The folder of the data sets and what is known of them; None where there is no such file."""
    folder = str(draft.get("dataset_dir", "data"))
    path = find_place(f"{folder}/{_INFO}", draft.config.path.parent)
    if path is None or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error}")]) from None
    return path.parent, known if isinstance(known, dict) else {}


def _source(draft: Draft, key: str, name: str) -> dict[str, Any]:
    """One data set as a source of ours."""
    found = _info(draft)
    limit = {"max_rows": draft.get("max_samples")} if isinstance(draft.get("max_samples"), int) else {}
    if found is None:
        return {"path": _guessed(str(draft.get("dataset_dir", "data")), name)} | limit
    folder_path, known = found
    entry = known.get(name)
    if not isinstance(entry, dict):
        draft.refuse(key, f"`{name}` is not in {folder_path / _INFO}{did_you_mean(name, known)}")
        return {"path": name}
    source = _place(draft, key, folder_path, entry) | _layout(draft, key, name, entry)
    rows = entry.get("num_samples")
    return source | ({"max_rows": rows} if isinstance(rows, int) else {}) | limit


def _guessed(folder: str, name: str) -> str:
    """Where rows may be, as far as that can be told without dataset_info.json."""
    if folder == "ONLINE":
        return name
    kind, colon, repository = folder.partition("REMOTE:")
    return f"hf://datasets/{repository}/{name}.json" if colon and not kind else f"{folder}/{name}.json"


def _place(draft: Draft, key: str, folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    url = next((entry[name] for name in ("hf_hub_url", "cloud_file_name") if entry.get(name)), None)
    if url is not None:
        split = entry.get("split") if entry.get("split") != "train" else None
        made = {"path": str(url), "config": entry.get("subset"), "split": split}
        if entry.get("folder"):
            made["path"] = f"hf://datasets/{url}/{entry['folder']}"
        return {name: value for name, value in made.items() if value is not None}
    if not entry.get("file_name"):
        draft.refuse(key, "a data set is a script or lies on another hub; load it yourself and name a file")
        return {"path": "rows.jsonl"}
    path = folder / str(entry["file_name"])
    is_absolute = Path(str(draft.get("dataset_dir", "data"))).is_absolute()
    return {"path": str(path) if is_absolute else from_recipe(path, draft.recipe_dir)}


def _layout(draft: Draft, key: str, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Format and columns, where `auto` would not find them."""
    columns = entry.get("columns")
    named: Mapping[str, Any] = columns if isinstance(columns, dict) else {}
    if media := [kind for kind in _MEDIA if named.get(kind)]:
        draft.refuse(key, f"`{name}` has {', '.join(media)}; peftkit learns from text alone")
    if entry.get("formatting", "alpaca") in ("sharegpt", "openai"):
        _check_tags(draft, key, name, entry.get("tags") or {})
        return {"format": "chat"} | _columns(_CHAT, named, aliases=("messages", "conversations"))
    if draft.get("stage") == "pt":
        return {"format": "text"} | _columns({"text": "prompt"}, named or _ALPACA_DEFAULTS)
    if entry.get("ranking"):
        return {"format": "preference"} | _columns(_PAIRS, named or _ALPACA_DEFAULTS)
    return {"format": "instruction"} | _columns(_ALPACA, named or _ALPACA_DEFAULTS)


def _columns(ours: Mapping[str, str], named: Mapping[str, Any], aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    made = {column: str(named[theirs]) for column, theirs in ours.items() if named.get(theirs)}
    made = {column: theirs for column, theirs in made.items() if column != theirs and theirs not in aliases}
    return {"columns": made} if made else {}


def _check_tags(draft: Draft, key: str, name: str, tags: Mapping[str, Any]) -> None:
    wrong = [f"{tag}: {tags[tag]}" for tag, (_, role) in _TAGS.items() if tags.get(tag) and ROLES.get(str(tags[tag])) != role]
    wrong += [f"role_tag: {tags['role_tag']}"] if tags.get("role_tag", "from") not in ("from", "role") else []
    wrong += [f"content_tag: {tags['content_tag']}"] if tags.get("content_tag", "value") not in ("value", "content") else []
    if wrong:
        known = f"roles here are {', '.join(ROLES)}, in `role` or `from`, texts in `content` or `value`"
        draft.refuse(key, f"`{name}` has the tags {', '.join(wrong)}; {known}: rename them in the rows")


def _mix(draft: Draft, sources: list[dict[str, Any]]) -> None:
    strategy = str(draft.get("mix_strategy", "concat"))
    if strategy == "concat" or len(sources) == 1:
        for key in ("mix_strategy", "interleave_probs"):
            draft.drop(key, "sources of a list are read one after the other, every row once")
        return
    shares = listed(draft.get("interleave_probs", ["1"] * len(sources)))
    for source, share in zip(sources, shares, strict=False):
        source["weight"] = parse_scalar(share)
    why = "rows are drawn by weight, and each once, there" if strategy == "interleave_once" else ""
    draft.put("data.stopping_strategy", _STOPS.get(strategy, "all_exhausted"), "mix_strategy", "interleave_probs", why=why)


def _validation(draft: Draft) -> None:
    size = draft.number("val_size", 0)
    if draft.get("eval_dataset") is not None:
        held_out = [_source(draft, "eval_dataset", name) for name in listed(draft.get("eval_dataset"))]
        draft.put("data.validation", held_out[0] if len(held_out) == 1 else held_out, "eval_dataset")
        draft.drop("val_size", "has no effect beside eval_dataset")
    elif 0 < size < 1:
        draft.put("data.validation", size, "val_size")
    elif size:
        draft.put(
            "data.validation", 0.1, "val_size", why=f"{size} rows there; here it is a fraction or a file of its own: choose one"
        )
    else:
        draft.drop("val_size", "no rows are held out")


def _learned(draft: Draft) -> None:
    for key, value in (("train_on_prompt", "all"), ("mask_history", "last_turn")):
        if draft.is_on(key):
            draft.put("data.train_on", value, key)
        else:
            draft.drop(key, "is off")
    if draft.get("default_system") is not None:
        draft.put("data.system_prompt", draft.get("default_system"), "default_system")
    if draft.get("enable_thinking") is not None:
        draft.drop(
            "enable_thinking",
            "the tokenizer's template decides; `data.chat_template_kwargs: {enable_thinking: false}` tells it",
            "changed",
        )


def _length(draft: Draft) -> None:
    tool = draft.tool.read
    if draft.get("stage") == "pt":
        draft.add("data.truncation", "split", "texts that are longer become several examples, as in the stage pt")
    why = "" if "data.truncation" in draft.entries else tool["cutoff_len"].why
    draft.put("data.max_length", draft.get("cutoff_len"), "cutoff_len", why=why)
    if draft.is_on("neat_packing"):
        draft.put("data.packing", True, "neat_packing", "packing", why=tool["neat_packing"].why)
    elif draft.is_on("packing"):
        draft.put("data.packing", True, "packing", why=tool["packing"].why)
    elif draft.get("stage") == "pt" and draft.get("packing") is None:
        draft.add("data.packing", True, "LLaMA-Factory packs in the stage pt")
    for key in ("packing", "neat_packing"):
        if key not in draft.notes:
            draft.drop(key, "`data.packing: auto` lays rows end to end where that changes nothing but speed")
    if "overwrite_cache" in draft.config.values:
        draft.drop("overwrite_cache", tool["overwrite_cache"].why)
