"""Claims about `run_jepa.py --objective llm` and `jepa-hf generate`: train, save, generate, resume, refuse."""

import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, TrainerCallback

import jepa_hf
from helpers.cli import QUIET, REPOSITORY, assert_same_weights, snapshot, start_process, train, weights
from helpers.fake_hub import Hub
from helpers.llm import CHATML, conversations, model, tokenizer
from helpers.processes import forked_python
from helpers.report import Page
from helpers.tiny_models import save_tiny_encoder, write_lines
from jepa_hf import FeatureEncoderConfig
from jepa_hf.cli import train_llm as llm_module
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.train import main
from jepa_hf.hub.push import files_to_push
from jepa_hf.llm_jepa import LlmJepaTrainer
from jepa_hf.training.checkpoints import find_corruption

torch.set_num_threads(1)  # as the fresh processes, whose weights are compared

RANDOM = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2"
FAST = "--objective llm --max_steps 6 --save_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4 "
FAST += "--logging_steps 1 --per_device_eval_batch_size 4"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])


def columns_of(row: dict[str, Any], text: str = "text", code: str = "code") -> dict[str, str]:
    return {text: row["messages"][1]["content"], code: row["messages"][2]["content"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's files: `llm`, a tiny language model with a template, its rows, and `whole`, an undisturbed run."""
    folder = tmp_path_factory.mktemp("start")
    words = tokenizer()
    words.save_pretrained(folder / "llm")
    model(len(words)).save_pretrained(folder / "llm")
    shutil.copytree(folder / "llm", folder / "without_template")
    (folder / "without_template" / "chat_template.jinja").unlink()
    write_lines(folder / "template.jinja", [CHATML])
    write_rows(folder / "rows.jsonl", conversations(24))
    write_rows(folder / "columns.jsonl", [columns_of(row) for row in conversations(24)])
    train(*command(folder, folder / "whole"))
    return folder


def command(folder: Path, out: Path, *flags: str) -> list[str]:
    """Six steps, each second saved."""
    own = f"--model_name_or_path {folder / 'llm'} --train_file {folder / 'rows.jsonl'} --output_dir {out}"
    return [*own.split(), *FAST.split(), *flags]


def history(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "metrics.json").read_text())["history"]


def say(*argv: str | Path, code: int = 0) -> None:
    """Run `jepa-hf ...` here."""
    assert jepa_hf_main([*map(str, argv)]) == code


@pytest.fixture
def happening(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have something happen after a step of the runs inside the block."""

    @contextmanager
    def at(step: int, what: Callable[[], Any]) -> Iterator[None]:
        class At(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    what()

        class Disturbed(LlmJepaTrainer):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **kwargs)
                self.add_callback(At())

        with monkeypatch.context() as patch:
            patch.setattr(llm_module, "LlmJepaTrainer", Disturbed)
            yield

    return at


# ---- output files


@pytest.mark.slow
def test_the_script_trains_and_leaves_a_plain_language_model(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: model, tokenizer, card, metrics, picture, checkpoints; nothing else, and no pickle."""
    flags = "--eval_strategy steps --eval_steps 3 --generation_samples 3 --max_new_tokens 4 "
    flags += "--validation_split_percentage 20"
    argv = command(folder, Path("out"), *flags.split())
    result = start_process(REPOSITORY / "run_jepa.py", *argv, *QUIET, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    out = tmp_path / "out"
    checkpoints = {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    plain = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    documents = {"README.md", "metrics.json", "training.png", "_run.json", "chat_template.jinja"}
    assert {path.name for path in out.iterdir()} == checkpoints | plain | documents
    assert find_corruption(out / "checkpoint-6") is None
    assert not list(out.glob("*.bin"))
    assert imread(out / "training.png").std() > 0.05

    loaded, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    asked = words.apply_chat_template(
        conversations(1)[0]["messages"][:2], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(**asked, max_new_tokens=3).shape[1] > asked["input_ids"].shape[1]
    assert words.eos_token_id in loaded.generation_config.eos_token_id

    last = [entry for entry in history(out) if "eval_loss" in entry][-1]
    names = ("lm_loss", "pair_loss", "view_cosine", "view_rank", "exact_match", "prefix_match")
    assert {f"eval_{name}" for name in names} <= set(last)
    assert all("pair_loss" in entry and "lm_loss" in entry for entry in history(out) if "loss" in entry)
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == "text-generation"
    assert "| predictor tokens | 1, at the end of the first view |" in card
    assert re.search(r"^\| rows \| \d+ \|$", card, re.MULTILINE)
    assert "Training started from " in card
    assert str(tmp_path) not in card
    assert re.search(
        r"llama language model, \d+ K parameters, pretrained start; 19 rows, 5 to evaluate on", result.stdout
    )
    scope: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec("\n".join(result.stdout.strip().splitlines()[-2:]), scope)  # its last words are Python that works
    finally:
        os.chdir(here)
    assert scope["model"].can_generate()


def test_it_learns_and_the_answers_to_its_rows_are_right(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, save, generate, evaluate: 150 steps on eight rows, and `jepa-hf generate` finds all answers right."""
    rows = write_rows(tmp_path / "eight.jsonl", conversations(8))
    flags = f"--train_file {rows} --max_steps 150 --learning_rate 5e-3 --save_strategy no --logging_steps 50"
    train(
        *("--objective", "llm", "--model_type", "llama", "--tokenizer_name", folder / "llm"),
        *("--config_overrides", RANDOM.replace("hidden_size=32", "hidden_size=64") + ",max_position_embeddings=128"),
        *("--per_device_train_batch_size", "4", *flags.split(), "--output_dir", tmp_path / "out"),
    )
    capsys.readouterr()
    models = (tmp_path / "out", folder / "llm")
    say(
        "generate",
        *models,
        "--data_file",
        rows,
        "--max_new_tokens",
        16,
        "--output_dir",
        tmp_path / "answers",
        "--use_cpu",
    )
    output = capsys.readouterr().out
    assert f"| {tmp_path / 'out'} | 100.0 (67.6 to 100.0) | 100.0 (67.6 to 100.0) |" in output.replace("\\", "")
    actual = json.loads((tmp_path / "answers" / "generation.json").read_text())
    assert actual["rows"] == 8
    assert [one["exact_match"]["share"] for one in actual["results"].values()] == [1.0, 0.0]
    lines = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == [str(models[0])] * 8 + [str(models[1])] * 8
    assert [line["answer"] for line in lines[:8]] == [row["messages"][2]["content"] for row in conversations(8)]
    assert all(line["exact_match"] and line["right"] == line["answer"] for line in lines[:8])
    assert {path.name for path in (tmp_path / "answers").iterdir()} == {"predictions.jsonl", "generation.json"}


def test_a_recipe_flags_and_python_give_the_same_run(folder: Path, tmp_path: Path) -> None:
    """The recipe names the objective; a flag overrides it; and messages are what columns with a template would be."""
    keys = [part.removeprefix("--") for part in FAST.split()[::2]]
    lines = [f"{key}: {value}" for key, value in zip(keys, FAST.split()[1::2], strict=True)]
    recipe = write_lines(
        tmp_path / "recipe.yaml", [*lines, "num_predictor_tokens: 3", f"train_file: {folder}/rows.jsonl"]
    )
    own = ("--model_name_or_path", folder / "llm", "--num_predictor_tokens", "1")
    train(recipe, *own, "--output_dir", tmp_path / "yaml")
    assert_same_weights(tmp_path / "yaml", folder / "whole")
    run = jepa_hf.pretrain(
        str(folder / "llm"), objective="llm", max_steps=6, save_steps=2, learning_rate=1e-3, logging_steps=1,
        per_device_train_batch_size=4, train_file=str(folder / "rows.jsonl"), output_dir=str(tmp_path / "python"),
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    assert isinstance(run, LlmJepaTrainer)
    assert_same_weights(tmp_path / "python", folder / "whole")


def test_flags_of_the_views_reach_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns, tokens, place, direction, length and the paper's loss; and columns by their names."""
    trainers: list[LlmJepaTrainer] = []

    class Seen(LlmJepaTrainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(llm_module, "LlmJepaTrainer", Seen)
    flags = (
        "--text_turn 0 --code_turn 2 --num_predictor_tokens 2 --predictor_position start --reverse --train_on_prompt"
    )
    train(*command(folder, tmp_path / "a", *flags.split(), "--max_seq_length", "60", "--max_steps", "1"))
    views = trainers[-1].view_tokenizer
    assert (views.turns, views.predictors) == ((0, 2), ["<|predictor_2|>", "<|predictor_1|>"])
    assert (views.predictor_position, views.reverse, views.train_on_prompt, views.max_length) == (
        "start",
        True,
        True,
        60,
    )
    assert views.tokenizer.eos_token_id not in trainers[-1].train_dataset[0]["labels"]

    rows = write_rows(tmp_path / "named.jsonl", [{**columns_of(row, "ask", "sql"), **row} for row in conversations(8)])
    named = ("--train_file", str(rows), "--text_column_name", "ask", "--code_column_name", "sql", "--max_steps", "1")
    train(*command(folder, tmp_path / "b", *named))
    words = trainers[-1].view_tokenizer.tokenizer
    assert "turn words around" not in words.decode(trainers[-1].train_dataset[0]["input_ids"])  # the system's message


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_rows_come_from_every_kind_of_file(ending: str, folder: Path, tmp_path: Path) -> None:
    """And give the same run."""
    import pandas

    table = pandas.DataFrame([columns_of(row) for row in conversations(8)])
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        table.to_parquet(path)
    elif ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines="jsonl" in ending)
    train(*command(folder, tmp_path / "out", "--train_file", str(path), "--max_steps", "2"))
    reference = tmp_path / "reference"
    write_rows(tmp_path / "plain.jsonl", [columns_of(row) for row in conversations(8)])
    train(*command(folder, reference, "--train_file", str(tmp_path / "plain.jsonl"), "--max_steps", "2"))
    assert_same_weights(tmp_path / "out", reference)


def test_a_data_set_is_read_with_its_own_validation_split(folder: Path, tmp_path: Path) -> None:
    """Messages in a directory that load_dataset loads; limits count rows."""
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", conversations(9))
    write_rows(tmp_path / "data" / "validation.jsonl", conversations(5))
    out = tmp_path / "out"
    flags = (
        f"--dataset_name {tmp_path / 'data'} --cache_dir {tmp_path / 'cache'} --output_dir {out} --do_train --do_eval"
    )
    output = train(
        *FAST.split(), "--model_name_or_path", folder / "llm", *flags.split(), "--max_train_samples", "8",
        "--max_eval_samples", "3",
    )  # fmt: skip
    assert "8 rows, 3 to evaluate on" in output


def test_without_a_template_two_columns_are_enough(folder: Path, tmp_path: Path) -> None:
    """Text, a newline, code; and a template out of a file makes messages readable."""
    without_template = ("--model_name_or_path", str(folder / "without_template"), "--max_steps", "1")
    train(*command(folder, tmp_path / "columns", "--train_file", str(folder / "columns.jsonl"), *without_template))
    assert 'tokenizer("...\\n", return_tensors="pt")' in (tmp_path / "columns" / "README.md").read_text()
    train(
        *command(
            folder, tmp_path / "answers", "--chat_template_path", str(folder / "template.jinja"), *without_template
        )
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "answers").chat_template.strip() == CHATML


@pytest.mark.parametrize("named", [True, False])
def test_generate_ends_where_the_templates_answers_end(named: bool, folder: Path, tmp_path: Path) -> None:
    """At its own stop token, where that is not the tokenizer's, and at the tokenizer's; nothing after it is learnt."""
    words = tokenizer(CHATML.replace("<|im_end|>", "<|turn_end|>"))
    if named:
        words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|turn_end|>"]})
    else:
        words.add_tokens(["<|turn_end|>"], special_tokens=True)
    words.save_pretrained(tmp_path / "words")
    train(*command(folder, tmp_path / "out", "--tokenizer_name", str(tmp_path / "words"), "--max_steps", "1"))
    generation = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    assert {*generation.eos_token_id} == {*words.convert_tokens_to_ids(["<|im_end|>", "<|turn_end|>"])}


def test_of_named_templates_the_nameless_one_is_taken(folder: Path, tmp_path: Path) -> None:
    """The others' names, which become names of files, write nowhere."""
    work = tmp_path / "a" / "b"
    shutil.copytree(folder / "without_template", work / "named")
    path = work / "named" / "tokenizer_config.json"
    names = {"default": CHATML, "../../evil": "x", "rag": "x"}
    templates = [{"name": name, "template": template} for name, template in names.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    before = {place.relative_to(tmp_path) for place in tmp_path.rglob("*")}
    train(*command(folder, work / "out", "--model_name_or_path", str(work / "named"), "--max_steps", "2"))
    new_files = {place.relative_to(tmp_path) for place in tmp_path.rglob("*")} - before
    assert not [place for place in new_files if not place.is_relative_to("a/b/out")]
    assert not [place for place in new_files if "evil" in place.name or "rag" in place.name]
    assert (work / "out" / "chat_template.jinja").read_text() == CHATML


def test_a_random_start_trains_a_tokenizer_that_writes_every_text_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Byte-level BPE with a template; the model has its vocabulary and ends where it ends."""
    flags = f"--objective llm --model_type gpt2 --train_file {folder / 'rows.jsonl'} --max_steps 1 --save_strategy no"
    sizes = "n_embd=32,n_layer=2,n_head=2,n_positions=128"
    train(*flags.split(), "--config_overrides", sizes, "--tokenizer_vocab_size", "300", "--output_dir", tmp_path)
    words, llm = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert llm.config.vocab_size == len(words) <= 301
    text = "Ünïcödé  (\\b[A-Z]{3,})~ \t\n"
    assert words.decode(words(text)["input_ids"]) == text
    assert llm.generation_config.eos_token_id == [words.convert_tokens_to_ids("<|im_end|>")]


def test_a_stop_token_that_also_pads_is_learnt(folder: Path, tmp_path: Path) -> None:
    """Of random weights: a padding token's embedding would stay at zero."""
    words = tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(tmp_path / "words")
    flags = f"--objective llm --model_type llama --config_overrides {RANDOM} --train_file {folder / 'rows.jsonl'}"
    flags += f" --tokenizer_name {tmp_path / 'words'} --max_steps 1 --save_strategy no --output_dir {tmp_path / 'out'}"
    train(*flags.split())
    assert weights(tmp_path / "out")["model.embed_tokens.weight"][words.eos_token_id].abs().max() > 0


def test_overlong_rows_are_cut_or_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both are counted; a row without any answer within the length is refused unless overlong rows are left out."""
    long = conversations(8)
    long[3]["messages"][2]["content"] = "name " * 80
    rows = write_rows(tmp_path / "long.jsonl", long)
    flags = f"--train_file {rows} --max_seq_length 64 --max_steps 1".split()
    train(*command(folder, tmp_path / "out", *flags))
    assert "truncated 1 of 8 rows to 64 tokens" in caplog.text
    long[5]["messages"][1]["content"] = "name " * 80
    write_rows(rows, long)
    assert main([*command(folder, tmp_path / "refused", *flags), *QUIET]) == 2
    caplog.clear()
    train(*command(folder, tmp_path / "left", *flags, "--filter_overlong_rows"))
    assert [record.getMessage() for record in caplog.records if "rows" in record.getMessage()] == [
        "left out 2 of 8 rows: longer than 64 tokens"
    ]


@pytest.mark.parametrize(
    "missing", [("pad_token",), ("pad_token", "eos_token"), ("pad_token", "eos_token", "unk_token")]
)
def test_a_tokenizer_without_padding_token_trains(
    missing: tuple[str, ...], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It pads with its stop token, its unknown token or any other, and answers end where the template ends them."""
    words = tokenizer(CHATML.replace("<|im_end|>", "</s>"))
    for name in missing:
        setattr(words, name, None)
    words.save_pretrained(tmp_path / "words")
    flags = f"--tokenizer_name {tmp_path / 'words'} --max_steps 1 --do_eval --generation_samples 2 --max_new_tokens 2"
    train(*command(folder, tmp_path / "out", *flags.split()))
    assert "answers end without a special token" in caplog.text


def test_the_smoke_test_needs_nothing(tmp_path: Path) -> None:
    output = train("--objective", "llm", "--smoke_test", "--max_steps", "1", "--output_dir", tmp_path / "out")
    assert "llama language model, 0.3 M parameters, random start" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").can_generate()


def test_a_run_that_learned_nothing_exits_with_code_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its results are written all the same: verdict on the console, in the card and in `metrics.json`."""
    flags = "--learning_rate 0 --do_eval --eval_on_start --validation_split_percentage 20 --loss_dropout 1"
    assert main([*command(folder, tmp_path / "out", *flags.split(), "--max_steps", "1"), *QUIET]) == 1
    reason = "Step 1: nothing learned: the next-token loss did not fall"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not healthy")]
    assert line.startswith(f"Not healthy. {reason}")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["verdict"][0].startswith(f"Not healthy. {reason}")
    assert metrics["verdict"][1] == "Next: train longer, or raise --learning_rate."
    assert f"**Not healthy.** {reason}" in (tmp_path / "out" / "README.md").read_text()


# ---- adapters


def test_adapters_are_what_is_trained_written_and_shared(folder: Path, tmp_path: Path) -> None:
    """`AutoModelForCausalLM` loads them onto the start, `jepa-hf generate` answers; predictor rows learn."""
    out = tmp_path / "out"
    flags = "--use_peft --lora_r 2 --lora_alpha 4 --num_predictor_tokens 2 --learning_rate 1e-2"
    train(*command(folder, out, *flags.split()))
    saved = load_file(out / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    assert all(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)
    assert not (out / "model.safetensors").exists()
    adapted, start = (AutoModelForCausalLM.from_pretrained(place) for place in (out, folder / "llm"))
    asked = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(adapted(asked).logits, start(asked).logits)
    rows = [load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 6)]
    (name,) = [name for name in rows[0] if "trainable_tokens" in name]
    assert rows[0][name].shape == (2, 32)
    assert (rows[0][name] != rows[1][name]).all(dim=0).any()
    assert "from the local model llm" in (out / "README.md").read_text()

    pushed = set(files_to_push(out))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= pushed
    assert "Warning" not in (out / "README.md").read_text()
    asking = ("--data_file", folder / "rows.jsonl", "--max_samples", 3, "--max_new_tokens", 3, "--use_cpu")
    say("generate", out, *asking, "--output_dir", tmp_path / "answers")


def test_adapters_load_everywhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Result and checkpoint of a run from a relative path, in another directory: as model, PeftModel, for generate and
    export; tokenizer and embeddings have one size; the exported model computes what the adapted one does.
    """
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    flags = "--use_peft --num_predictor_tokens 2 --learning_rate 1e-2 --model_name_or_path llm --max_steps 2"
    train(*command(folder, out, *flags.split()))
    monkeypatch.chdir(tmp_path)
    asked = torch.tensor([[5, 6, 7]])
    for number, source in enumerate((out, out / "checkpoint-2")):
        adapted, words = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        assert len(words) == len(adapted.get_input_embeddings().weight)
        logits = adapted(asked).logits
        assert AutoPeftModelForCausalLM.from_pretrained(source)(asked).logits.allclose(logits, atol=1e-6)
        asking = ("--data_file", folder / "rows.jsonl", "--max_samples", 2, "--max_new_tokens", 2, "--use_cpu")
        say("generate", source, *asking, "--output_dir", tmp_path / f"answers {number}")
        exported = tmp_path / f"exported {number}"
        say("export", source, exported)
        merged = AutoModelForCausalLM.from_pretrained(exported)
        assert not (exported / "adapter_config.json").exists()
        assert merged(asked).logits.allclose(logits, atol=1e-5)
        assert len(AutoTokenizer.from_pretrained(exported)) == len(words)
        assert words.eos_token_id in merged.generation_config.eos_token_id


def test_export_of_a_full_language_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint becomes a plain model; options of encoders are refused."""
    say("export", folder / "whole" / "checkpoint-4", tmp_path / "plain")
    assert_same_weights(tmp_path / "plain", folder / "whole" / "checkpoint-4")
    words = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert len(words) == len(weights(tmp_path / "plain")["model.embed_tokens.weight"])
    for option in (["--head", "mlm"], ["--onnx"]):
        say("export", folder / "whole", tmp_path / "other", *option, code=2)
        assert "holds a language model, and --encoder, --head and --custom_code are for" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_adapters_can_be_pushed_as_what_the_end_would_be(folder: Path, tmp_path: Path) -> None:
    run = jepa_hf.pretrain(
        str(folder / "llm"), objective="llm", max_steps=2, save_steps=2, train_file=str(folder / "rows.jsonl"),
        output_dir=str(tmp_path / "out"), use_peft=True, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    run.export_final_model(run.load_weights(str(tmp_path / "out" / "checkpoint-2")), str(tmp_path / "aside"), None)
    one, other = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "aside", tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_run_pushes_on_its_way_and_at_its_end_what_lies_in_its_directory(
    adapters: bool, folder: Path, tmp_path: Path
) -> None:
    """A model, or adapters, with tokenizer, template, card, metrics and picture; no settings, no checkpoint."""
    flags = "--push_to_hub --hub_always_push true --max_steps 2 --save_steps 1 --num_predictor_tokens 2"
    with Hub() as hub, hub.use_in_process():
        own = ("--hub_token", hub.token, *(["--use_peft"] if adapters else []))
        output = train(*command(folder, tmp_path / "out", *flags.split(), *own))
        repo = hub.repos["me/out"]
        steps = [f"Training in progress, step {step}" for step in (1, 2)]
        assert repo.history() == [*steps, "End of training"]
        files = repo.files()
    weights_file = "adapter_model.safetensors" if adapters else "model.safetensors"
    configs = {"adapter_config.json"} if adapters else {"config.json", "generation_config.json"}
    documents = {"README.md", "metrics.json", "training.png", "chat_template.jinja", "tokenizer.json"}
    assert documents | configs | {weights_file} <= set(files)
    assert not {"_run.json", "checkpoint-1"} & {name.partition("/")[0] for name in files}
    assert files[weights_file] == (tmp_path / "out" / weights_file).read_bytes()
    assert 'AutoModelForCausalLM.from_pretrained("me/out")' in files["README.md"].decode()
    assert "pushed to me/out" in output


# ---- going on


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--use_peft --num_predictor_tokens 2",
        "--target_gradient ema --ema_decay 0.5 --loss_dropout 0.5 --stp_weight 0.1",
        "--gradient_accumulation_steps 2 --per_device_train_batch_size 2 --eval_strategy steps --eval_steps 2 "
        "--generation_samples 2 --max_new_tokens 2",
    ],
    ids=["plain", "adapters", "teacher", "evaluation"],
)
def test_a_run_that_sigterm_ended_goes_on_exactly(
    flags: str, folder: Path, tmp_path: Path, happening: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 143 with a checkpoint; the same command ends bit for bit as the undisturbed run; then it is done."""
    name = "adapter_model.safetensors" if "peft" in flags else "model.safetensors"
    undisturbed, out = tmp_path / "whole", tmp_path / "out"
    train(*command(folder, undisturbed, *flags.split()))
    argv = command(folder, out, *flags.split())
    with happening(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*argv, *QUIET]) == 143
    assert f"continue from {out / 'checkpoint-3'}" in capsys.readouterr().out
    assert find_corruption(out / "checkpoint-3") is None
    assert not (out / name).exists()
    with happening(2, lambda: pytest.fail("it began anew")):
        assert "resuming the unfinished run" in train(*argv)
    ours, theirs = load_file(out / name), load_file(undisturbed / name)
    assert ours.keys() == theirs.keys()
    assert [key for key, value in ours.items() if not value.equal(theirs[key])] == []
    before = snapshot(out)
    assert "is finished. Start over with --overwrite_output_dir." in train(*argv)
    assert snapshot(out) == before


def test_a_random_start_goes_on_with_the_tokenizer_that_it_trained(
    folder: Path, tmp_path: Path, happening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read from the checkpoint, and not trained again."""
    flags = f"{FAST} --model_type llama --config_overrides {RANDOM} --tokenizer_vocab_size 300 --train_file"
    argv = [*flags.split(), str(folder / "rows.jsonl"), "--output_dir"]
    train(*argv, tmp_path / "whole")
    with happening(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*argv, str(tmp_path / "out"), *QUIET]) == 143
    monkeypatch.delattr(llm_module, "train_bpe_tokenizer")
    train(*argv, tmp_path / "out")
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_a_torn_checkpoint_is_passed_over(folder: Path, tmp_path: Path, happening: Any) -> None:
    """The one before it is resumed from, and the end is the same."""
    out = tmp_path / "out"
    with happening(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*command(folder, out), *QUIET]) == 143
    (out / "checkpoint-5" / "optimizer.pt").write_bytes(b"torn")
    with happening(3, lambda: pytest.fail("it began anew")):
        output = train(*command(folder, out))
    assert f"skipping {out / 'checkpoint-5'}, which is incomplete" in output
    assert "resuming the unfinished run" in output
    assert "checkpoint-4" in output
    assert_same_weights(out, folder / "whole")


def test_other_settings_need_another_directory_and_overwriting_starts_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "whole", out)
    before = snapshot(out)
    assert main([*command(folder, out, "--jepa_weight", "2"), *QUIET]) == 2
    assert "a run with other settings (jepa_weight 1.0 -> 2.0)" in capsys.readouterr().err
    assert "is finished" in train(
        *command(folder, out, "--max_new_tokens", "5")
    )  # which changes nothing that is learnt
    assert snapshot(out) == before
    train(*command(folder, out, "--jepa_weight", "2", "--overwrite_output_dir", "--max_steps", "2"))
    assert not (out / "checkpoint-6").exists()
    assert [name for name, value in weights(out).items() if not value.equal(weights(folder / "whole")[name])]


# ---- flags


def test_help_shows_the_flags_that_count_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--objective", "llm", "--help"])
    assert left.value.code == 0
    output = capsys.readouterr().out
    shown = set(re.findall(r"--[a-z][a-z0-9_]+", output))
    ours = "jepa_weight pair_loss loss_dropout num_predictor_tokens reverse train_on_prompt generation_samples database"
    shared = "model_name_or_path use_peft lora_r learning_rate overwrite_output_dir train_file max_seq_length objective"
    assert {f"--{name}" for name in f"{ours} {shared}".split()} <= shown
    assert not {"--mask_ratio", "--masked_tokens", "--image_column_name", "--ema_schedule", "--stride"} & shown
    assert "%%" not in output


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--objective llm --jepa_wieght 2", r"Unknown flag --jepa_wieght\. Did you mean --jepa_weight\?"),
        ("--objective llm --mask_ratio 0.2", "Unknown flag --mask_ratio"),
        ("--jepa_weight 2", "Unknown flag --jepa_weight"),
        ("--objective lmm", "objective must be one of span, images, features, llm, not 'lmm'"),
        ("llm.yaml --mask-ratio 0.2", "Unknown flag --mask-ratio"),
        ("masks.yaml", "unknown key mask_ratio"),
        ("odd.yaml", r"Config file 'odd.yaml' has the unknown key text_trun\. Did you mean text_turn\?"),
        ("llm.yaml --generation_metrics", "generation_metrics"),
        ("gone.yaml", "Config file 'gone.yaml' does not exist"),
    ],
)
def test_a_flag_of_another_objective_is_unknown(
    argv: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the nearest valid one is named; a recipe's `objective` counts as the flag does."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "llm.yaml", ["objective: llm", "generation_metrics: [gsm8k]"])
    write_lines(tmp_path / "odd.yaml", ["objective: llm", "text_trun: 0"])
    write_lines(tmp_path / "masks.yaml", ["objective: llm", "mask_ratio: 0.2"])
    before = snapshot(tmp_path)
    assert main(argv.split()) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert snapshot(tmp_path) == before


def test_masks_refuse_language_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say("masks", "--objective", "llm", code=2)
    assert "The objective llm has no masks" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["whole", "whole/checkpoint-6 alone"])
def test_a_report_has_the_curves_the_verdict_and_the_card_of_a_language_model(
    run: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without what only encoders have; also before the run has written its result."""
    shutil.copytree(folder / "whole", tmp_path / "run")
    if run.endswith("alone"):
        record = json.loads((tmp_path / "run" / "_run.json").read_text())
        (tmp_path / "run" / "_run.json").write_text(json.dumps(record | {"finished": False}))
        for name in ("README.md", "metrics.json"):
            (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    say("report", tmp_path / "run")
    printed, page = capsys.readouterr().out, Page(tmp_path / "run" / "report.html")
    for text in ("Next-token loss", "Distance between the views", "Settings", "Versions"):
        assert text in page.text
    for text in ("What was masked", "Probes", "Representations"):
        assert text not in page.text
    if run == "whole":
        verdict = json.loads((folder / "whole" / "metrics.json").read_text())["verdict"]
        assert printed.splitlines()[0] == verdict[0]
        assert verdict[0] in page.text
        assert "next token 1.0, views 1.0 (cosine)" in page.text
        assert "rows per step" in page.text
    else:
        assert "The run is not finished; this page shows checkpoint-6" in page.text
        assert "has no README.md yet" in page.text


# ---- bad input


BAD = {
    "no template": ("--model_name_or_path without_template", "no chat template.*--chat_template_path.*two columns"),
    "wrong column": (
        "--train_file columns.jsonl --text_column_name ask",
        r"train_file 'columns.jsonl': row 1 has neither .* 'ask'; name the columns by --text_column_name .* text, code",
    ),
    "wrong column of messages": (
        "--text_column_name ask",
        r"train_file 'rows.jsonl': row 1 has neither .* 'ask'; name the columns .*, out of: messages",
    ),
    "empty view": ("--train_file empty_view.jsonl", "'empty_view.jsonl': row 2 has an empty message -2"),
    "nothing left of a view": (
        "--train_file columns.jsonl --max_seq_length 5 --num_predictor_tokens 3 --train_on_prompt",
        r"row 1 has nothing left of message -2 within 5 tokens; increase max_length \(--max_seq_length\)",
    ),
    "an answer beyond": ("--max_seq_length 12", "row 1 has no answer within its first 12 tokens"),
    "k above ten": ("--num_predictor_tokens 11", "num_predictor_tokens must be between 0 and 10, not 11"),
    "k above the tokens": (
        "--num_predictor_tokens 10 --max_seq_length 11",
        r"max_length \(--max_seq_length\) 11 leaves no room for text with 10 predictor tokens",
    ),
    "an encoder": ("--model_name_or_path bert", "A bert model is not a causal language model"),
    "an encoder type": ("--model_name_or_path= --model_type bert", "A bert model is not a causal language model"),
    "an encoder-decoder": ("--model_name_or_path= --model_type t5", "model_type 't5' is not a causal language model"),
    "an empty file": ("--train_file nothing.jsonl", "train_file 'nothing.jsonl' is empty. Give a file with rows"),
    "a blank file": ("--train_file blank.jsonl", "train_file 'blank.jsonl' has no rows"),
    "a missing file": ("--train_file gone.jsonl", "train_file 'gone.jsonl' does not exist. Check the path"),
    "plain text": ("--train_file words.txt", "'words.txt' is plain text, which has no views"),
    "torn json": ("--train_file torn.jsonl", "Line 2, column 10, of 'torn.jsonl' is not valid JSON"),
    "a turn that is not there": ("--text_turn 5", "row 1 has 3 messages, so turn 5 cannot be a view"),
    "no rows named": ("--train_file=", "name the rows to train on with --train_file or --dataset_name"),
    "two sources": ("--dataset_name data", "train_file and dataset_name exclude each other"),
    "no start": ("--model_name_or_path=", "name the language model to start from with --model_name_or_path"),
    "two starts": ("--model_type llama", "model_name_or_path and model_type exclude each other"),
    "adapters on nothing": (
        "--model_name_or_path= --model_type llama --use_peft",
        "use_peft trains adapters of a pretrained model",
    ),
    "adapters on adapters": ("--model_name_or_path adapters", "'adapters' contains adapters.*jepa-hf export adapters"),
    "modules that are not there": ("--use_peft --lora_target_modules nose", "LoRA matches no layer of"),
    "too long": ("--max_seq_length 4096", "max_seq_length 4096 is more than the 128 positions of the model"),
    "no room for answers": (
        "--do_train --do_eval --generation_samples 2 --train_on_prompt --validation_file long.jsonl",
        "A prompt has 2.. tokens, but the model has only 128 positions",
    ),
    "answers without evaluation": ("--generation_samples 3", "generation_samples are answered in evaluations"),
    "sql without a database": (
        "--do_eval --generation_samples 1 --generation_metrics sql",
        "sql runs queries: give --database",
    ),
    "an unknown metric": ("--generation_metrics bleu", "metric must be one of exact_match, prefix_match, gsm8k, sql"),
    "an unknown distance": ("--pair_loss cosin", "pair_loss must be one of cosine, l2, mse, infonce"),
    "an unknown place": ("--predictor_position middle", "predictor_position must be end or start, got 'middle'"),
    "no rows left": (
        "--max_seq_length 12 --filter_overlong_rows",
        "none of 24 rows: all are longer than 12 tokens",
    ),
    "nothing to learn": ("--lm_weight 0 --loss_dropout 1", "Nothing would be learned: lm_weight, jepa_weight"),
    "a teacher in half": ("--dtype bfloat16 --target_gradient ema", "needs float32 weights"),
    "an unknown type": ("--dtype int4", "dtype must be one of float32, bfloat16, float16, not 'int4'"),
    "a template that is gone": ("--chat_template_path gone", "chat_template_path 'gone' cannot be read"),
    "a smoke test of a model": ("--smoke_test", "smoke_test has its own tiny model. Omit model_name_or_path"),
    "views that see each other": ("--model_name_or_path mixing", "does not separate views by their positions"),
}


@pytest.fixture(scope="module")
def material(folder: Path) -> Path:
    save_tiny_encoder("bert", folder / "bert")
    FeatureEncoderConfig(input_dim=4).save_pretrained(folder / "features")
    rows = [columns_of(row) for row in conversations(3)]
    odd = conversations(3)
    odd[1]["messages"][1]["content"] = " "
    write_rows(folder / "empty_view.jsonl", odd)
    (folder / "nothing.jsonl").touch()
    long = {"role": "user", "content": "name " * 200}
    write_rows(folder / "long.jsonl", [{"messages": [long, *row["messages"]]} for row in conversations(3)])
    write_lines(folder / "blank.jsonl", ["", " "])
    write_lines(folder / "words.txt", ["words"])
    write_lines(folder / "torn.jsonl", [json.dumps(rows[0]), '{"text": "a'])
    train(*command(folder, folder / "adapters", "--use_peft", "--max_steps", "1", "--save_strategy", "no"))
    words = tokenizer()
    words.save_pretrained(folder / "mixing")
    # It makes a mask of its own where it is given none: packed views see each other.
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    mixing = OPTForCausalLM(
        OPTConfig(vocab_size=len(words), **sizes, max_position_embeddings=128, word_embed_proj_dim=32)
    )
    with torch.no_grad():
        for parameter in mixing.parameters():
            parameter.normal_(std=0.3)
    mixing.save_pretrained(folder / "mixing")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_touches_nothing(
    name: str, material: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags, sentence = BAD[name]
    monkeypatch.chdir(material)
    before = snapshot(material)
    good = f"{FAST} --model_name_or_path llm --train_file rows.jsonl --output_dir out"
    assert main([*good.split(), *flags.split(), *QUIET]) == 2
    out, err = capfd.readouterr()
    assert out in ("", "Preparing the model and the data.\n")
    assert err.startswith("run_jepa.py: error: ")
    assert err.count("\n") == 1
    assert re.search(sentence, err), err
    assert snapshot(material) == before


# ---- jepa-hf generate


def test_generate_needs_a_finished_run(
    folder: Path, tmp_path: Path, happening: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unfinished run is named as such, with its newest checkpoint; so by export."""
    with happening(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert main([*command(folder, tmp_path / "out"), *QUIET]) == 143
    capsys.readouterr()
    say("generate", tmp_path / "out", "--data_file", folder / "rows.jsonl", code=2)
    sentence = f"holds an unfinished run; repeat its command to finish it, or name {tmp_path / 'out' / 'checkpoint-3'}"
    assert sentence in capsys.readouterr().err
    say("export", tmp_path / "out", tmp_path / "plain", code=2)
    assert sentence in capsys.readouterr().err


def test_generate_needs_a_model_and_not_its_evaluation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the model that was evaluated."""
    train(*command(folder, tmp_path / "out", "--do_eval"))
    say("generate", tmp_path / "out", "--data_file", folder / "rows.jsonl", code=2)
    sentence = f"holds the evaluation of a model, and no model; name the model, {folder / 'llm'}"
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_the_advice_of_a_run_that_was_not_assessed_can_be_followed(folder: Path, tmp_path: Path) -> None:
    """In the same directory; the second run is assessed."""
    run = command(folder, tmp_path / "out", "--max_steps", "2", "--logging_steps", "2")
    advice = f"Next: jepa-hf generate {tmp_path / 'out'} --data_file FILE, or start over with --overwrite_output_dir, "
    assert advice + "--do_train and --do_eval." in train(*run)
    assert "Not assessed" not in train(*run, "--overwrite_output_dir", "--do_train", "--do_eval")


def test_generate_keeps_earlier_results(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without --overwrite_output_dir they stay; a terminal alone shows a bar."""
    asking = ("--data_file", folder / "rows.jsonl", "--max_samples", 3, "--max_new_tokens", 2, "--use_cpu")
    say("generate", folder / "llm", *asking, "--output_dir", tmp_path / "answers")
    said = capfd.readouterr()
    assert "\r" not in said.err
    assert "Warning" not in said.err
    before = snapshot(tmp_path)
    say("generate", folder / "llm", *asking, "--output_dir", tmp_path / "answers", code=2)
    assert "holds the results of an earlier command (generation.json)" in capfd.readouterr().err
    assert snapshot(tmp_path) == before
    flags = ("--max_samples", 2, "--overwrite_output_dir")
    say("generate", folder / "llm", *asking, *flags, "--output_dir", tmp_path / "answers")
    assert json.loads((tmp_path / "answers" / "generation.json").read_text())["rows"] == 2


@pytest.mark.distributed
@pytest.mark.slow
def test_generate_shares_prompts_out_over_ranks(folder: Path, tmp_path: Path) -> None:
    """Two ranks write what one does, in the order of the rows."""
    asking = f"--data_file {folder / 'rows.jsonl'} --max_samples 5 --max_new_tokens 3 --use_cpu --output_dir".split()
    say("generate", folder / "llm", *asking, tmp_path / "one")
    launch = ("-m", "accelerate.commands.launch", "--config_file", REPOSITORY / "configs" / "accelerate" / "cpu2.yaml")
    with forked_python():
        done = start_process(
            *launch, "-m", "jepa_hf.cli", "generate", folder / "llm", *asking, tmp_path / "two", cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "predictions.jsonl").read_text() == (tmp_path / "one" / "predictions.jsonl").read_text()


def test_generate_judges_sql_by_what_a_database_gives(folder: Path, tmp_path: Path) -> None:
    """The right query is its own equal; the answers of an untrained model are not queries."""
    with sqlite3.connect(tmp_path / "shop.sqlite") as connection:
        connection.execute("create table t (x)")
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "all", "code": "select x from t", "db_id": "shop"}] * 2)
    asking = ("--data_file", rows, "--metrics", "sql", "exact_match", "--max_new_tokens", 3, "--use_cpu")
    say("generate", folder / "llm", *asking, "--database", tmp_path, "--output_dir", tmp_path / "answers")
    actual = json.loads((tmp_path / "answers" / "generation.json").read_text())["results"][str(folder / "llm")]
    assert list(actual) == ["sql", "exact_match"]
    assert actual["sql"]["share"] == 0.0
    assert 0 < actual["sql"]["high"] < 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("generate llm --data_file gone.jsonl", "--data_file: 'gone.jsonl' does not exist"),
        ("generate llm --data_file nothing.jsonl", "data_file 'nothing.jsonl' is empty"),
        (
            "generate llm --data_file columns.jsonl --text_column_name ask",
            "data_file 'columns.jsonl': row 1 has neither",
        ),
        ("generate llm --data_file rows.jsonl --metrics bleu", "metric must be one of"),
        ("generate llm --data_file rows.jsonl --metrics sql", "give --database"),
        ("generate llm --data_file rows.jsonl --metrics gsm8k", "Metric gsm8k cannot judge answers to a row whose"),
        ("generate llm --data_file rows.jsonl --metrics gsm8k gsm8k", "metrics contains a name twice"),
        ("generate llm --data_file rows.jsonl --max_new_tokens 0", "--max_new_tokens: must be at least 1"),
        ("generate llm --data_file long.jsonl --max_samples 1", "but the model has only 128 positions"),
        ("generate llm --data_file rows.jsonl --output_dir words.txt", "output_dir 'words.txt' is a file"),
        ("generate llm nothing_here --data_file rows.jsonl", "MODEL 'nothing_here' is neither a local directory"),
        ("generate bert --data_file rows.jsonl", "A bert model is not a causal language model"),
        ("generate features --data_file rows.jsonl", "A feature_encoder model is not a causal language model"),
        ("generate bert --data_file columns.jsonl", "A bert model is not a causal language model"),
        ("generate without_template --data_file rows.jsonl", "no chat template"),
        ("generate llm --data_file rows.jsonl --metric gsm8k", "unrecognized arguments: --metric gsm8k"),
        ("generate llm", "the following arguments are required: --data_file"),
    ],
)
def test_generate_refuses_in_one_sentence_and_writes_nothing(
    flags: str, sentence: str, material: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the second of two models cannot be loaded, after the first has answered."""
    monkeypatch.chdir(material)
    before = snapshot(material)
    capfd.readouterr()
    say(*flags.split(), *(["--use_cpu"] if "--max" in flags else []), code=2)
    out, err = capfd.readouterr()
    assert out in ("", "Preparing the model and the data.\n")
    assert err.startswith("jepa-hf generate: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert snapshot(material) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm_jepa", "llm_jepa_paper", "llm_jepa_random"])
def test_every_recipe_trains(name: str, folder: Path, tmp_path: Path) -> None:
    """Two steps each, of a small model, on these rows; nothing in a recipe contradicts itself."""
    recipe, small = REPOSITORY / "configs" / f"{name}.yaml", "--max_steps 2 --num_train_epochs 1 --eval_steps 2"
    own = ("--model_name_or_path", folder / "llm", "--max_seq_length", "128")
    if name == "llm_jepa_random":
        own = ("--config_overrides", f"{RANDOM},max_position_embeddings=256")
    rows = write_rows(tmp_path / "many.jsonl", conversations(160) if "paper" in name else conversations(40))
    train(recipe, *own, *small.split(), "--train_file", rows, "--max_new_tokens", "2", "--output_dir", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").can_generate()
