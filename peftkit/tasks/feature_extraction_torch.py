"""FEATURE_EXTRACTION on tensors: pooled hidden states, and losses that bring together what belongs together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks.encoding import EmbeddingSettings, Encoding
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, fit_length
from peftkit.tasks.resampling_torch import Resampler, correlations_of, means_of
from peftkit.tasks.runtime_torch import BaseRuntime
from peftkit.tasks.statistics import correlations

ANCHOR, POSITIVE, NEGATIVE = 0, 1, 2
CHUNK = 512  # anchors that are compared with all candidates at a time


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`; outputs are vectors (N, D), one per text, rows one after the other.

    Labels are of shape (N, 3): the row that a text belongs to (counted from 0), its role, and the row's score (0 to 1, or NaN).
    """

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        super().__init__(tokenizer, settings)
        self.embedding = settings.embedding or EmbeddingSettings()
        self.couples_rows = self.embedding.loss == "contrastive"
        is_scored = self.embedding.loss == "cosine"
        self.row_figure = ("squared_error", False) if is_scored else ("reciprocal_rank", True)

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """Token ids of all texts of a row."""
        if target:
            self._check(row)
        texts = [row["anchor"], row["positive"], *row.get("negative", [])] if target else [row["text"]]
        encoded = [self.tokenizer(text) for text in texts]
        num_tokens = max(len(part["input_ids"]) for part in encoded)
        if not fit_length(num_tokens, self.settings):
            return []
        if num_tokens > self.settings.max_length:
            encoded = [self._cut(text) for text in texts]
        inputs = {name: [part[name] for part in encoded] for name in ("input_ids", "token_type_ids") if name in encoded[0]}
        roles = [ANCHOR, POSITIVE, *[NEGATIVE] * (len(texts) - 2)] if target else [IGNORE_INDEX]
        labels = [[role, self._target(row.get("score"))] for role in roles]
        return [Example(inputs, labels, int(target), origin, num_tokens, details={"texts": texts})]

    def _check(self, row: Mapping[str, Any]) -> None:
        if ("score" in row) != (self.embedding.loss == "cosine"):
            what = "has a `score`" if "score" in row else "has no `score`"
            raise RowError(f"the row {what}, unlike the training rows (embedding.loss: {self.embedding.loss})")
        if self.embedding.loss == "triplet" and not row.get("negative"):
            raise RowError("the row has no `negative`, which `embedding.loss: triplet` needs")

    def _target(self, score: float | None) -> float:
        """A score as a similarity."""
        if score is None:
            return math.nan
        low, high = self.embedding.score_range
        if not low <= score <= high:
            raise RowError(f"the score {score:g} is outside of embedding.score_range [{low:g}, {high:g}]")
        return (score - low) / (high - low)

    def _cut(self, text: str) -> Any:
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, self.settings.truncation
        encoded = self.tokenizer(text, truncation=True, max_length=self.settings.max_length)
        self.tokenizer.truncation_side = side
        return encoded

    def view_titles(self, example: Example) -> list[str]:
        """The role of each text and, of the anchor, its similarity to the positive where that is learned."""
        roles = {ANCHOR: "anchor", POSITIVE: "positive", NEGATIVE: "negative"}
        score = example.labels[0][1]
        learned = "" if math.isnan(score) else f", similarity to the positive: {score:.4g}"
        return [roles[role] + learned * (role == ANCHOR) for role, _ in example.labels]

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Row, role and score of every text (N, 3)."""
        rows = [[number, *labels] for number, example in enumerate(examples) for labels in example.labels]
        return torch.tensor(rows, dtype=torch.float32)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Vectors (N, D) in float32, of length 1 under `normalize`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.graph_outputs(model, inputs)["sentence_embedding"]

    def graph_outputs(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """Hidden states (N, T, D) and, pooled and normalised as the adapter was trained, vectors (N, D)."""
        hidden = model(**inputs).last_hidden_state.float()
        vectors = pooled(hidden, inputs["attention_mask"], self.embedding.pooling)
        vectors = functional.normalize(vectors, dim=-1) if self.embedding.normalize else vectors
        return {"last_hidden_state": hidden, "sentence_embedding": vectors}

    def join_labels(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch's labels after the other's, their rows counted on."""
        parts, num_rows = [], 0
        for part in labels:
            counted = part.clone()
            counted[:, 0] += num_rows
            num_rows += int(part[:, 0].max()) + 1
            parts.append(counted)
        return torch.cat(parts)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over rows; always of cosines, whether vectors are normalised or not. Vectors (N, D), labels (N, 3).

        contrastive: cross-entropy of an anchor's own positive among the positives and negatives of all rows (in-batch
        negatives, Henderson et al. 2017, arXiv:1705.00652, section 4.4). cosine: squared error of the similarity. triplet:
        max(0, distance to the positive - distance to the negative + margin), averaged over a row's negatives (Schroff et al.
        2015, arXiv:1503.03832, section 3.1), with 1 - cosine as distance.
        """
        vectors, roles = functional.normalize(logits.float(), dim=-1), labels[:, 1]
        anchors, positives, negatives = (vectors[roles == role] for role in (ANCHOR, POSITIVE, NEGATIVE))
        if len(anchors) == 0:
            return vectors.sum() * 0.0
        if self.embedding.loss == "contrastive":
            own = torch.arange(len(anchors), device=vectors.device)
            return self._contrastive(anchors, torch.cat([positives, negatives]), own, label_smoothing)
        similar = (anchors * positives).sum(-1)
        if self.embedding.loss == "cosine":
            return (similar - labels[roles == ANCHOR, 2]).square().sum()
        rows = torch.searchsorted(labels[roles == ANCHOR, 0].contiguous(), labels[roles == NEGATIVE, 0].contiguous())
        losses = ((anchors[rows] * negatives).sum(-1) - similar[rows] + self.embedding.margin).clamp(min=0)
        return (losses / rows.bincount(minlength=len(anchors))[rows]).sum()

    def _contrastive(
        self,
        anchors: torch.Tensor,
        candidates: torch.Tensor,
        own: torch.Tensor,
        label_smoothing: float = 0.0,
        *,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """Cross-entropy of anchors (A, D), summed or each, whose positives are `own` (A,) among the candidates (C, D)."""
        scores = self.embedding.scale * anchors @ candidates.T  # (A, C)
        return functional.cross_entropy(scores, own, reduction=reduction, label_smoothing=label_smoothing)

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Vectors of a row's texts and, where it is a pair, their similarity."""
        results, first = [], 0
        for example in examples:
            rows = slice(first, first + len(example.sequences))
            first = rows.stop
            vectors = logits[rows].float().cpu()
            similarity = float(functional.cosine_similarity(vectors[0], vectors[1], dim=0)) if len(vectors) > 1 else None
            labels = batch["labels"][rows].cpu()
            target = {} if labels[0, 2].isnan() else {"label": float(labels[0, 2])}
            kept = {
                "_vectors": vectors,
                "_labels": labels - labels[:1, :1] * torch.tensor([1.0, 0, 0]),
                "_texts": example.details["texts"],
            }
            results.append({**target, "similarity": similarity, **kept})
        return results

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The vector, as a list of numbers."""
        return {"prediction": result["_vectors"][0].tolist()}

    def probe_row(self, text: str) -> dict[str, Any]:
        """A text beside itself and another one."""
        others = {"score": self.embedding.score_range[1]} if self.embedding.loss == "cosine" else {"negative": ["no"]}
        return {"anchor": text, "positive": f"{text} {text}", **others}

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Scored rows: loss and correlations. Else: loss with the whole split as one step, and how well positives are found."""
        if self.embedding.loss == "cosine":
            truth, guess = ([result[key] for result in results] for key in ("label", "similarity"))
            return {"loss": math.fsum(self.row_figures(results)) / len(results), **correlations(truth, guess)}
        found = {"loss": self._row_losses(results), **_found(_ranks(results))}
        return {name: math.fsum(figures) / len(results) for name, figures in found.items()}

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """The same; what is drawn anew are the anchors, each with the candidates of the whole split."""
        if self.embedding.loss != "cosine":
            return means_of({"loss": self._row_losses(results), **_found(_ranks(results))})
        loss = means_of({"loss": self.row_figures(results)})
        both = correlations_of([result["label"] for result in results], [result["similarity"] for result in results])
        return lambda counts: loss(counts) | both(counts)

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """The squared error of a row's similarity, or 1 over the rank of its positive."""
        if self.embedding.loss == "cosine":
            return [(result["similarity"] - result["label"]) ** 2 for result in results]
        return _found(_ranks(results))["mrr"]

    def _row_losses(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """Loss of each row, every row's candidates being those of all rows."""
        if self.embedding.loss != "contrastive":
            return [float(self.loss_sum(result["_vectors"], result["_labels"])) for result in results]
        vectors = torch.cat([result["_vectors"] for result in results])
        labels = self.join_labels([result["_labels"] for result in results])
        vectors = functional.normalize(vectors, dim=-1)
        anchors, positives, negatives = (vectors[labels[:, 1] == role] for role in (ANCHOR, POSITIVE, NEGATIVE))
        candidates, own = torch.cat([positives, negatives]), torch.arange(len(anchors))
        chunks = zip(anchors.split(CHUNK), own.split(CHUNK), strict=True)
        losses = [self._contrastive(part, candidates, places, reduction="none") for part, places in chunks]
        return torch.cat(losses).tolist()


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector (N, D) per text from hidden states (N, T, D); padding, at the right, takes no part."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(1) - 1]  # `len` would be fixed in a graph
    seen = mask[:, :, None].bool()
    if pooling == "max":
        return hidden.masked_fill(~seen, -math.inf).amax(1)
    return (hidden * seen).sum(1) / seen.sum(1)


def _ranks(results: Sequence[Mapping[str, Any]]) -> list[int]:
    """The rank of each anchor's positive among all positives and negatives of the split, by cosine.

    A text that occurs twice is one candidate, and other positives of the same anchor do not compete.
    """
    corpus = {
        text: vector for result in results for text, vector in zip(result["_texts"][1:], result["_vectors"][1:], strict=True)
    }
    places = {text: number for number, text in enumerate(corpus)}
    own = torch.tensor([places[result["_texts"][1]] for result in results])
    positives: dict[str, set[int]] = {}
    for result, place in zip(results, own.tolist(), strict=True):
        positives.setdefault(result["_texts"][0], set()).add(place)
    candidates = functional.normalize(torch.stack(list(corpus.values())), dim=-1)
    anchors = functional.normalize(torch.stack([result["_vectors"][0] for result in results]), dim=-1)
    ranks: list[int] = []
    for part in torch.arange(len(results)).split(CHUNK):
        similar = anchors[part] @ candidates.T  # (CHUNK, C)
        for line, row in zip(similar, part.tolist(), strict=True):
            line[[place for place in positives[results[row]["_texts"][0]] if place != own[row]]] = -math.inf
        ranks += (1 + (similar > similar.gather(1, own[part][:, None])).sum(1)).tolist()
    return ranks


def _found(ranks: Sequence[int]) -> dict[str, list[float]]:
    """How well each row's positive was found: recall, reciprocal rank and nDCG, where but one candidate is relevant."""
    found = {f"recall_at_{k}": [float(rank <= k) for rank in ranks] for k in (1, 5, 10)}
    gains = [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]
    return found | {"mrr": [1 / rank for rank in ranks], "ndcg_at_10": gains}
