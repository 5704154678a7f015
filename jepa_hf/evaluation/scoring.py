"""Scores of frozen representations, with intervals: linear probe, kNN, similarity and retrieval."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import rankdata
from sentence_transformers.util import pairwise_cos_sim, semantic_search
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ..errors import UsageError
from ..monitoring.metrics import effective_rank, mean_pairwise_cosine, singular_values
from .embedder import Embedder
from .names import distinct_ends
from .task import Split, Task, require_targets

logger = logging.getLogger(__name__)

# Candidates for C, the inverse strength of the probe's L2 penalty; the strongest penalty first.
INVERSE_REGULARIZATION = (0.001, 0.01, 0.1, 1.0, 10.0)
NEIGHBOURS = 20
RECALL_AT = (1, 5, 10)
# The names of the metrics of each kind of task, in the order in which `_iter_measures` computes them.
METRICS = {
    "labels": ("linear_probe", "knn"),
    "similarity": ("spearman",),
    "retrieval": (*(f"recall@{k}" for k in RECALL_AT), f"ndcg@{RECALL_AT[-1]}", f"mrr@{RECALL_AT[-1]}"),
}
# More points make neither a scatter plot nor a spectrum clearer.
MAX_PLOTTED = 2000

# From row numbers `[R, N]` of R resamples to one value each, `[R]`.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Place:
    model: str
    pooling: str
    task: str


@dataclass(frozen=True)
class Score(_Place):
    """One metric of one model on one task.

    Args:
        model: name of the embedder.
        pooling: see `Embedder`.
        task: name of the task.
        metric: see `METRICS`.
        score: from 0 to 1; Spearman's correlation from -1 to 1.
        n: number of test samples (retrieval: of queries).
        difference: difference to the first model with the same pooling on the same samples; None
            for the first model.
        inverse_regularization: C of the linear probe; None for other metrics.
    """

    metric: str
    score: Interval
    n: int
    difference: Interval | None = None
    inverse_regularization: float | None = None


@dataclass(frozen=True)
class RepresentationStats(_Place):
    """Collapse metrics of the representations of n test samples (at most 2,000), see `monitoring.metrics`.

    Singular values are those of the centered vectors over the largest one, descending, float64
    `[min(N, D)]`.
    """

    n: int
    effective_rank: float
    mean_pairwise_cosine: float
    singular_values: np.ndarray


@dataclass(frozen=True)
class LabelledEmbeddings(_Place):
    """Vectors `[N, D]` of labelled test samples and their classes `[N]`, for a scatter plot."""

    vectors: np.ndarray
    labels: np.ndarray


@dataclass
class Evaluation:
    """Results of `evaluate`, ordered by task, then model, then pooling."""

    models: list[str]
    tasks: list[Task]
    pooling: list[str]
    scores: list[Score] = field(default_factory=list)
    health: list[RepresentationStats] = field(default_factory=list)
    samples: list[LabelledEmbeddings] = field(default_factory=list)

    @property
    def short_names(self) -> dict[str, str]:
        """Shortest ends of the models' paths that are distinct, by model."""
        return dict(zip(self.models, distinct_ends(self.models), strict=True))


def evaluate(
    embedders: Sequence[Embedder],
    tasks: Sequence[Task],
    pooling: Sequence[str] = ("mean",),
    *,
    seed: int = 42,
    resamples: int = 1000,
    show_progress: bool = False,
) -> Evaluation:
    """Compare frozen encoders on the same test rows and the same bootstrap resamples.

    Args:
        embedders: encoders with distinct names; differences are to the first one.
        tasks: tasks from `load_tasks`.
        pooling: see `Embedder`.
        seed: seed of the resamples and of the validation rows on which C is chosen.
        resamples: number of bootstrap resamples.
        show_progress: whether to show progress bars.

    Returns:
        The scores, health and samples of every model, pooling and task.

    Raises:
        UsageError: two encoders have one name, or an encoder lacks a pooling or cannot read a task.
            One sample of each task is embedded first to find this out early.
    """
    _check_compatible(embedders, tasks, pooling)
    evaluation = Evaluation([embedder.name for embedder in embedders], list(tasks), list(pooling))
    for task in tasks:
        reference: dict[tuple[str, str], tuple[float, np.ndarray]] = {}
        for embedder in embedders:
            logger.info("%s: embedding and scoring with %s", task.name, embedder.name)
            embeddings = _embedded(embedder, task, pooling, show_progress)
            for pooling_name in pooling:
                key = (embedder.name, pooling_name, task.name)
                vectors = {split: by_pooling[pooling_name] for split, by_pooling in embeddings.items()}
                measures = _iter_measures(task, vectors, seed)
                for metric, (value, statistic, n, c) in zip(METRICS[task.kind], measures, strict=True):
                    resampled = bootstrap(statistic, n, resamples, seed)
                    difference = None
                    if (pooling_name, metric) in reference:
                        first_value, first_resampled = reference[pooling_name, metric]
                        difference = _interval(value - first_value, resampled - first_resampled)
                    else:
                        reference[pooling_name, metric] = value, resampled
                    evaluation.scores.append(Score(*key, metric, _interval(value, resampled), n, difference, c))
                evaluation.health.append(_health(key, np.concatenate(vectors["test"]), seed))
                if task.kind == "labels":
                    rows = _subsample_indices(len(task.test), seed)
                    labels = require_targets(task.test)[rows]
                    evaluation.samples.append(LabelledEmbeddings(*key, vectors["test"][0][rows], labels))
    return evaluation


def _check_compatible(embedders: Sequence[Embedder], tasks: Sequence[Task], pooling: Sequence[str]) -> None:
    """Raise if names repeat, or if an encoder cannot embed a sample of a task."""
    names = [embedder.name for embedder in embedders]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name!r} is named twice; name each model once")
    for task in tasks:
        for embedder in embedders:
            if embedder.modality != task.modality:
                raise UsageError(
                    f"{embedder.name!r} reads {embedder.modality}, but task {task.source!r} has {task.modality}"
                )
            embedder.embed_list(task.test.samples[0][:1], pooling, feature_column_names=task.feature_column_names)


def _embedded(
    embedder: Embedder, task: Task, pooling: Sequence[str], show_progress: bool
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Embed all splits: by split and pooling, the vectors `[N, D]` of each side of the samples."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    embeddings = {}
    for name, split in splits.items():
        if split is not None:
            sides = [
                embedder.embed_list(side, pooling, show_progress, task.feature_column_names) for side in split.samples
            ]
            embeddings[name] = {pooling_name: [side[pooling_name] for side in sides] for pooling_name in pooling}
    return embeddings


def _iter_measures(
    task: Task, vectors: dict[str, list[np.ndarray]], seed: int
) -> Iterator[tuple[float, Statistic, int, float | None]]:
    """Yield value, value on resampled rows, number of rows, and C of each of `METRICS`."""
    if task.kind == "labels":
        train = vectors["train"][0], require_targets(task.train)
        test, labels = vectors["test"][0], require_targets(task.test)
        validation = None
        if task.validation is not None:
            validation = vectors["validation"][0], require_targets(task.validation)
        predicted, c = linear_probe(*train, test, validation, seed)
        yield *_mean_of(predicted == labels), len(labels), c
        yield *_mean_of(knn_predict(*train, test) == labels), len(labels), None
    elif task.kind == "similarity":
        cosines = pairwise_cos_sim(*(torch.from_numpy(side) for side in vectors["test"])).numpy()
        scores = require_targets(task.test)
        value = float(spearman(cosines[None], scores[None])[0])
        yield value, lambda rows: spearman(cosines[rows], scores[rows]), len(scores), None
    else:
        for outcomes in retrieval_metrics(task.test, *vectors["test"]).values():
            yield *_mean_of(outcomes), len(outcomes), None


def _mean_of(outcomes: np.ndarray) -> tuple[float, Statistic]:
    """Return the mean, and the mean of resampled rows."""
    return float(outcomes.mean()), lambda rows: outcomes[rows].mean(axis=1)


# ---- the measures


def linear_classifier(c: float = 1.0, max_iter: int = 500) -> Pipeline:
    """Build the unfitted classifier of the probe: standardization, then logistic regression with scikit-learn's C."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iter))


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 42,
) -> tuple[np.ndarray, float]:
    """Classify test rows `[M, D]` by logistic regression on standardized, frozen training vectors `[N, D]`.

    C is the value of `INVERSE_REGULARIZATION` with the highest accuracy on the vectors and classes of `validation`,
    the smallest one if several are equal. By default a stratified fifth of the training rows is held out, with this
    seed. The final classifier is then fitted on all training rows.

    Returns:
        The predicted classes of the test rows `[M]`, and C.
    """
    fit_vectors, fit_labels = train, labels
    if validation is None:
        _, counts = np.unique(labels, return_counts=True)
        size = min(max(round(len(labels) / 5), len(counts)), len(labels) - 1)
        stratify = labels if counts.min() > 1 and len(labels) - size >= len(counts) else None
        fit_vectors, vectors, fit_labels, classes = train_test_split(
            train, labels, test_size=size, stratify=stratify, random_state=seed
        )
        validation = vectors, classes
    c = INVERSE_REGULARIZATION[0]
    if len(np.unique(fit_labels)) > 1:
        accuracies = [_fitted(value, fit_vectors, fit_labels).score(*validation) for value in INVERSE_REGULARIZATION]
        c = INVERSE_REGULARIZATION[int(np.argmax(accuracies))]
    return _fitted(c, train, labels).predict(test), c


def _fitted(c: float, vectors: np.ndarray, labels: np.ndarray) -> Pipeline:
    with warnings.catch_warnings():
        # The last steps of a solver that has not converged hardly change the accuracy.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return linear_classifier(c).fit(vectors, labels)


def knn_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Classify test rows `[M, D]` by their nearest training rows `[N, D]` by cosine, weighted by inverse distance.

    All N rows count if there are fewer than `neighbours`.
    """
    classifier = KNeighborsClassifier(min(neighbours, len(train)), metric="cosine", weights="distance")
    return classifier.fit(train, labels).predict(test)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute Spearman's rank correlation of each row: `[R, N]`, `[R, N]` -> `[R]`.

    Ties share their mean rank. The correlation with a constant row is 0.
    """
    ranks = [rankdata(values, axis=1) for values in (first, second)]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return (first * second).sum(axis=1) / np.where(scale > 0, scale, 1.0)


def retrieval_metrics(split: Split, queries: np.ndarray, documents: np.ndarray) -> dict[str, np.ndarray]:
    """Compute recall at 1, 5 and 10, and nDCG and the reciprocal rank up to 10, of each query by cosine.

    nDCG is that of Järvelin and Kekäläinen 2002 as trec_eval and BEIR compute it: a relevant document at rank r
    counts 1 / log2(r + 1), over the largest sum that is possible.

    The corpus is the second side of the pairs. Equal texts are one query or one document; a query
    may have several relevant documents. `queries` and `documents` are the vectors of both sides, `[N, D]`.

    Returns:
        By metric, one value for each of the Q distinct queries, `[Q]`.
    """
    (query_rows, query_of), (document_rows, document_of) = (_unique(side) for side in split.samples)
    relevant: list[set[int]] = [set() for _ in query_rows]
    for query, document in zip(query_of, document_of, strict=True):
        relevant[query].add(document)
    rankings = semantic_search(
        torch.from_numpy(queries[query_rows]),
        torch.from_numpy(documents[document_rows]),
        top_k=min(RECALL_AT[-1], len(document_rows)),
    )
    discounts = 1 / np.log2(np.arange(RECALL_AT[-1]) + 2)
    values = {metric: np.zeros(len(query_rows)) for metric in METRICS["retrieval"]}
    for query, ranking in enumerate(rankings):
        is_relevant = np.array([hit["corpus_id"] in relevant[query] for hit in ranking])
        for k in RECALL_AT:
            values[f"recall@{k}"][query] = is_relevant[:k].sum() / len(relevant[query])
        best = min(len(relevant[query]), len(discounts))
        values[f"ndcg@{RECALL_AT[-1]}"][query] = discounts[: len(ranking)] @ is_relevant / discounts[:best].sum()
        if is_relevant.any():
            values[f"mrr@{RECALL_AT[-1]}"][query] = 1 / (1 + is_relevant.argmax())
    return values


def _unique(texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Return each distinct text's first row, and for each row the number of its distinct text."""
    numbers: dict[str, int] = {}
    number_of = [numbers.setdefault(text, len(numbers)) for text in texts]
    return np.unique(number_of, return_index=True)[1], number_of


# ---- intervals and health


def bootstrap(statistic: Statistic, size: int, resamples: int = 1000, seed: int = 42) -> np.ndarray:
    """Compute a statistic on rows drawn with replacement (Efron 1979): `[resamples]`.

    The statistic turns row numbers `[R, size]` into values `[R]`. Equal sizes and seeds draw the same rows, so the
    difference of two results is a paired one.
    """
    rng = np.random.default_rng(seed)
    # Bounds the memory of the row numbers to 32 MiB, or to one resample.
    chunk = max(2**22 // size, 1)
    counts = [min(chunk, resamples - begin) for begin in range(0, resamples, chunk)]
    return np.concatenate([statistic(rng.integers(0, size, (count, size))) for count in counts])


def _interval(value: float, resampled: np.ndarray) -> Interval:
    """Return the interval between the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))


def _health(key: tuple[str, str, str], vectors: np.ndarray, seed: int) -> RepresentationStats:
    sample = torch.from_numpy(vectors[_subsample_indices(len(vectors), seed)]).double()
    spectrum = singular_values(sample).numpy()
    return RepresentationStats(
        *key,
        len(sample),
        float(effective_rank(sample)),
        float(mean_pairwise_cosine(sample)),
        spectrum / spectrum[0] if spectrum[0] > 0 else spectrum,
    )


def _subsample_indices(size: int, seed: int) -> np.ndarray:
    """Draw at most `MAX_PLOTTED` row numbers, in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:MAX_PLOTTED])
