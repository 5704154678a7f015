"""One rank of a few steps of `JepaTrainer`, of a model too large to be written: `multi_gpu_parity.py --big` starts it.

Rows are random tokens. What rank 0 writes to --output, as JSON: the losses of all steps, the most that each rank had
allocated (GiB), and seconds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import BertConfig, TrainerCallback, set_seed

from jepa_hf import (
    DataCollatorForSpanJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)
from jepa_hf.cli.console import quiet_libraries
from jepa_hf.cli.main import exit_process
from jepa_hf.distributed.deepspeed_state import zero3_init_disabled

sys.path.append(str(Path(__file__).resolve().parents[1]))
from speed.training_loops import RandomTokens, tokenizer_of

LENGTH = 128


class Ends(TrainerCallback):
    """When each step ended; the device is waited for."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, *_: object, **__: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def peak(device: torch.device) -> float:
    """GiB; 0 on a CPU, whose memory is not counted."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def main() -> None:
    """Build, train, print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_overrides", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True, help="of one rank")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet_libraries()
    encoder = BertConfig(max_position_embeddings=LENGTH)
    encoder.update_from_string(options.config_overrides)
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder:
        args = JepaTrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            activation_checkpointing=True,
            learning_rate=1e-5,
            ema_decay=0.999,
            bf16=options.bf16,
            use_cpu=options.use_cpu,
            seed=options.seed,
            health_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        set_seed(options.seed)
        # Every rank builds the whole model, on its GPU, where random weights take seconds; on the host they take
        # minutes. Of the default encoder (4.8 billion parameters in its layers) that is 38 GiB, float32, both encoders.
        # accelerate's fsdp2_prepare_model, with fsdp_cpu_ram_efficient_loading false, copies each layer into its shard
        # and holds on to the whole ones until it returns: on one of two ranks 38 and half of that, 57 GiB. DeepSpeed
        # divides parameter by parameter and frees each at once. Gradients and moments come later; then one of two ranks
        # has 48 GiB, under DeepSpeed 10 more, because its optimizer has a copy of what is trained.
        with zero3_init_disabled(), args.device:
            model = JepaForRepresentationPrediction(JepaConfig(encoder))
        parameters = sum(each.numel() for each in model.context_encoder.parameters())
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        # float32: of what is trained the weight, its gradient and AdamW's two moments; the target's weight.
        states = 4 * (4 * trained + sum(each.numel() for each in model.target_encoder.parameters()))
        collator = DataCollatorForSpanJEPA(tokenizer_of(encoder.vocab_size), max_length=LENGTH, seed=options.seed)
        rows = RandomTokens(encoder.vocab_size, LENGTH, options.seed)
        trainer = JepaTrainer(model, args, collator, train_dataset=rows, callbacks=[ends])
        trainer.train()
    peaks = gather_object([peak(args.device)])
    if trainer.is_world_process_zero():
        results = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "ran_as": trainer.accelerator.distributed_type.value,
            "peak_gib": peaks,
            "parameters": parameters,
            "states_gib": states / 2**30,
            "step_s": (ends.ends[-1] - ends.ends[0]) / (len(ends.ends) - 1),
        }
        options.output.write_text(json.dumps(results), encoding="utf-8")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
    exit_process(0)
