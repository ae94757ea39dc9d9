"""Exported files at work, outside of torch: ONNX Runtime and OpenVINO on the CPU behind one face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from peftkit.engine.tracing import import_openvino

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Session:
    """One file, loaded.

    Attributes:
        client: program and version.
        inputs: name -> dtype and shape, in which an axis of any length is 0.
        run: inputs -> outputs, by name.
    """

    client: str
    inputs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    run: Callable[[Arrays], Arrays]

    def __call__(self, known: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs, from those of the known arrays that the file takes; caches that are not known yet are empty."""
        feed = {}
        for name, (dtype, shape) in self.inputs.items():
            array = known.get(name)
            if array is None:
                rows = len(known["input_ids"])
                array = np.zeros((rows, *shape[1:]), dtype)  # the length of a cache is its third axis
            feed[name] = array.astype(dtype)
        return self.run(feed)


def open_onnx(path: Path) -> Session:
    """A file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: shapes that a graph merely hints at are warned of otherwise
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    inputs = {
        item.name: (_DTYPES[item.type], tuple(size if isinstance(size, int) else 0 for size in item.shape))
        for item in session.get_inputs()
    }

    def run(feed: Arrays) -> Arrays:
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return Session(f"onnxruntime {onnxruntime.__version__}", inputs, run)


_DTYPES: dict[str, np.dtype] = {
    "tensor(int64)": np.dtype(np.int64),
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
}


def open_openvino(path: Path) -> Session:
    """A file in OpenVINO, which computes in float32 as torch does, not in what the CPU is fastest in."""
    openvino = import_openvino()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    inputs = {}
    for port in compiled.inputs:
        shape = tuple(0 if size.is_dynamic else size.get_length() for size in port.partial_shape)
        inputs[port.any_name] = (np.dtype(port.element_type.to_dtype()), shape)

    def run(feed: Arrays) -> Arrays:
        found = compiled(feed)
        return {port.any_name: np.array(found[port]) for port in compiled.outputs}

    return Session(f"openvino {openvino.__version__.partition('-')[0]}", inputs, run)


@dataclass
class SinglePassClient:
    """A file of one pass, where a task's runtime expects a model."""

    session: Session

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        """Outputs by name."""
        found = self.session({name: tensor.numpy() for name, tensor in inputs.items()})
        return SimpleNamespace(**{name: torch.from_numpy(array) for name, array in found.items()})


@dataclass
class DecodingClient:
    """Files that generate text, token by token; where a task's runtime expects a model, all tokens at once.

    Attributes:
        first: decodes a prompt, or an encoder-decoder's first token.
        later: decodes further tokens; the same where one file serves both.
        encoder: reads the prompt, where that is another file.
        start: the token that a decoder of its own begins with.
        pad: the token that fills rows up.
        prepare_decoder_input_ids_from_labels: the model's, of an encoder-decoder.
    """

    first: Session
    later: Session
    encoder: Session | None
    start: int
    pad: int
    prepare_decoder_input_ids_from_labels: Callable[..., torch.Tensor] | None = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """Logits of right-padded rows."""
        ids, mask = input_ids.numpy(), attention_mask.numpy()
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}
        if decoder_input_ids is not None:
            known = _encoded(self, ids, mask) | {"input_ids": decoder_input_ids.numpy(), "use_cache_branch": np.array([False])}
        return SimpleNamespace(logits=torch.from_numpy(self.first(known)["logits"]))

    def continuations(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens (B, T) after each prompt and the logits (B, T, V) that they are chosen by."""
        rows = _OwnDecoder(self, prompts) if self.encoder else _Rows(self, prompts)
        tokens, logits = [], []
        for _ in range(num_tokens):
            logits.append(rows.next_logits())
            tokens.append(logits[-1].argmax(-1))
            rows.append(tokens[-1])
        return np.stack(tokens, axis=1), np.stack(logits, axis=1)


def _positions(mask: np.ndarray) -> np.ndarray:
    positions: np.ndarray = (mask.cumsum(1) - 1).clip(min=0)
    return positions


def _encoded(client: DecodingClient, ids: np.ndarray, mask: np.ndarray) -> Arrays:
    """What a decoder reads of right-padded prompts."""
    assert client.encoder is not None
    states = client.encoder({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    return {"encoder_attention_mask": mask, "encoder_hidden_states": states}


class _Rows:
    """Left-padded rows of a decoder, and what the files keep of them."""

    def __init__(self, client: DecodingClient, prompts: Sequence[Sequence[int]]) -> None:
        self.client = client
        width = max(map(len, prompts))
        self.ids = np.array([[client.pad] * (width - len(ids)) + list(ids) for ids in prompts], np.int64)
        self.known: Arrays = {
            "attention_mask": np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], np.int64)
        }
        self.is_cached = any(name.startswith("past_key_values") for name in client.later.inputs)
        self.session = client.first

    def next_logits(self) -> np.ndarray:
        """Logits (B, V) of the next token."""
        positions = _positions(self.known["attention_mask"])[:, -self.ids.shape[1] :]
        self.known |= {"input_ids": self.ids, "position_ids": positions}
        outputs = self.session(self.known)
        self.known |= _as_past(outputs)
        logits: np.ndarray = outputs["logits"][:, -1].astype(np.float32)
        return logits

    def append(self, tokens: np.ndarray) -> None:
        """A token (B,) for each row."""
        mask = self.known["attention_mask"]
        self.known["attention_mask"] = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        self.ids = tokens[:, None] if self.is_cached else np.concatenate([self.ids, tokens[:, None]], axis=1)
        self.session = self.client.later


class _OwnDecoder:
    """Right-padded rows of an encoder, the decoder's tokens, and what the files keep of both."""

    def __init__(self, client: DecodingClient, prompts: Sequence[Sequence[int]]) -> None:
        self.client = client
        width = max(map(len, prompts))
        ids = np.array([list(ids) + [client.pad] * (width - len(ids)) for ids in prompts], np.int64)
        mask = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in prompts], np.int64)
        self.known = _encoded(client, ids, mask)
        self.append(np.full(len(prompts), client.start))
        self.known["use_cache_branch"] = np.array([False])
        self.session = client.first

    def next_logits(self) -> np.ndarray:
        """Logits (B, V) of the next token."""
        outputs = self.session(self.known)
        self.known |= _as_past(outputs)
        logits: np.ndarray = outputs["logits"][:, -1].astype(np.float32)
        return logits

    def append(self, tokens: np.ndarray) -> None:
        """A token (B,) for each row."""
        self.known |= {"input_ids": tokens[:, None].astype(np.int64), "use_cache_branch": np.array([True])}
        self.session = self.client.later


def _as_past(outputs: Mapping[str, np.ndarray]) -> Arrays:
    return {name.replace("present", "past_key_values"): array for name, array in outputs.items() if name.startswith("present")}
