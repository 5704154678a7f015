"""Self-supervised pretraining with JEPA on the Hugging Face Trainer."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .version import __version__

if TYPE_CHECKING:
    from .cli.train import pretrain
    from .data.tokenization import tokenize_dataset
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

# Module of each name that is imported when it is first used.
_MODULES = {
    "DataCollatorForBlockJEPA": "masking.block_collator",
    "DataCollatorForFeatureJEPA": "masking.feature_collator",
    "DataCollatorForSpanJEPA": "masking.span_collator",
    "EmaTargetCallback": "training.callbacks",
    "Embedder": "evaluation.embedder",
    "FeatureEncoderConfig": "models.configuration_feature_encoder",
    "FeatureEncoderModel": "models.modeling_feature_encoder",
    "JepaConfig": "models.configuration_jepa",
    "JepaForRepresentationPrediction": "models.modeling_jepa",
    "JepaOutput": "models.outputs",
    "JepaTrainer": "training.trainer",
    "JepaTrainingArguments": "training.training_args",
    "WeightDecayCallback": "training.callbacks",
    "pretrain": "cli.train",
    "tokenize_dataset": "data.tokenization",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_models() -> None:
    """Register the models with transformers' Auto classes, by importing their modules."""
    import_module(".models.modeling_feature_encoder", __name__)
    import_module(".models.modeling_jepa", __name__)


# After `import jepa_hf`, `AutoModel` loads the models. The command line registers them later, because this imports
# torch, and help and a mistyped flag should not wait for it.
if "jepa_hf.cli" not in sys.orig_argv and Path(sys.argv[0] if sys.argv else "").stem not in ("jepa-hf", "run_jepa"):
    register_models()
