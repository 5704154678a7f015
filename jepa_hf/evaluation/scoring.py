"""How good frozen representations are: linear probes, nearest neighbours, similarity, retrieval, all with intervals."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from ..monitoring.metrics import effective_rank, mean_pairwise_cosine
from .embedder import Embedder
from .tasks import Split, Task

# Inverse strengths of the probe's penalty, the strongest first.
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
NEIGHBOURS = 20
RECALL_AT = (1, 5, 10)
METRICS = {
    "labels": ("linear_probe", "knn"),
    "similarity": ("spearman",),
    "retrieval": (*(f"recall@{k}" for k in RECALL_AT), f"mrr@{RECALL_AT[-1]}"),
}
# A picture of points is no clearer with more of them, nor a spectrum.
MOST_DRAWN = 2000

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One figure of one model.

    Args:
        model, pooling, task, metric: whose; see `METRICS`.
        score: between 0 and 1, Spearman's correlation between -1 and 1.
        n: test samples (queries, of retrieval) that it is over.
        difference: to the first model, with the same pooling, on the same samples; None of the first model itself.
        penalty: the linear probe's C.
    """

    model: str
    pooling: str
    task: str
    metric: str
    score: Interval
    n: int
    difference: Interval | None = None
    penalty: float | None = None


@dataclass(frozen=True)
class Health:
    """What representations look like, whatever they are good for, on the test samples of a task (2,000 at most).

    Args:
        effective_rank, mean_pairwise_cosine: see `jepa_hf.monitoring.metrics`.
        singular_values: of the centred vectors over the largest, falling, float `[min(N, D)]`.
    """

    model: str
    pooling: str
    task: str
    n: int
    effective_rank: float
    mean_pairwise_cosine: float
    singular_values: np.ndarray


@dataclass(frozen=True)
class Sample:
    """Some test samples of a task with labels, to draw: vectors `[N, D]` and their classes `[N]`."""

    model: str
    pooling: str
    task: str
    vectors: np.ndarray
    labels: np.ndarray


@dataclass
class Evaluation:
    """Everything that a call of `evaluate` found, in the order of the tasks, the models and the poolings."""

    models: list[str]
    tasks: list[Task]
    pooling: list[str]
    scores: list[Score] = field(default_factory=list)
    health: list[Health] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def short_names(self) -> dict[str, str]:
        """For each model as much of the end of its path as tells it from the others."""
        parts = [Path(model).parts for model in self.models]
        for count in range(1, max(map(len, parts))):
            names = ["/".join(part[-count:]) for part in parts]
            if len(set(names)) == len(names):
                return dict(zip(self.models, names, strict=True))
        return {model: model for model in self.models}


def evaluate(
    embedders: Sequence[Embedder],
    tasks: Sequence[Task],
    pooling: Sequence[str] = ("mean",),
    *,
    seed: int = 42,
    resamples: int = 1000,
    show_progress: bool = False,
) -> Evaluation:
    """Judge frozen encoders side by side, on the same rows and with the same resamples.

    Args:
        embedders: their names must differ; the others are compared with the first.
        tasks: as `load_tasks` gives them.
        pooling: see `Embedder`.
        seed: of the rows that penalties are chosen on, and of the resamples.
        resamples: of the bootstrap.
        show_progress: show bars.

    Raises:
        UsageError: two encoders of one name, a task that one of them cannot read, or a pooling that it does not have.
            All are tried on one sample first.
    """
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
            embedder.embed(task.test.samples[0][:1], pooling)

    found = Evaluation(names, list(tasks), list(pooling))
    for task in tasks:
        first: dict[tuple[str, str], tuple[float, np.ndarray]] = {}
        for embedder in embedders:
            splits = _embedded(embedder, task, pooling, show_progress)
            for name in pooling:
                place = (embedder.name, name, task.name)
                vectors = {split: sides[name] for split, sides in splits.items()}
                for metric, value, statistic, n, penalty in _judged(task, vectors, seed):
                    drawn = bootstrap(statistic, n, resamples, seed)
                    difference = None
                    if (name, metric) in first:
                        reference, reference_drawn = first[name, metric]
                        difference = _interval(value - reference, drawn - reference_drawn)
                    else:
                        first[name, metric] = value, drawn
                    found.scores.append(Score(*place, metric, _interval(value, drawn), n, difference, penalty))
                found.health.append(_health(place, np.concatenate(vectors["test"]), seed))
                if task.kind == "labels":
                    rows = _some(len(task.test), seed)
                    found.samples.append(Sample(*place, vectors["test"][0][rows], task.test.targets[rows]))
    return found


def _embedded(
    embedder: Embedder, task: Task, pooling: Sequence[str], show_progress: bool
) -> dict[str, dict[str, list[np.ndarray]]]:
    """By split and pooling the vectors of each side, `[N, D]`."""
    found = {}
    for name in ("train", "validation", "test"):
        split = getattr(task, name)
        if split is not None:
            sides = [embedder.embed(side, pooling, show_progress) for side in split.samples]
            found[name] = {which: [side[which] for side in sides] for which in pooling}
    return found


def _judged(
    task: Task, vectors: dict[str, list[np.ndarray]], seed: int
) -> Iterator[tuple[str, float, Statistic, int, float | None]]:
    """For each metric its name, its value, the same of resampled rows, their number, and the probe's C."""
    if task.kind == "labels":
        train, test = (vectors["train"][0], task.train.targets), (vectors["test"][0], task.test.targets)
        validation = None if task.validation is None else (vectors["validation"][0], task.validation.targets)
        predicted, penalty = linear_probe(*train, test[0], validation, seed)
        for metric, guess, c in (("linear_probe", predicted, penalty), ("knn", nearest(*train, test[0]), None)):
            yield metric, *_mean_of(guess == test[1]), len(test[1]), c
    elif task.kind == "similarity":
        cosines = pairwise_cos_sim(*(torch.from_numpy(side) for side in vectors["test"])).numpy()
        scores = task.test.targets
        value = float(spearman(cosines[None], scores[None])[0])
        yield "spearman", value, lambda rows: spearman(cosines[rows], scores[rows]), len(scores), None
    else:
        for metric, outcomes in retrieval(task.test, *vectors["test"]).items():
            yield metric, *_mean_of(outcomes), len(outcomes), None


def _mean_of(outcomes: np.ndarray) -> tuple[float, Statistic]:
    return float(outcomes.mean()), lambda rows: outcomes[rows].mean(axis=1)


# ---- the measures


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 42,
) -> tuple[np.ndarray, float]:
    """Logistic regression on standardised, frozen vectors.

    Its C is the one of `PENALTIES` that is right most often on the validation rows (the smallest of several), by
    default a fifth of the training rows, each class with its share; then it is fitted on all training rows.

    Args:
        train, labels: `[N, D]` and the classes `[N]`.
        test: `[M, D]`.
        validation: vectors and classes to choose C on, which then stay out of the fit.
        seed: of the fifth.

    Returns:
        The classes of the test rows `[M]`, and C.
    """
    known, asked = (train, labels), validation
    if asked is None:
        _, counts = np.unique(labels, return_counts=True)
        size = min(max(round(len(labels) / 5), len(counts)), len(labels) - 1)
        stratify = labels if counts.min() > 1 and len(labels) - size >= len(counts) else None
        parts = train_test_split(train, labels, test_size=size, stratify=stratify, random_state=seed)
        known, asked = (parts[0], parts[2]), (parts[1], parts[3])
    penalty = PENALTIES[0]
    if len(np.unique(known[1])) > 1:
        penalty = max(PENALTIES, key=lambda value: _fitted(value, *known).score(*asked))
    return _fitted(penalty, train, labels).predict(test), penalty


def _fitted(penalty: float, vectors: np.ndarray, labels: np.ndarray) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500))
    with warnings.catch_warnings():
        # Its last steps gain too little to matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(vectors, labels)


def nearest(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The class of most of the 20 nearest training rows by cosine, near ones counting more: `[M, D]` -> `[M]`."""
    neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(train)), metric="cosine", weights="distance")
    return neighbours.fit(train, labels).predict(test)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row, ties sharing a rank: `[R, N]`, `[R, N]` -> `[R]`.

    Where all values are the same there is no order, and the correlation is 0.
    """
    ranks = [rankdata(values, axis=1) for values in (first, second)]
    first, second = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return (first * second).sum(axis=1) / np.where(scale > 0, scale, 1.0)


def retrieval(split: Split, queries: np.ndarray, documents: np.ndarray) -> dict[str, np.ndarray]:
    """Recall at 1, 5 and 10 and reciprocal rank among the first 10 of each query, by cosine: `[Q]` each.

    The corpus is the second texts. Equal texts are one query or one document; a query may have several right ones.

    Args:
        split: pairs of texts.
        queries, documents: the vectors of both sides, `[N, D]`.
    """
    (asked, query_of), (given, document_of) = (_unique(side) for side in split.samples)
    right: list[set[int]] = [set() for _ in asked]
    for query, document in zip(query_of, document_of, strict=True):
        right[query].add(document)
    hits = semantic_search(
        torch.from_numpy(queries[asked]), torch.from_numpy(documents[given]), top_k=min(RECALL_AT[-1], len(given))
    )
    found = {metric: np.zeros(len(asked)) for metric in METRICS["retrieval"]}
    for query, ranked in enumerate(hits):
        is_right = np.array([hit["corpus_id"] in right[query] for hit in ranked])
        for k in RECALL_AT:
            found[f"recall@{k}"][query] = is_right[:k].sum() / len(right[query])
        if is_right.any():
            found[f"mrr@{RECALL_AT[-1]}"][query] = 1 / (1 + is_right.argmax())
    return found


def _unique(texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """The row of each text's first occurrence, and for each row which of these texts it has."""
    numbers: dict[str, int] = {}
    number_of = [numbers.setdefault(text, len(numbers)) for text in texts]
    return np.unique(number_of, return_index=True)[1], number_of


# ---- intervals and health


def bootstrap(statistic: Statistic, size: int, resamples: int = 1000, seed: int = 42) -> np.ndarray:
    """A statistic of rows drawn with replacement (Efron 1979): `[resamples]`.

    Equal sizes and seeds draw the same rows, so that differences of two results are those of paired samples.

    Args:
        statistic: takes row numbers `[R, size]`, gives `[R]`.
        size: number of rows.
    """
    rng = np.random.default_rng(seed)
    at_once = max(2**22 // size, 1)
    counts = [min(at_once, resamples - begin) for begin in range(0, resamples, at_once)]
    return np.concatenate([statistic(rng.integers(0, size, (count, size))) for count in counts])


def _interval(value: float, drawn: np.ndarray) -> Interval:
    """With the 2.5th and the 97.5th percentile of the resampled values."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))


def _health(place: tuple[str, str, str], vectors: np.ndarray, seed: int) -> Health:
    chosen = torch.from_numpy(vectors[_some(len(vectors), seed)]).double()
    singular = torch.linalg.svdvals(chosen - chosen.mean(dim=0)).numpy()
    return Health(
        *place,
        len(chosen),
        float(effective_rank(chosen)),
        float(mean_pairwise_cosine(chosen)),
        singular / singular[0] if singular[0] > 0 else singular,
    )


def _some(size: int, seed: int) -> np.ndarray:
    """Rows to draw, in their order."""
    chosen = np.random.default_rng(seed).permutation(size)[:MOST_DRAWN]
    return np.sort(chosen)
