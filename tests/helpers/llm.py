"""A tiny causal language model with a chat template, and conversations for it."""

import functools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jepa_hf.data.text_datasets import builtin_corpus
from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments, PairedViewTokenizer, add_predictor_tokens

# ChatML, as many models write it; it strips a message's content.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].strip() + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = ["class", "function", "module", "name", "value", "statement", "object", "list", "import", "return"]


@functools.cache
def _trained() -> str:
    tokenizer = train_wordpiece_tokenizer(builtin_corpus()[:500], 600, 128)
    return tokenizer.backend_tokenizer.to_str()


def tokenizer(template: str | None = CHATML, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A small WordPiece tokenizer that ends turns with <|im_end|>."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        **kwargs,
    )
    words.chat_template = template
    return words


def model(vocab_size: int, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama 32 wide and 2 layers deep, without dropout."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def conversations(count: int) -> list[dict[str, Any]]:
    """Conversations of differing lengths, none like another."""
    rows = []
    for number in range(count):
        words = random.Random(number).sample(_WORDS, 3 + number % 5)
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": "Turn words around."},
                    {"role": "user", "content": " ".join(words)},
                    {"role": "assistant", "content": " ".join(reversed(words))},
                ]
            }
        )
    return rows


def trainer(folder: str | Path, predictors: int = 1, seed: int = 0, rows: int = 16, **settings: Any) -> LlmJepaTrainer:
    """Four steps of batch 4 on the CPU."""
    words = tokenizer(padding_side=settings.pop("padding_side", "right"))
    language_model = model(len(words), seed, **settings.pop("model", {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the new rows are random
        add_predictor_tokens(language_model, words, predictors)
    given = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return LlmJepaTrainer(
        language_model,
        LlmJepaTrainingArguments(**(given | settings)),
        train_dataset=conversations(rows),
        eval_dataset=conversations(6),
        view_tokenizer=PairedViewTokenizer(words, num_predictor_tokens=predictors),
    )
