"""JEPA training that is native to Hugging Face."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .callbacks import EmaTargetCallback, WeightDecayCallback
from .cli.train import pretrain
from .configuration_feature_encoder import FeatureEncoderConfig
from .configuration_jepa import JepaConfig
from .data_collator import DataCollatorForSpanJEPA
from .embedding import Embedder
from .errors import UsageError
from .feature_collator import DataCollatorForFeatureJEPA
from .image_collator import DataCollatorForBlockJEPA
from .modeling_feature_encoder import FeatureEncoderModel
from .modeling_jepa import JepaForRepresentationPrediction, JepaOutput
from .tokenization import tokenize_dataset
from .trainer import JepaTrainer
from .training_args import JepaTrainingArguments
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
