"""LLM-JEPA: fine-tuning causal language models with two views of the same knowledge (arXiv 2509.14252)."""

from .data_collator import DataCollatorForPairedViews
from .lora import add_adapters
from .objective import PairedViewObjective, PairedViewOutput
from .trainer import LlmJepaTrainer, add_predictor_tokens
from .training_args import LlmJepaTrainingArguments
from .view_tokenizer import PairedViewTokenizer

__all__ = [
    "DataCollatorForPairedViews",
    "LlmJepaTrainer",
    "LlmJepaTrainingArguments",
    "PairedViewObjective",
    "PairedViewOutput",
    "PairedViewTokenizer",
    "add_adapters",
    "add_predictor_tokens",
]
