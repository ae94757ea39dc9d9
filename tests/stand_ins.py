"""A Hugging Face cache with tiny stand-ins for public models and data sets, so that recipes and documents run offline.

`put_stand_ins(home)` fills the folder that HF_HOME names; a command runs unchanged with `offline(home)` in its environment.
Within the tests HF_HOME is a folder of the session (tests/conftest.py), which commands of this process read too. A model is
there twice: tiny with weights, and as revision `real_size` the config.json with its real dimensions alone, for `plan` and
`params`. A new model is a line of tests/real_configs.py, a new data set one of DATASETS.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.real_configs import MODELS, Published, tiny_config
from tests.templates import CHATML, GEMMA, LLAMA3, MARKERS, THINK

ROOT = Path(__file__).parents[1]
REAL_SIZE = "real_size"
_COMMITS = {"main": "1" * 40, REAL_SIZE: "2" * 40}
_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_PAIRS = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
# What a tokenizer of a kind has: named tokens, chat template, and what it puts around a text (and around two).
TOKENIZERS: dict[str, tuple[dict[str, str], str | None, tuple[str, str] | None]] = {
    "bert": (_BERT, None, _PAIRS),
    "modernbert": (_BERT, None, _PAIRS),
    "t5": ({"pad_token": "<pad>", "eos_token": "</s>"}, None, ("$A </s>", "$A </s> $B </s>")),
    "bloom": ({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, None, None),
    "opt": ({"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"}, None, ("</s> $A", "</s> $A $B")),
    "chatml": ({"pad_token": "<pad>", "eos_token": "<|im_end|>"}, CHATML, None),
    "think": ({"pad_token": "<pad>", "eos_token": "<|im_end|>"}, THINK, None),
    "llama3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, LLAMA3,
        ("<|begin_of_text|> $A", "<|begin_of_text|> $A $B"),
    ),
    "gemma": ({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, GEMMA, ("<s> $A", "<s> $A $B")),
}  # fmt: skip


def offline(home: Path) -> dict[str, str]:
    """The environment variables with which a process finds the stand-ins in a folder, and looks for nothing elsewhere."""
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def put_stand_ins(home: Path, models: Iterable[str] = MODELS, datasets: Iterable[str] | None = None) -> dict[str, str]:
    """Put tiny models and small data sets into a Hugging Face folder, those that are not there yet; gives `offline(home)`.

    Args:
        home: what HF_HOME is to be.
        models: hub ids, each of them a key of `MODELS`; all by default.
        datasets: hub ids, each of them in `DATASETS`; all by default.
    """
    for name in models:
        _put_model(home / "hub" / f"models--{name.replace('/', '--')}", MODELS[name])
    for data in DATASETS:
        if datasets is None or data.name in datasets:
            _put_dataset(home / "datasets", data)
    return offline(home)


def _put_model(repository: Path, model: Published) -> None:
    """Both revisions of a model, in the layout of huggingface_hub's cache."""
    if repository.exists():
        return
    tokenizer = stand_in_tokenizer(model.tokenizer)
    for revision, commit in _COMMITS.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        tokenizer.save_pretrained(snapshot)
        if revision == REAL_SIZE:
            config = model.config | {"architectures": [model.architecture]} | _numbers(tokenizer)
            (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
        else:
            _save_tiny(model, tokenizer, snapshot)


def _save_tiny(model: Published, tokenizer: Any, folder: Path) -> None:
    """Config and random weights of the tiny model."""
    import transformers

    config = tiny_config(model) | _numbers(tokenizer) | {"vocab_size": len(tokenizer)}
    model_class = getattr(transformers, model.architecture)
    transformers.set_seed(0)
    model_class(model_class.config_class(**config)).save_pretrained(folder)
    # transformers 5 says of T5 that its embeddings are tied whatever the config was made with.
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(written | {key: config[key] for key in ("tie_word_embeddings",) if key in config}))


def _numbers(tokenizer: Any) -> dict[str, int | None]:
    """Special tokens by number, as config.json has them."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}


@functools.cache
def _vocabulary() -> str:
    """A byte-level BPE of some thousand tokens, learned from the rows at hand, with the special tokens of all kinds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*(token for named, _, _ in TOKENIZERS.values() for token in named.values()), *MARKERS])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_texts(), trainer)
    return str(backend.to_str())


def _texts() -> list[str]:
    """The rows of the shipped data and of the stand-in data sets: words that recipes use."""
    files = sorted((ROOT / "recipes" / "data").rglob("*.jsonl"))
    rows = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return rows + [json.dumps(row, ensure_ascii=False) for data in DATASETS for row in data.rows("train")]


@functools.cache
def stand_in_tokenizer(kind: str) -> Any:
    """A tokenizer of a kind, whose rows have about as many tokens as with the real one."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    named, template, around = TOKENIZERS[kind]
    backend = Tokenizer.from_str(_vocabulary())
    if around:
        numbers = [(token, backend.token_to_id(token)) for token in named.values() if token in around[0]]
        backend.post_processor = processors.TemplateProcessing(single=around[0], pair=around[1], special_tokens=numbers)
    inputs = ["input_ids", *(["token_type_ids"] if kind == "bert" else []), "attention_mask"]
    longest = 512 if kind == "bert" else 4096
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, model_max_length=longest, **named)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class StandInData:
    """A data set on the hub.

    Attributes:
        name: its hub id.
        config: its configuration.
        splits: their names.
        classes: of columns that hold class numbers, the names of the classes.
        row: a row by its number.
    """

    name: str
    config: str
    splits: tuple[str, ...]
    classes: dict[str, list[str]]
    row: Callable[[int], dict[str, Any]]

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Distinct rows; none comes in two splits."""
        start = 1000 * self.splits.index(split)
        return [self.row(start + index) for index in range(24)]


def _put_dataset(cache: Path, data: StandInData) -> None:
    """A data set as `datasets` keeps it once it was loaded: an Arrow file for each split, and what is known of them."""
    from datasets import ClassLabel, Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = data.name.rpartition("/")
    short = camelcase_to_snakecase(short)
    folder = cache / f"{owner}___{short}" / data.config / "0.0.0" / _COMMITS["main"]
    if folder.exists():
        return
    folder.mkdir(parents=True)
    features = Dataset.from_list(data.rows(data.splits[0])).features
    features |= {column: ClassLabel(names=names) for column, names in data.classes.items()}
    splits = SplitDict()
    for split in data.splits:
        with ArrowWriter(features=features, path=str(folder / f"{short}-{split}.arrow")) as writer:
            for row in data.rows(split):
                writer.write(row)
            num_examples, num_bytes = writer.finalize()
        splits[split] = SplitInfo(split, num_bytes=num_bytes, num_examples=num_examples, dataset_name=short)
    info = DatasetInfo(features=features, dataset_name=short, config_name=data.config, version="0.0.0", splits=splits)
    info.write_to_directory(str(folder))


_THINGS = ("the parcel", "my order", "a profit", "this film", "the service", "our shop", "its share")
_GOOD = ("rose again", "was on time", "went very well", "made everyone happy", "is better than before")
_BAD = ("fell again", "never came", "was a mess", "made everyone angry", "is worse than before")
_PLAIN = ("was named today", "is in the north", "has two parts", "opens at nine", "was counted")


def _sentence(index: int, *kinds: tuple[str, ...]) -> str:
    """A short sentence, other for every index; what it says of its thing is of the kind of its index."""
    ends = kinds[index % len(kinds)]
    return f"{_THINGS[index % len(_THINGS)]} {ends[index % len(ends)]}, number {index}"


def _feeling(index: int) -> dict[str, Any]:
    return {"sentence": _sentence(index, _BAD, _GOOD), "label": index % 2, "idx": index}


def _paraphrase(index: int) -> dict[str, Any]:
    one, other = _sentence(index, _GOOD, _BAD), _sentence(index + index % 2, _GOOD, _BAD)
    return {"sentence1": one, "sentence2": f"they say {other}", "label": (index + 1) % 2, "idx": index}


def _inference(index: int) -> dict[str, Any]:
    premise, other = _sentence(index, _GOOD, _BAD), _sentence(index + index % 3, _GOOD, _BAD)
    return {"premise": premise, "hypothesis": f"it is said that {other}", "label": index % 3, "idx": index}


def _complaint(index: int) -> dict[str, Any]:
    return {"Tweet text": f"@shop {_sentence(index, _BAD, _GOOD)}", "ID": index, "Label": 1 + index % 2}


def _news(index: int) -> dict[str, Any]:
    return {"sentence": _sentence(index, _BAD, _PLAIN, _GOOD), "label": index % 3}


def _conversation(index: int) -> dict[str, Any]:
    return {"text": f"### Human: What of {_sentence(index, _PLAIN)}?### Assistant: It is {_sentence(index, _GOOD)}."}


def _preferred(index: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"What of {_sentence(index, _PLAIN)}?"}
    answers = {"chosen": _sentence(index, _GOOD), "rejected": "no idea"}
    turns = {name: [asked, {"role": "assistant", "content": text}] for name, text in answers.items()}
    return {**turns, "score_chosen": 8.0, "score_rejected": 2.0}


def _quote(index: int) -> dict[str, Any]:
    return {"quote": _sentence(index, _GOOD, _BAD), "author": "Nobody", "tags": ["words"]}


_GLUE = ("train", "validation", "test")
DATASETS = (
    StandInData("Abirate/english_quotes", "default", ("train",), {}, _quote),
    StandInData("nyu-mll/glue", "mrpc", _GLUE, {"label": ["not_equivalent", "equivalent"]}, _paraphrase),
    StandInData("nyu-mll/glue", "sst2", _GLUE, {"label": ["negative", "positive"]}, _feeling),
    StandInData(
        "nyu-mll/glue", "mnli", ("train", "validation_matched", "validation_mismatched"),
        {"label": ["entailment", "neutral", "contradiction"]}, _inference,
    ),
    StandInData(
        "ought/raft", "twitter_complaints", ("train", "test"), {"Label": ["Unlabeled", "complaint", "no complaint"]}, _complaint
    ),
    StandInData(
        "takala/financial_phrasebank", "sentences_allagree", ("train",), {"label": ["negative", "neutral", "positive"]}, _news
    ),
    StandInData("timdettmers/openassistant-guanaco", "default", ("train", "test"), {}, _conversation),
    StandInData("trl-lib/ultrafeedback_binarized", "default", ("train", "test"), {}, _preferred),
)  # fmt: skip
