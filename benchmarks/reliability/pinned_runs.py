"""Hashes of short trainings through the command line, so that a refactoring can prove that it changes no number.

    python benchmarks/reliability/pinned_runs.py record before.json
    python benchmarks/reliability/pinned_runs.py compare before.json

Every system trains twice from the same command: straight, and stopped by SIGTERM after its third step and resumed. On
the CPU, with one thread, offline, from random starts. Values are hashed apart from names, so that a renamed parameter
or a renamed metric changes the hash of names only. Hashes are comparable on one machine with the same libraries.
"""

import argparse
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[2] / "run_jepa.py"
STOP_AFTER = 3
COMMON = "--do_train --do_eval --max_steps 6 --save_steps 100 --eval_strategy steps --eval_steps 2 --logging_steps 1 "
COMMON += "--health_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4 --validation_split_percentage 20 "
COMMON += "--warmup_steps 2 --seed 7 --use_cpu --report_to none --disable_tqdm true"
LLM = COMMON.replace("--health_steps 2 ", "")
NARROW = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
SIZES = f"{NARROW},intermediate_size=64"
TEXT = f"--model_type modernbert --config_overrides {SIZES},max_position_embeddings=64 --tokenizer_vocab_size 400 "
TEXT += "--train_file texts.txt --max_seq_length 32 --attn_implementation sdpa"
SYSTEMS = {
    "text": f"{COMMON} {TEXT} --concat --mlm_weight 0.5 --contrastive_weight 0.1",
    "text_packed": f"{COMMON} {TEXT} --packed --target_norm instance --gradient_accumulation_steps 2",
    "text_kept": f"{COMMON} --smoke_test --masked_tokens mask_token --predictor_type mlp --loss cosine "
    "--export_encoder both",
    "images": f"{COMMON} --model_type ijepa --config_overrides {SIZES},image_size=16,patch_size=4 --train_file images "
    "--random_resized_crop 0.4 1.0 --random_flip",
    "features": f"{COMMON} --model_type feature_encoder --config_overrides {NARROW} --train_file features.npy",
    "llm": f"{LLM} --objective llm --smoke_test --generation_samples 2 --max_new_tokens 4",
    "llm_teacher": f"{LLM} --objective llm --smoke_test --pair_loss infonce --target_gradient ema",
}


def write_data(folder: Path) -> None:
    """Write texts, images and features, always the same."""
    draw = np.random.default_rng(0)
    words = [f"{first}{last}" for first in ("ba", "ke", "li", "mo") for last in ("ran", "sel", "tor", "vin", "zu")]
    texts = [" ".join(draw.choice(words, draw.integers(5, 30))) for _ in range(120)]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    (folder / "images").mkdir()
    for number in range(40):
        pixels = draw.integers(0, 256, (16 + number % 5, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
    np.save(folder / "features.npy", draw.normal(size=(40, 9, 6)).astype(np.float32))


def child(arguments: list[str], stop_after: int) -> None:
    """Run `run_jepa.py` in this process; it gets a SIGTERM after the step `stop_after`, if that is not 0."""
    from transformers import TrainerCallback, trainer

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop_after and state.global_step == stop_after - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.DEFAULT_CALLBACKS.append(Stop)
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def run(folder: Path, command: str, out: str, stop_after: int = 0) -> None:
    """Run a command in a process of its own, and check how it ended."""
    process = [sys.executable, __file__, "child", str(stop_after), *command.split(), "--output_dir", out]
    paths = os.pathsep.join(filter(None, [str(SCRIPT.parent), os.environ.get("PYTHONPATH")]))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    completed = subprocess.run(process, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if completed.returncode != (128 + signal.SIGTERM if stop_after else 0):
        raise RuntimeError(
            f"{' '.join(process)} ended with {completed.returncode}:\n{completed.stdout}{completed.stderr}"
        )


def hashes(out: Path) -> dict[str, str]:
    """Hash the values and the names of all saved tensors, and the values of all logged losses."""
    values, names, losses = hashlib.sha256(), hashlib.sha256(), []
    for path in sorted(path for path in out.rglob("*.safetensors") if "checkpoint-" not in str(path)):
        for name, tensor in sorted(load_file(path).items()):
            names.update(f"{path.relative_to(out)} {name}\n".encode())
            values.update(tensor.contiguous().numpy().tobytes())
    for entry in json.loads((out / "metrics.json").read_text())["history"]:
        losses.append(sorted(value for key, value in entry.items() if "loss" in key and key != "train_loss"))
    logged = hashlib.sha256(json.dumps(losses).encode())
    return {"weights": values.hexdigest(), "names": names.hexdigest(), "losses": logged.hexdigest()}


def measure(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """Train one system straight, and once more with a stop in the middle."""
    run(folder, SYSTEMS[name], f"{name}_straight")
    run(folder, SYSTEMS[name], f"{name}_resumed", STOP_AFTER)
    if not (folder / f"{name}_resumed" / f"checkpoint-{STOP_AFTER}").exists():
        raise RuntimeError(f"{name} saved no checkpoint after step {STOP_AFTER}")
    run(folder, SYSTEMS[name], f"{name}_resumed")
    return {way: hashes(folder / f"{name}_{way}") for way in ("straight", "resumed")}


def main() -> int:
    """Record the hashes or compare them with those of a file; return 1 if one differs."""
    if sys.argv[1] == "child":
        child(sys.argv[3:], int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        write_data(folder)
        results = dict(zip(SYSTEMS, pool.map(lambda system: measure(folder, system), SYSTEMS), strict=True))
    for system, ways in results.items():
        print(system, "resumed = straight:", ways["straight"] == ways["resumed"])
    if options.mode == "record":
        options.file.write_text(json.dumps(results, indent=1) + "\n")
        return 0
    before = json.loads(options.file.read_text())
    differing = [
        f"{system} {way} {kind}"
        for system, ways in before.items()
        for way, kinds in ways.items()
        for kind, value in kinds.items()
        if results[system][way][kind] != value
    ]
    print("\n".join(f"differs: {line}" for line in differing) or "all hashes are equal")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
