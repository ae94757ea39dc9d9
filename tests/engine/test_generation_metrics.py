"""Metrics of generated answers: the libraries' own figures, tiny cases by hand, and the answer extractor."""

from __future__ import annotations

import random

import pytest

from peftkit.formats.base import RowError
from peftkit.tasks.generations import AnswerSettings, extract_answer, is_same_answer, question_of
from peftkit.tasks.generations_torch import AnswerScorer

PAIRS = [
    ("The cat sat on the mat.", "The cat sat on a mat."),
    ("Wogegen protestieren Leute?", "Wogegen protestieren manche Leute?"),
    ("", "nothing at all"),
    ("seven dogs ran home because it was late", "seven small dogs ran home because it was late"),
]


def scored(*metrics: str, pattern: str | None = None, tokenize: str = "13a") -> tuple[AnswerScorer, list[dict[str, object]]]:
    scorer = AnswerScorer(AnswerSettings(metrics, pattern, tokenize))
    return scorer, [scorer.score(*pair) for pair in PAIRS]


@pytest.mark.parametrize("tokenize", ["13a", "char", "intl"])
def test_bleu_and_chrf_are_those_of_sacrebleu(tokenize: str) -> None:
    import sacrebleu

    scorer, rows = scored("bleu", "chrf", tokenize=tokenize)
    guesses, references = [pair[0] for pair in PAIRS], [[pair[1] for pair in PAIRS]]
    bleu = sacrebleu.corpus_bleu(guesses, references, tokenize=tokenize).score
    expected = {"bleu": bleu, "chrf": sacrebleu.corpus_chrf(guesses, references).score}
    assert scorer.summarise(rows) == pytest.approx(expected)
    assert f"tok:{tokenize}" in scorer.signatures["bleu"]


def test_rouge_is_the_mean_f_measure_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer, rows = scored("rouge")
    names = ["rouge1", "rouge2", "rougeL"]
    each = [RougeScorer(names).score(reference, guess) for guess, reference in PAIRS]
    expected = {name: sum(row[name].fmeasure for row in each) / len(each) for name in names}
    assert scorer.summarise(rows) == pytest.approx(expected)


def test_tiny_cases_by_hand() -> None:
    scorer = AnswerScorer(AnswerSettings(("rouge", "bleu", "chrf", "exact_match")))
    rows = [scorer.score("a b c d", "a b c d"), scorer.score("a b", "c d")]
    assert scorer.summarise(rows[:1]) == pytest.approx(
        {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "bleu": 100.0, "chrf": 100.0, "exact_match": 1.0}
    )
    means = scorer.summarise(rows)
    assert (means["exact_match"], means["rouge1"]) == (0.5, 0.5)
    # 4 of 6 words, 3 of 4 pairs, 2 of 2 triples and 1 of 1 quadruples are right; no brevity penalty.
    assert means["bleu"] == pytest.approx(100 * (4 / 6 * 3 / 4 * 1 * 1) ** 0.25)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("1,200", "1200", True),
        ("1200.0", "1,200", True),
        ("$18.", "18", True),
        ("-3", "3", False),
        (".5", "0.50", True),
        ("1,2", "12", False),  # no separator of thousands
        ("Paris", " Paris. ", True),
        ("paris", "Paris", False),
    ],
)
def test_numbers_are_compared_as_numbers_and_texts_as_texts(left: str, right: str, same: bool) -> None:
    assert is_same_answer(left, right) is same


def test_the_first_match_is_the_answer_as_in_gsm8k() -> None:
    assert extract_answer("9 * 2 = 18\n#### 18\nQuestion: ...\n#### 7", "#### (.+)") == "18"
    assert extract_answer("eighteen", "#### (.+)") is None


def test_answers_that_miss_are_counted_apart_from_wrong_ones() -> None:
    scorer = AnswerScorer(AnswerSettings(("answer",), "#### (.+)"))
    guesses = ["so #### 1,200", "#### 7", "no idea", "x\n#### 1200.00"]
    rows = [scorer.score(guess, "it is\n#### 1200") for guess in guesses]
    assert [row["answer"] for row in rows] == ["1,200", "7", None, "1200.00"]
    assert scorer.summarise(rows) == {"answer_accuracy": 0.5, "answer_missing": 0.25}


@pytest.mark.parametrize(
    ("settings", "reference", "words"),
    [
        (AnswerSettings(("answer",), "#### (.+)"), "eighteen", "does not match evaluation.answer_pattern"),
        (AnswerSettings(("rouge",)), "機械学習", "use chrf"),
        (AnswerSettings(("triples",)), "a | b | c\na | b", "no triple: 'a | b'; they are `head | relation | tail`"),
        (AnswerSettings(("triples",), triple_format="json"), "a | b | c", "no triple: 'a | b | c'"),
    ],
)
def test_a_row_that_no_metric_could_judge_is_refused(settings: AnswerSettings, reference: str, words: str) -> None:
    with pytest.raises(RowError, match=words):
        AnswerScorer(settings).check(reference)


def test_the_last_turn_is_the_answer_of_a_conversation() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert question_of({"messages": turns}) == ({"messages": turns[:1]}, "hello")
    assert question_of({"prompt": "a", "completion": "b"}) == ({"prompt": "a"}, "b")
    for row in ({"messages": turns[:1]}, {"text": "a"}):
        with pytest.raises(RowError, match="there is no answer"):
            question_of(row)


def test_triples_by_hand() -> None:
    scorer = AnswerScorer(AnswerSettings(("triples",)))
    pairs = [
        ("a | r | b\na | r | b\nc | r | d", "a | r | b\ne | r | f\ng | r | h"),  # 1 right of 2, and of 3
        ("no idea", "a | r | b"),  # nothing, of 1
        ("无", "无"),  # nothing, of none
        ("x | r | y", "none"),  # 1 too many
        ("（i，r，ｊ）", "i | r | j"),  # noqa: RUF001 - the same in another form
    ]
    rows = [scorer.score(*pair) for pair in pairs]
    expected = {"triple_precision": 2 / 4, "triple_recall": 2 / 5, "triple_f1": 4 / 9, "triple_malformed": 1 / 5}
    assert scorer.summarise(rows) == pytest.approx(expected)
    assert rows[1]["malformed"] == ("no idea",)
    assert rows[0]["reference_triples"] == [("a", "r", "b"), ("e", "r", "f"), ("g", "r", "h")]
    assert scorer.summarise(rows[2:3]) == dict.fromkeys(expected, 0.0)


def test_scores_of_triples_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    dice = random.Random(0)
    drawn = [[{(dice.choice("ab"), dice.choice("rs"), dice.choice("cde")) for _ in range(dice.randrange(4))} for _ in "12"]
             for _ in range(60)]  # fmt: skip
    binarizer = MultiLabelBinarizer().fit([pair[0] | pair[1] for pair in drawn])
    guess, truth = (binarizer.transform([pair[place] for pair in drawn]) for place in (0, 1))
    expected = precision_recall_fscore_support(truth, guess, average="micro")
    scorer = AnswerScorer(AnswerSettings(("triples",)))
    texts = [["\n".join(" | ".join(triple) for triple in side) or "none" for side in pair] for pair in drawn]
    found = scorer.summarise([scorer.score(*pair) for pair in texts])
    names = ("triple_precision", "triple_recall", "triple_f1")
    assert [found[name] for name in names] == pytest.approx(expected[:3])
