"""`OnlineProbe`: scores of the frozen context encoder at each evaluation during training."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..errors import UsageError
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.modes import evaluation_mode
from ..utils.types import ProcessingClass
from .embedder import Embedder
from .scoring import METRICS, evaluate
from .task import Task, TaskArguments
from .tasks import load_tasks

# Maximum numbers of rows: a probe that is repeated during a run must be cheap.
_MAX_TRAIN, _MAX_TEST = 5000, 2000


class OnlineProbe:
    """Scores of a model's context encoder on one task, for `JepaTrainer(probe=...)`.

    The representations are mean-pooled and frozen: no gradient flows from the probe into the model.

    Args:
        task: a task from `load_tasks`.
        processing_class: the encoder's tokenizer or image processor; None for feature vectors.
        batch_size: samples per batch.
        seed: seed of the validation rows on which C of the linear probe is chosen.
    """

    def __init__(
        self, task: Task, processing_class: ProcessingClass | None = None, batch_size: int = 64, seed: int = 42
    ):
        self.task, self.processing_class = task, processing_class
        self.batch_size, self.seed = batch_size, seed

    @classmethod
    def from_source(
        cls,
        source: str,
        processing_class: ProcessingClass | None = None,
        batch_size: int = 64,
        seed: int = 42,
        feature_column_names: Sequence[str] | None = None,
    ) -> "OnlineProbe":
        """Load a task with at most 5,000 training and 2,000 test rows, see `load_tasks` for the `source`.

        The seed is also that of the drawn and held-out rows.

        Raises:
            UsageError: the source holds no task that can be read.
        """
        limits = TaskArguments(max_train_samples=_MAX_TRAIN, max_test_samples=_MAX_TEST, seed=seed)
        return cls(load_tasks([source], limits, feature_column_names)[0], processing_class, batch_size, seed)

    @property
    def metric_names(self) -> list[str]:
        """Names of the scores that a call returns."""
        return [_score_name(metric) for metric in METRICS[self.task.kind]]

    def validate(self, model: JepaForRepresentationPrediction) -> None:
        """Check that the model's context encoder can read the task.

        Raises:
            UsageError: the encoder has another modality, or cannot read the first sample.
        """
        embedder = self._embedder(model)
        if embedder.modality != self.task.modality:
            raise UsageError(
                f"The probe_task {self.task.source!r} has {self.task.modality}, but the encoder reads "
                f"{embedder.modality}."
            )
        with evaluation_mode(model):
            embedder.embed_list(self.task.test.samples[0][:1], feature_column_names=self.task.feature_column_names)

    def __call__(self, model: JepaForRepresentationPrediction) -> dict[str, float]:
        """Compute the scores of the context encoder.

        Returns:
            By name: the accuracies `probe_linear` and `probe_knn` for labels, the correlation
            `probe_spearman` for scored pairs, or `probe_recall@1`, `probe_recall@5`,
            `probe_recall@10`, `probe_ndcg@10` and `probe_mrr@10` for retrieval.

        Raises:
            UsageError: the encoder cannot read the task's samples.
        """
        with evaluation_mode(model):
            # The intervals are not used.
            evaluation = evaluate([self._embedder(model)], [self.task], seed=self.seed, resamples=2)
        return {_score_name(score.metric): score.score.value for score in evaluation.scores}

    def _embedder(self, model: JepaForRepresentationPrediction) -> Embedder:
        encoder: PreTrainedModel = model.get_encoder("context")
        return Embedder(
            encoder,
            self.processing_class,
            name="the context encoder",
            batch_size=self.batch_size,
            device=str(encoder.device),
        )


def _score_name(metric: str) -> str:
    return f"probe_{metric.removesuffix('_probe')}"
