"""JEPA training that is native to Hugging Face."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .callbacks import EmaTargetCallback
from .cli.train import pretrain
from .configuration_jepa import JepaConfig
from .data_collator import DataCollatorForSpanJEPA
from .errors import UsageError
from .modeling_jepa import JepaForRepresentationPrediction, JepaOutput
from .tokenization import tokenize_dataset
from .trainer import JepaTrainer
from .training_args import JepaTrainingArguments
from .version import __version__

__all__ = [
    "DataCollatorForSpanJEPA",
    "EmaTargetCallback",
    "JepaConfig",
    "JepaForRepresentationPrediction",
    "JepaOutput",
    "JepaTrainer",
    "JepaTrainingArguments",
    "UsageError",
    "__version__",
    "pretrain",
    "tokenize_dataset",
]

AutoConfig.register("jepa", JepaConfig)
AutoModel.register(JepaConfig, JepaForRepresentationPrediction)
AutoModelForPreTraining.register(JepaConfig, JepaForRepresentationPrediction)
