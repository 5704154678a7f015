"""A probe during training: how good the context encoder's frozen representations are, at each evaluation."""

from transformers import PreTrainedModel

from ..errors import UsageError
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass
from .embedder import Embedder
from .scoring import evaluate
from .tasks import Task, TaskArguments, load_tasks

# Rows that the probe is fitted and tested on, at most: what is repeated during a run must be cheap.
_MOST_TRAIN, _MOST_TEST = 5000, 2000


class OnlineProbe:
    """Judges the context encoder of a model on one task, for `JepaTrainer(probe=...)`.

    The representations are frozen and mean-pooled; nothing of the probe flows back into the model.

    Args:
        task: what it is judged on, see `evaluation_tasks.load_tasks`.
        processing_class: the encoder's tokenizer or image processor; feature vectors need none.
        batch_size: samples that go through the encoder together.
        seed: of the rows that the probe's penalty is chosen on.
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
    ) -> "OnlineProbe":
        """Load the task, at most 5,000 rows to fit and 2,000 to test on.

        Args:
            source: a file, a folder with `train.*` and `test.*`, or the name of a data set on the Hub.
            processing_class, batch_size, seed: see `OnlineProbe`.

        Raises:
            UsageError: no task can be read there.
        """
        limits = TaskArguments(max_train_samples=_MOST_TRAIN, max_test_samples=_MOST_TEST, seed=seed)
        return cls(load_tasks([source], limits)[0], processing_class, batch_size, seed)

    def check(self, model: JepaForRepresentationPrediction) -> None:
        """Refuse a task that the model's context encoder cannot read.

        Raises:
            UsageError: its samples are not of the kind that the encoder reads.
        """
        embedder = self._embedder(model)
        if embedder.modality != self.task.modality:
            raise UsageError(
                f"probe_task {self.task.source!r} has {self.task.modality}, but the encoder reads {embedder.modality}"
            )
        embedder.embed(self.task.test.samples[0][:1])

    def __call__(self, model: JepaForRepresentationPrediction) -> dict[str, float]:
        """Scores between 0 and 1, by name: `probe_linear` and `probe_knn` of labels (share that is right),
        `probe_spearman` of scored pairs, `probe_recall@1` and so on of pairs that belong together.

        Raises:
            UsageError: the encoder cannot read the task's samples.
        """
        training = model.training
        found = evaluate([self._embedder(model)], [self.task], seed=self.seed, resamples=2)
        model.train(training)
        return {f"probe_{score.metric.removesuffix('_probe')}": score.score.value for score in found.scores}

    def _embedder(self, model: JepaForRepresentationPrediction) -> Embedder:
        encoder: PreTrainedModel = model.get_encoder("context")
        return Embedder(
            encoder,
            self.processing_class,
            name="the context encoder",
            batch_size=self.batch_size,
            device=str(encoder.device),
        )
