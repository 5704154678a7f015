"""A language model learns from streams of rows, on one or more ranks, for `test_llm.py`.

accelerate launch --config_file configs/accelerate/cpu2.yaml llm_stream_ranks.py MODEL OUTPUT
"""

import sys
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from jepa_hf.cli.main import exit_process
from jepa_hf.llm_jepa import LlmJepaTrainer, LlmJepaTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.llm import conversations


def train(name: str, output: str, shards: int) -> LlmJepaTrainer:
    """Two epochs of 13 rows, eight in an update, which are compared across ranks."""
    set_seed(0)  # the predictor token's row is random
    args = LlmJepaTrainingArguments(
        output,
        max_steps=4,
        per_device_train_batch_size=8 // PartialState(cpu=True).num_processes,
        pair_loss="infonce",
        jepa_weight=2.0,
        learning_rate=3e-4,
        adam_epsilon=1e-6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = LlmJepaTrainer(
        AutoModelForCausalLM.from_pretrained(name),
        args,
        train_dataset=datasets.Dataset.from_list(conversations(13)).to_iterable_dataset(num_shards=shards),
        processing_class=AutoTokenizer.from_pretrained(name),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train(*sys.argv[1:], shards=1)
    # Nine rows of one rank, four of the other: in the third step one of them has a single one, the other starts anew.
    trainer = train(sys.argv[1], sys.argv[2] + "-shards", shards=3)
    if trainer.is_world_process_zero():
        print("a llama language model in", trainer.state.global_step, "steps")
    exit_process(0)
