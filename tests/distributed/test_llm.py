"""Claims about a language model on two ranks: what one process learns with the doubled batch, two learn together."""

import json
import os
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.llm import conversations, model, tokenizer
from helpers.processes import forked_python, run_python, run_ranks
from jepa_hf.cli.train import main

from .workers.llm_stream_ranks import train

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CONFIGURATIONS = REPOSITORY / "configs" / "accelerate"


# Of the last batch that is evaluated, and of an epoch's last batch, one rank has four rows and the other one.
FLAGS = (
    "--objective llm --model_name_or_path llm --train_file rows.jsonl --validation_file held_out.jsonl --max_steps 5 "
    "--pair_loss infonce --jepa_weight 2 --learning_rate 3e-4 --adam_epsilon 1e-6 --logging_steps 1 --save_strategy no "
    "--do_train --do_eval --generation_samples 5 --max_new_tokens 3 --use_cpu --report_to none --disable_tqdm"
)


def flags(out: str, batch: int) -> list[str]:
    sizes = ["--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch)]
    return [*FLAGS.split(), *sizes, "--output_dir", out]


def run_two_ranks(
    folder: Path, config: Path, script: Path, given: list[str], once: str = "llama language model"
) -> None:
    """In processes of their own, which say `once` once."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    with forked_python():
        command = [*launch, str(config), str(script), *given]
        code, printed, errors = run_python(command, os.environ | environment, folder, timeout=200)
    assert code == 0, printed + errors[-4000:]
    assert printed.count(once) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder, and the metrics of two ranks and of one process."""
    folder = tmp_path_factory.mktemp("llm")
    words = tokenizer()
    words.save_pretrained(folder / "llm")
    model(len(words)).save_pretrained(folder / "llm")
    for name, rows in (("rows", conversations(21)), ("held_out", conversations(13))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run_ranks(REPOSITORY / "run_jepa.py", *flags("two", batch=4), cwd=folder)
    assert printed.count("llama language model") == 1
    with chdir(folder):
        assert main(flags("one", batch=8)) == 0
    two, one = (json.loads((folder / out / "metrics.json").read_text()) for out in ("two", "one"))
    return folder, two, one


def test_two_ranks_learn_what_one_process_does_with_the_doubled_batch(
    runs: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    """InfoNCE against the second views of both ranks: weights to 1e-5, and every logged loss. Three rows that fill up
    the epoch's last update are learnt from and compared with by nobody."""
    folder, two, one = runs
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    start = load_file(folder / "llm" / "model.safetensors")
    rows = len(start["lm_head.weight"])
    assert not torch.allclose(ours["lm_head.weight"][:rows], start["lm_head.weight"], atol=1e-4)
    assert "| rows per step | 8 |" in (folder / "two" / "README.md").read_text()
    for log, expected in zip(two["history"], one["history"], strict=True):
        for key in ("loss", "lm_loss", "pair_loss", "view_cosine"):
            assert log.get(key) == pytest.approx(expected.get(key), abs=1e-4), key


def test_a_streams_rows_are_learnt_from_once(runs: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    """Of 13 rows the last update has five, which two ranks fill up, and nothing is learnt from what fills them up. Nor
    do the ranks wait forever where their shards of a stream end at different times."""
    folder, _, _ = runs
    script = HERE / "workers" / "llm_stream_ranks.py"
    assert run_ranks(script, "llm", "stream", cwd=folder).count("a llama language model in 4 steps") == 1
    train(str(folder / "llm"), str(folder / "one stream"), shards=1)
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("stream", "one stream"))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


def test_an_evaluation_with_uneven_batches_counts_every_row_and_answer_once(
    runs: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    """Also where a rank has fewer views to compare than the other."""
    _, two, one = runs
    for key in ("eval_lm_loss", "eval_view_cosine", "eval_pair_loss", "eval_exact_match", "eval_prefix_match"):
        assert two["eval"][key] == pytest.approx(one["eval"][key], abs=1e-4), key


def test_ranks_that_divide_the_weights_answer_together(runs: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    """Five prompts, one at a time: of two and three answers the ranks would make different passes, and wait forever."""
    folder, _, one = runs
    config, script = CONFIGURATIONS / "fsdp2.yaml", HERE / "workers" / "llm_two_shards.py"
    given = [*flags("divided", batch=4), "--per_device_eval_batch_size", "1", "--generation_metrics", "prefix_match"]
    run_two_ranks(folder, config, script, [*given, "--dataloader_pin_memory", "false"])
    divided = json.loads((folder / "divided" / "metrics.json").read_text())
    assert divided["eval"]["eval_prefix_match"] == one["eval"]["eval_prefix_match"]
    assert divided["eval"]["eval_lm_loss"] == pytest.approx(one["eval"]["eval_lm_loss"], abs=1e-4)
