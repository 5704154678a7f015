"""Tests of the scores of frozen representations: reference values, choice of C, coverage of intervals."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import spearmanr
from sentence_transformers.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.util import cos_sim
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.batches import scale_weights, tiny_jepa
from helpers.tiny_models import CORPUS, tiny_tokenizer
from jepa_hf import FeatureEncoderConfig, FeatureEncoderModel, UsageError
from jepa_hf.evaluation import scoring
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.evaluation.online_probe import OnlineProbe
from jepa_hf.evaluation.scoring import (
    INVERSE_REGULARIZATION,
    METRICS,
    Evaluation,
    bootstrap,
    evaluate,
    knn_predict,
    linear_probe,
    retrieval_metrics,
    spearman,
)
from jepa_hf.evaluation.task import Split, Task

torch.set_num_threads(1)


def clouds(count: int, distance: float, seed: int = 0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clouds `[count, 8]` with centers at this distance, and the cloud of each row as its label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return (rng.normal(size=(count, 8)) + distance * np.eye(8)[labels]).astype(np.float32), labels.astype(str)


def feature_embedder(name: str = "features", seed: int = 0) -> Embedder:
    encoder = FeatureEncoderModel(
        FeatureEncoderConfig(8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_dropout_prob=0.0)
    )
    scale_weights(encoder, seed=seed)
    return Embedder(encoder, name=name, device="cpu")


def text_embedder(name: str = "text") -> Embedder:
    return Embedder(tiny_jepa("bert").get_encoder(), tiny_tokenizer("bert"), name=name, device="cpu")


def labelled_task(count: int = 120, distance: float = 8.0, name: str = "clouds") -> Task:
    (train, train_labels), (test, test_labels) = clouds(count, distance, 1), clouds(count, distance, 2)
    return Task(
        name, name, "labels", "features", Split((list(test),), test_labels), Split((list(train),), train_labels)
    )


# ---- probes


def test_separable_classes_are_all_right() -> None:
    (train, labels), (test, expected) = clouds(200, 12.0, 0, classes=4), clouds(100, 12.0, 1, classes=4)
    assert (linear_probe(train, labels, test)[0] == expected).all()
    assert (knn_predict(train, labels, test) == expected).all()


def test_random_labels_are_right_by_chance() -> None:
    """The accuracy on 2,000 rows is 0.5 within four standard deviations of the binomial distribution."""
    train, labels = clouds(1000, 0.0, 0)
    test, expected = clouds(2000, 0.0, 1)
    for predicted in (linear_probe(train, labels, test)[0], knn_predict(train, labels, test)):
        assert abs((predicted == expected).mean() - 0.5) < 4 * 0.5 / 2000**0.5


def test_the_penalty_is_the_best_on_the_validation_rows() -> None:
    train, labels = clouds(60, 1.0, 0)
    validation = clouds(2000, 1.0, 1)
    _, penalty = linear_probe(train, labels, train, validation)
    rights = {
        value: make_pipeline(StandardScaler(), LogisticRegression(C=value)).fit(train, labels).score(*validation)
        for value in INVERSE_REGULARIZATION
    }
    assert rights[penalty] == max(rights.values())
    assert len(set(rights.values())) > 1


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_test_labels_choose_nothing(distance: float) -> None:
    """Shuffled test labels change neither C nor the predicted classes."""
    task = labelled_task(distance=distance)
    shuffled = Split(task.test.samples, np.random.default_rng(0).permutation(task.test.targets))
    other = Task(task.name, task.source, "labels", "features", shuffled, task.train)
    chosen = [evaluate([feature_embedder()], [one], resamples=10).scores for one in (task, other)]
    assert [score.inverse_regularization for score in chosen[0]] == [
        score.inverse_regularization for score in chosen[1]
    ]
    assert chosen[0][0].inverse_regularization in INVERSE_REGULARIZATION
    assert chosen[0][0].score.value != chosen[1][0].score.value


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_few_rows_are_enough(rows: int) -> None:
    train, labels = clouds(rows, 20.0)
    labels[:2] = ["0", "1"]
    predicted, penalty = linear_probe(train, labels, train)
    assert penalty in INVERSE_REGULARIZATION
    assert set(predicted) <= set(labels)
    assert knn_predict(train, labels, train).shape == (rows,)


# ---- similarity and retrieval


@given(values=arrays(np.int64, (3, 12), elements=st.integers(-3, 3)), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_spearman_is_scipys_row_by_row(values: np.ndarray, seed: int) -> None:
    """Also with many ties; 0 for constant rows, where scipy returns NaN."""
    others = np.random.default_rng(seed).integers(0, 5, values.shape)
    for actual, one, other in zip(spearman(values, others), values, others, strict=True):
        constant = len(set(one)) == 1 or len(set(other)) == 1
        expected = 0.0 if constant else spearmanr(one, other).statistic
        assert actual == pytest.approx(expected, abs=1e-12)


class _Known:
    """A model with fixed vectors for the evaluators of sentence-transformers."""

    similarity_fn_name = "cosine"
    similarity = staticmethod(cos_sim)

    def __init__(self, vectors: dict[str, np.ndarray]):
        self.vectors = vectors
        self.model_card_data = self

    def set_evaluation_metrics(self, *args: Any) -> None:
        pass

    def encode(self, sentences: list[str], convert_to_tensor: bool = False, **kwargs: Any) -> Any:
        actual = np.stack([self.vectors[sentence] for sentence in sentences])
        return torch.from_numpy(actual) if convert_to_tensor else actual

    encode_query = encode_document = encode


def test_similarity_equals_sentence_transformers() -> None:
    embedder, scores = text_embedder(), np.random.default_rng(0).integers(0, 6, 40).astype(float)
    first, second = CORPUS[:40], CORPUS[40:80]
    task = Task("pairs", "pairs", "similarity", "text", Split((first, second), scores))
    actual = evaluate([embedder], [task]).scores[0]
    vectors = dict(zip([*first, *second], embedder.embed([*first, *second])["mean"], strict=True))
    expected = EmbeddingSimilarityEvaluator(first, second, list(scores))(_Known(vectors))
    assert actual.metric == "spearman"
    assert actual.score.value == pytest.approx(expected["spearman_cosine"], abs=1e-6)
    assert actual.score.low < actual.score.value < actual.score.high


@given(
    pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_retrieval_equals_sentence_transformers(pairs: list[tuple[int, int]], seed: int) -> None:
    """Also if queries have several relevant documents, and documents several queries."""
    first, second = [f"query {query:02}" for query, _ in pairs], [f"document {document:02}" for _, document in pairs]
    rng = np.random.default_rng(seed)
    vectors = {text: rng.normal(size=6).astype(np.float32) for text in {*first, *second}}
    actual = retrieval_metrics(
        Split((first, second)), *(np.stack([vectors[text] for text in side]) for side in (first, second))
    )
    relevant: dict[str, set[str]] = {}
    for query, document in zip(first, second, strict=True):
        relevant.setdefault(query, set()).add(document)
    evaluator = InformationRetrievalEvaluator(
        {text: text for text in relevant}, {text: text for text in dict.fromkeys(second)}, relevant
    )
    expected = evaluator(_Known(vectors))
    assert set(actual) == set(METRICS["retrieval"])
    for metric, outcomes in actual.items():
        assert outcomes.shape == (len(relevant),)
        assert outcomes.mean() == pytest.approx(expected[f"cosine_{metric}"])


def test_metrics_have_the_names_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation and the online probe read the same names, and a name without a computation is an error."""
    monkeypatch.setitem(scoring.METRICS, "labels", ("first", "second"))
    found = evaluate([feature_embedder("a")], [labelled_task()], resamples=2)
    assert [score.metric for score in found.scores] == ["first", "second"]
    assert OnlineProbe(labelled_task()).metric_names == ["probe_first", "probe_second"]
    monkeypatch.setitem(scoring.METRICS, "labels", ("first", "second", "third"))
    with pytest.raises(ValueError, match="shorter"):
        evaluate([feature_embedder("a")], [labelled_task()], resamples=2)


# ---- intervals


def test_95_percent_intervals_have_95_percent_coverage() -> None:
    """Of 400 intervals with 95 % coverage, 6 to 38 miss with a probability above 0.999."""
    rng = np.random.default_rng(0)
    missed = 0
    for seed in range(400):
        outcomes = rng.random(200) < 0.7
        drawn = bootstrap(functools.partial(_means, outcomes), 200, seed=seed)
        low, high = np.percentile(drawn, (2.5, 97.5))
        missed += not low <= 0.7 <= high
    assert 6 <= missed <= 38


def _means(outcomes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return outcomes[rows].mean(axis=1)


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    outcomes = np.arange(400) < 300
    drawn = bootstrap(functools.partial(_means, outcomes), 400, resamples=4000)
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 400) ** 0.5, rel=0.1)


@given(size=st.integers(1, 50), resamples=st.integers(1, 20), seed=st.integers(0, 9))
def test_equal_sizes_and_seeds_draw_the_same_rows(size: int, resamples: int, seed: int) -> None:
    once, again = (bootstrap(lambda rows: rows.sum(axis=1), size, resamples, seed) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert once.shape == (resamples,)


def test_large_sizes_are_resampled_in_chunks() -> None:
    """Memory is bounded, and each resample has all rows."""
    seen = []

    def statistic(rows: np.ndarray) -> np.ndarray:
        seen.append(rows.shape)
        return rows.mean(axis=1)

    size = 2**20
    assert bootstrap(statistic, size, 10).shape == (10,)
    assert seen == [(4, size), (4, size), (2, size)]


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    """The errors of two encoders are correlated; an encoder and its copy have no difference."""
    task = labelled_task(distance=1.5)
    actual = evaluate([feature_embedder("a"), feature_embedder("b", seed=1), feature_embedder("c")], [task])
    a, b, c = (next(s for s in actual.scores if (s.model, s.metric) == (name, "linear_probe")) for name in "abc")
    assert a.difference is None
    assert b.difference.value == pytest.approx(b.score.value - a.score.value)
    unpaired = np.hypot(a.score.high - a.score.low, b.score.high - b.score.low)
    assert 0 < b.difference.high - b.difference.low < 0.95 * unpaired
    assert (c.difference.value, c.difference.low, c.difference.high) == (0, 0, 0)


# ---- evaluate


def test_results_are_ordered_and_reproducible() -> None:
    tasks = [labelled_task(name="one"), labelled_task(name="two", distance=1.0)]
    embedders = [feature_embedder("a"), feature_embedder("b", seed=1)]
    actual, again = (evaluate(embedders, tasks, ("mean", "layers"), resamples=50) for _ in range(2))
    assert actual.scores == again.scores
    assert [(s.task, s.model, s.pooling, s.metric) for s in actual.scores] == [
        (task, model, pooling, metric)
        for task in ("one", "two")
        for model in "ab"
        for pooling in ("mean", "layers")
        for metric in METRICS["labels"]
    ]
    assert all(score.score.low <= score.score.value <= score.score.high for score in actual.scores)
    assert all((score.difference is None) == (score.model == "a") for score in actual.scores)
    assert len(actual.health) == 8
    for health in actual.health:
        assert 1 <= health.effective_rank <= 16
        assert -1 <= health.mean_pairwise_cosine <= 1
        assert health.singular_values[0] == 1
        assert (np.diff(health.singular_values) <= 0).all()
    assert all(sample.vectors.shape == (120, 16) for sample in actual.samples)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["out"], ["out"]),
        (["a/b/out", "a/c/out"], ["b/out", "c/out"]),
        (["out", "other/out"], ["out", "other/out"]),
        (["me/x", "you/y"], ["x", "y"]),
    ],
)
def test_short_names_are_distinct(models: list[str], expected: list[str]) -> None:
    assert list(Evaluation(models, [], []).short_names.values()) == expected


@pytest.mark.parametrize(
    ("embedders", "pooling", "sentence"),
    [
        (lambda: [feature_embedder(), feature_embedder()], "mean", "'features' is named twice"),
        (lambda: [feature_embedder(), text_embedder()], "mean", "'text' reads text, but task 'clouds' has features"),
        (lambda: [feature_embedder()], "cls", "puts no \\[CLS\\] token first"),
    ],
)
def test_incompatible_encoders_are_refused_before_embedding(
    embedders: Any, pooling: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = []
    embed = Embedder.embed

    def counted(self: Embedder, samples: Any, *args: Any, **kwargs: Any) -> Any:
        embedded.append(len(samples))
        return embed(self, samples, *args, **kwargs)

    monkeypatch.setattr(Embedder, "embed", counted)
    with pytest.raises(UsageError, match=sentence):
        evaluate(embedders(), [labelled_task()], (pooling,))
    assert sum(embedded) <= 1


def test_a_collapsed_encoder_scores_chance_and_shows_it() -> None:
    """With equal vectors kNN and probe are at chance, and neither health nor scores are NaN."""
    embedder = feature_embedder()
    with torch.no_grad():
        for parameter in embedder.encoder.parameters():
            parameter.zero_()
    actual = evaluate([embedder], [labelled_task()], resamples=20)
    assert all(0.3 < score.score.value < 0.7 for score in actual.scores)
    assert actual.health[0].effective_rank == 0
    assert np.isfinite(actual.health[0].singular_values).all()
    task = Task("s", "s", "similarity", "features", Split((list(np.eye(8)), list(np.eye(8))), np.arange(8.0)))
    assert evaluate([embedder], [task], resamples=20).scores[0].score.value == 0
