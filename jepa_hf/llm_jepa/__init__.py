"""LLM-JEPA: fine-tuning of causal language models with two views (arXiv 2509.14252)."""

from .data_collator import DataCollatorForPairedViews
from .lora import add_lm_lora
from .objective import PairedViewObjective, PairedViewOutput
from .predictor_tokens import add_predictor_tokens
from .trainer import LlmJepaTrainer
from .training_args import LlmJepaTrainingArguments
from .view_tokenizer import PairedViewTokenizer

__all__ = [
    "DataCollatorForPairedViews",
    "LlmJepaTrainer",
    "LlmJepaTrainingArguments",
    "PairedViewObjective",
    "PairedViewOutput",
    "PairedViewTokenizer",
    "add_lm_lora",
    "add_predictor_tokens",
]
