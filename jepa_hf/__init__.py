"""Self-supervised pretraining with JEPA on the Hugging Face Trainer."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .cli.train import pretrain
from .data.tokenization import tokenize_dataset
from .errors import UsageError
from .evaluation.embedder import Embedder
from .masking.block_collator import DataCollatorForBlockJEPA
from .masking.feature_collator import DataCollatorForFeatureJEPA
from .masking.span_collator import DataCollatorForSpanJEPA
from .models.configuration_feature_encoder import FeatureEncoderConfig
from .models.configuration_jepa import JepaConfig
from .models.modeling_feature_encoder import FeatureEncoderModel
from .models.modeling_jepa import JepaForRepresentationPrediction
from .models.outputs import JepaOutput
from .training.callbacks import EmaTargetCallback, WeightDecayCallback
from .training.trainer import JepaTrainer
from .training.training_args import JepaTrainingArguments
from .version import __version__

__all__ = [
    "DataCollatorForBlockJEPA",
    "DataCollatorForFeatureJEPA",
    "DataCollatorForSpanJEPA",
    "EmaTargetCallback",
    "Embedder",
    "FeatureEncoderConfig",
    "FeatureEncoderModel",
    "JepaConfig",
    "JepaForRepresentationPrediction",
    "JepaOutput",
    "JepaTrainer",
    "JepaTrainingArguments",
    "UsageError",
    "WeightDecayCallback",
    "__version__",
    "pretrain",
    "tokenize_dataset",
]

AutoConfig.register("jepa", JepaConfig)
AutoModel.register(JepaConfig, JepaForRepresentationPrediction)
AutoModelForPreTraining.register(JepaConfig, JepaForRepresentationPrediction)
