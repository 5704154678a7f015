"""Claims about bad input: one sentence on stderr that names the thing and the remedy, exit code 2, disk untouched."""

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer

from helpers.cli import REPOSITORY, snapshot, start_process
from helpers.tiny_models import CORPUS, save_tiny_encoder, write_lines
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.train import main
from jepa_hf.training.run_directory import RunPlan, start_run


@dataclass
class Case:
    """A bad command: a good one with `flags` behind it, or `flags` alone; and patterns that its sentence matches."""

    name: str
    flags: str
    expected: list[str]
    alone: bool = False
    late: bool = field(default=False)  # found out only with the data at hand, after progress bars

    def __str__(self) -> str:
        return self.name


GOOD = "--model_name_or_path bert --train_file data.txt --output_dir out --max_steps 1 --use_cpu --report_to none"
RANDOM = "--model_type bert --train_file data.txt --output_dir out --max_steps 1 --use_cpu --report_to none"

CASES = [
    # the tokenizer and the model
    Case(
        "no workers to keep", "--dataloader_persistent_workers", ["needs workers", "dataloader_num_workers"], late=True
    ),
    Case("no mask token", "--model_name_or_path nomask --masked_tokens mask_token", ["no mask token", "--add_tokens"]),
    Case(
        "no tokenizer", "--model_name_or_path notokenizer", ["'notokenizer' contains no tokenizer", "--tokenizer_name"]
    ),
    Case("unknown model", "--model_name_or_path no-such-model", ["'no-such-model' is neither", "check the name"]),
    Case("unknown Hub model", "--model_name_or_path me/nothing", ["'me/nothing' is neither", "hf auth login"]),
    Case("directory without config", "--model_name_or_path empty", ["'empty' cannot be loaded", r"config\.json"]),
    Case("an evaluation", "--model_name_or_path evaluated", ["'evaluated' holds the evaluation.*name the model, bert"]),
    Case("broken config", "--model_name_or_path badconfig", ["'badconfig' cannot be loaded", "not a valid JSON"]),
    Case("no weights", "--model_name_or_path noweights", ["'noweights' cannot be loaded", r"model\.safetensors"]),
    Case("broken weights", "--model_name_or_path badweights", ["'badweights' cannot be loaded", "header"]),
    Case("unknown tokenizer", "--tokenizer_name no-such-tokenizer", ["tokenizer_name 'no-such-tokenizer'"]),
    Case(
        "unknown model_type",
        RANDOM + " --model_type berd",
        ["'berd'.*Did you mean bert", "distilbert", "feature_encoder"],
        alone=True,
    ),
    Case("image model_type", RANDOM + " --model_type vit", ["is not an image", r"\.png"], alone=True),
    Case("encoder-decoder", RANDOM + " --model_type t5", ["t5 model is an encoder-decoder", "bert"], alone=True),
    Case("an image flag", "--image_column_name img", ["image_column_name is for the objective images", "omit it"]),
    Case("a feature flag", "--label_column_name y", ["label_column_name is for the objective features"]),
    Case("a smoke test of a model", "--smoke_test", ["smoke_test has its own", "Omit model_name_or_path"]),
    Case("a smoke test of a type", RANDOM + " --smoke_test", ["smoke_test has", "Omit model_type"], alone=True),
    Case("two starts", "--model_type bert", ["model_name_or_path and model_type exclude each other"]),
    Case(
        "no start",
        "--output_dir out",
        ["--model_name_or_path", "--objective features", r"quickstart\.yaml"],
        alone=True,
    ),
    Case("half precision weights", "--dtype bfloat16", ["dtype 'bfloat16'", "--bf16"]),
    Case("overrides of weights", "--config_overrides hidden_size=8", ["config_overrides is for a random start"]),
    Case("malformed overrides", RANDOM + " --config_overrides width", ["'width'", "name=value"], alone=True),
    Case(
        "unknown key in overrides",
        RANDOM + " --config_overrides hiden_size=8",
        ["'hiden_size=8'", "a bert model has no 'hiden_size'", r"Did you mean hidden_size\?"],
        alone=True,
    ),
    Case(
        "impossible overrides",
        RANDOM + " --config_overrides hidden_size=30,num_attention_heads=7,num_hidden_layers=1",
        ["the bert encoder cannot be built with this configuration", r"30.*7"],
        alone=True,
        late=True,
    ),
    Case("attention", "--attn_implementation nonsense", ["nonsense", "sdpa"]),
    Case("add_tokens missing", "--add_tokens nope.txt", ["add_tokens 'nope.txt'", "one token per line"]),
    Case("add_tokens not UTF-8", "--add_tokens latin.txt", ["add_tokens 'latin.txt' is not UTF-8", "convert"]),
    # the data
    Case("missing file", "--train_file nope.txt", ["train_file 'nope.txt' does not exist", "Check the path"]),
    Case("empty file", "--train_file empty.txt", ["train_file 'empty.txt' is empty", "Provide a file with text"]),
    Case("blank file", "--train_file blank.txt", ["'blank.txt' holds no text, only blank rows"]),
    Case("not UTF-8", "--train_file latin.txt", ["'latin.txt' is not UTF-8 at byte 3", "Convert it"]),
    Case("no text column", "--train_file table.csv", ["No column 'text'", "--text_column_name", "a, b"]),
    Case("no such column", "--train_file table.csv --text_column_name c", ["No column 'c'", "a, b"]),
    Case("validation_file missing", "--validation_file nope.txt --do_eval", ["validation_file 'nope.txt'"], late=True),
    Case("dataset unknown", GOOD.replace("train_file data.txt", "dataset_name me/none"), ["'me/none'"], alone=True),
    Case("file and dataset", "--dataset_name some", ["train_file and dataset_name exclude each other"]),
    Case("packed and concat", "--packed --concat", ["concat and packed exclude each other"]),
    Case("packed windows", "--packed --stride 4", ["packed and stride exclude each other"]),
    Case(
        "packed DeBERTa", "--packed --model_name_or_path deberta-v2", ["not exact for deberta-v2", "Leave out --packed"]
    ),
    Case("packed attention", "--packed --attn_implementation flex_attention", ["'flex_attention'", "Use sdpa"]),
    Case("stride too large", "--stride 126", ["stride 126", "from 0 to 125"], late=True),
    Case("too long for bert", "--max_seq_length 129", ["max_seq_length 129", "128 positions", "at most 128"]),
    Case(
        "too long for roberta", "--model_name_or_path roberta --max_seq_length 129", ["129", "128 positions"]
    ),  # which has 130 embeddings
    Case("no room for text", "--max_seq_length 2", ["max_seq_length 2 leaves no room", "Increase it"], late=True),
    Case(
        "streaming without max_steps",
        "--model_name_or_path bert --train_file data.txt --output_dir out --streaming",
        ["With streaming, set --max_steps"],
        alone=True,
    ),
    # the masks and the objective
    *(
        Case(f"mask_ratio {ratio}", f"--mask_ratio {ratio}", ["mask_ratio must lie strictly between 0 and 1", ratio])
        for ratio in ("0", "1", "1.5", "-1", "nan")
    ),
    *(
        Case(f"span {mean}", f"--mean_span_length {mean}", ["mean_span_length must be at least 1", mean])
        for mean in ("0.5", "-3", "nan")
    ),
    Case("num_masks", "--num_masks 0", ["num_masks must be at least 1, not 0"]),
    Case(
        "dropped view of DeBERTa-v2",
        "--model_name_or_path deberta-v2 --masked_tokens drop",
        ["not exact for deberta-v2", "--masked_tokens mask_token"],
    ),
    Case(
        "mlp predictor, dropped view",
        "--predictor_type mlp --masked_tokens drop",
        ["mlp predictor", "--predictor_type transformer or --masked_tokens mask_token"],
    ),
    Case("unknown loss", "--loss huber", ["loss must be one of smooth_l1, l2, l1, cosine, not 'huber'"]),
    Case("ema_decay", "--ema_decay 2", ["ema_decay must lie between 0 and 1, not 2"]),
    # the directory
    Case("foreign directory", "--output_dir foreign", ["'foreign' holds something else", "another directory"]),
    Case(
        "foreign directory, to overwrite",
        "--output_dir foreign --overwrite_output_dir",
        ["'foreign' holds something else", "another directory"],
    ),
    Case("output_dir is a file", "--output_dir data.txt", ["'data.txt' is a file", "Name a directory"]),
    Case("output_dir in a file", "--output_dir data.txt/out", ["'data.txt/out'.*under one", "Name a directory"]),
    Case("no checkpoint", "--resume_from_checkpoint bert", ["to be a checkpoint of a run, got 'bert'", "checkpoint-N"]),
    Case("half a checkpoint", "--resume_from_checkpoint half", ["'half' is incomplete", r"no manifest\.json"]),
    Case(
        "checkpoint missing",
        "--resume_from_checkpoint nope",
        ["to be a checkpoint of a run, got 'nope'", "checkpoint-N"],
    ),
    Case(
        "resume and overwrite",
        "--resume_from_checkpoint half --overwrite_output_dir",
        ["resume_from_checkpoint and overwrite_output_dir exclude"],
    ),
    # flags and files of flags
    Case("unknown flag", "--mask_ration 0.3", [r"Unknown flag --mask_ration\. Did you mean --mask_ratio\?"]),
    Case("unknown flag with =", "--mask-ration=0.3", [r"Unknown flag --mask-ration\. Did you mean --mask_ratio\?"]),
    Case("nothing like a flag", "--zzzzqqqq", [r"Unknown flag --zzzzqqqq\. See --help_all"]),
    Case("abbreviated flag", "--mask_rat 0.3", [r"Unknown flag --mask_rat\. Did you mean --mask_ratio\?"]),
    Case("stray value", "data2.txt", ["'data2.txt' follows no flag"]),
    Case("wrong type", "--max_steps abc", ["^--max_steps: invalid int value: 'abc'$"]),
    Case("no value", "--mask_ratio", ["^--mask_ratio: expected one argument$"]),
    Case("not a bool", "--streaming perhaps", ["--streaming", "perhaps", "true/false"]),
    Case(
        "unknown key", "unknown.yaml", ["'unknown.yaml'", r"unknown key mask_ration\. Did you mean mask_ratio\?"], True
    ),
    Case("key of the wrong type", "type.yaml", ["max_steps: invalid int value: 'abc'"], True),
    Case("key with a list", "list.yaml", ["'list.yaml': max_steps takes one value", r"\[1, 2\]"], True),
    Case("key with a wrong choice", "choice.yaml", ["eval_strategy: invalid choice: 'nonsense'", "'epoch'"], True),
    Case("invalid YAML", "invalid.yaml", ["'invalid.yaml' is not valid YAML", "line 1"], True),
    Case("YAML without keys", "items.yaml", ["'items.yaml' must hold lines of the form `key: value`"], True),
    Case("missing YAML", "nope.yaml", ["'nope.yaml' does not exist"], True),
    # numbers and combinations that TrainingArguments or torch would trip over
    Case("unknown schedule", "--lr_scheduler_type nonsense", ["--lr_scheduler_type", "'nonsense'", "'cosine'"]),
    Case("bf16 and fp16", "--bf16 --fp16", ["fp16 and bf16"]),
    Case("negative warm-up", "--warmup_steps -5", ["warmup_steps", "-5"]),
    Case("best by no metric", "--load_best_model_at_end", ["--metric_for_best_model", "probe_linear"]),
    Case(
        "best of other steps",
        "--load_best_model_at_end --metric_for_best_model top1_accuracy --eval_strategy steps --save_strategy epoch",
        ["save and eval strategy to match"],
    ),
    Case("missing accelerator_config", "--accelerator_config nope.json", [r"nope\.json"]),
    Case("batch of nothing", "--per_device_train_batch_size 0", ["per_device_train_batch_size must be at least 1"]),
    Case("no accumulation", "--gradient_accumulation_steps 0", ["gradient_accumulation_steps must be at least 1"]),
    Case("negative rate", "--learning_rate -1", ["learning_rate must be at least 0"]),
    Case("negative seed", "--seed -1", ["seed must be at least 0"]),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad files to name on a command line."""
    folder = tmp_path_factory.mktemp("material")
    for family in ("bert", "roberta", "deberta-v2"):
        save_tiny_encoder(family, folder / family)
    for name in ("nomask", "notokenizer", "badconfig", "noweights", "badweights"):
        shutil.copytree(folder / "bert", folder / name)
    vocab = AutoTokenizer.from_pretrained(folder / "bert").get_vocab()
    BertTokenizer(vocab, mask_token=None).save_pretrained(folder / "nomask")
    for path in (folder / "notokenizer").glob("*token*"):
        path.unlink()
    (folder / "badconfig" / "config.json").write_text("{")
    (folder / "noweights" / "model.safetensors").unlink()
    (folder / "badweights" / "model.safetensors").write_bytes(b"\xff" * 100)
    for name in ("empty", "foreign", "half"):
        (folder / name).mkdir()
    start_run(folder / "evaluated", {"do_train": False, "model_name_or_path": "bert"}, RunPlan())
    (folder / "foreign" / "notes.txt").write_text("precious")
    (folder / "half" / "trainer_state.json").write_text("{}")
    write_lines(folder / "data.txt", CORPUS)
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\t\n\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait\n" * 10)
    (folder / "table.csv").write_text("a,b\n1,2\n")
    for name, content in {
        "unknown": "mask_ration: 0.3",
        "type": "max_steps: abc",
        "list": "max_steps: [1, 2]",
        "choice": "eval_strategy: nonsense",
        "invalid": "a: [1",
        "items": "- 1",
    }.items():
        (folder / f"{name}.yaml").write_text(content + "\n")
    return folder


def assert_one_sentence(stderr: str, command: str, expected: list[str], late: bool = False) -> None:
    if late:  # a progress bar returns to the start of its line again and again
        stderr = re.sub(r"^.*examples/s\]\n?", "", stderr, flags=re.MULTILINE)
    assert stderr.startswith(f"{command}: error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    assert "\r" not in stderr
    sentence = stderr.removeprefix(f"{command}: error: ").removesuffix("\n")
    assert [pattern for pattern in expected if not re.search(pattern, sentence)] == [], sentence


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_gets_one_sentence_and_touches_nothing(
    case: Case, material: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(material)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = snapshot(material)
    capfd.readouterr()
    assert main(case.flags.split() if case.alone else [*GOOD.split(), *case.flags.split()]) == 2
    out, err = capfd.readouterr()
    assert out in ("", "Preparing the model and the data.\n")
    assert_one_sentence(err, "run_jepa.py", case.expected, case.late)
    assert snapshot(material) == before


OUT_OF_RANGE = [
    *("mask_ratio 1.5", "mean_span_length 0", "num_masks 0", "on_too_short never", "target_scale 0.5 0.1"),
    *("context_scale 0 2", "target_aspect_ratio -1 1", "random_resized_crop 0 1", "masked_tokens gone"),
    *("pred_hidden_size 0", "pred_dropout 1", "pred_mlp_ratio 0", "loss l3", "mlm_weight nan", "contrastive_weight -1"),
    *("contrastive_temperature 0", "average_top_k_layers 0", "smooth_l1_beta 0", "target_norm batch", "lora_r 0"),
    *("lora_dropout 1", "tokenizer_vocab_size 0", "max_seq_length 0", "stride -1", "stride 9 --max_seq_length 9"),
    *("weight_decay -1", "learning_rate nan", "adam_beta1 1", "adam_beta2 2", "adam_epsilon -1", "max_grad_norm -1"),
    *("dataloader_num_workers -1", "save_steps -1", "logging_steps -1", "eval_accumulation_steps 0", "ema_decay 2"),
    *("seed 4294967296", "gradient_accumulation_steps 0", "max_eval_samples 0", "health_steps -1"),
]
LLM_OUT_OF_RANGE = [
    *("jepa_weight -1", "pair_loss l3", "loss_dropout 2", "infonce_temperature 0", "ema_decay 2", "stp_weight -1"),
    *("num_predictor_tokens 11", "predictor_position middle", "max_seq_length 2", "pad_to_multiple_of 0"),
    *("generation_samples -1", "max_new_tokens 0", "lora_r 0", "adam_beta1 2", "weight_decay -1", "max_steps 0"),
    *("generation_metrics bleu", "tokenizer_vocab_size 0", "num_train_epochs 0"),
]


@pytest.mark.parametrize("flag", OUT_OF_RANGE)
@pytest.mark.parametrize("command", ["train", "masks"])
def test_a_value_out_of_range_is_refused_before_anything_is_read(
    flag: str, command: str, material: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model of the command does not exist, which is found out only when it is read."""
    monkeypatch.chdir(material)
    argv = f"{command} --model_name_or_path me/nothing --train_file data.txt --output_dir out --max_steps 1 --{flag}"
    assert jepa_hf_main(argv.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert_one_sentence(err, f"jepa-hf {command}", [flag.split()[0]])


@pytest.mark.parametrize("flag", LLM_OUT_OF_RANGE)
def test_a_value_of_a_language_model_out_of_range_is_refused_before_anything_is_read(
    flag: str, material: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(material)
    flags = "--objective llm --model_name_or_path me/nothing --train_file table.csv --output_dir out"
    assert jepa_hf_main([*f"train {flags} --{flag}".split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert_one_sentence(err, "jepa-hf train", [flag.split()[0].replace("generation_metrics", "bleu")])


def test_the_good_command_is_good(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the cases above would prove nothing.
    monkeypatch.chdir(material)
    assert main([*GOOD.split(), "--output_dir", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_refused_flag_leaves_a_finished_run_as_it_is(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(material)
    command = [*GOOD.split(), "--output_dir", str(tmp_path)]
    assert main(command) == 0
    before = snapshot(tmp_path)
    capfd.readouterr()
    for flags, expected in (
        (["--overwrite_output_dir", "--mask_ratio", "2"], "mask_ratio"),
        (["--overwrite_output_dir", "--train_file", "blank.txt"], "blank rows"),
        (["--mask_ratio", "0.2"], "mask_ratio unset -> 0.2"),
    ):
        assert main([*command, *flags]) == 2
        assert_one_sentence(capfd.readouterr().err, "run_jepa.py", [expected])
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_the_script_exits_with_2(material: Path) -> None:
    before = snapshot(material)
    flags = ["--model_name_or_path", "me/nothing"]
    result = start_process(REPOSITORY / "run_jepa.py", *GOOD.split(), *flags, cwd=material)
    assert result.returncode == 2
    assert result.stdout in ("", "Preparing the model and the data.\n")
    assert_one_sentence(result.stderr, "run_jepa.py", [flags[1]])
    assert snapshot(material) == before


@pytest.mark.slow
def test_the_console_command_exits_with_2(material: Path) -> None:
    result = start_process("-m", "jepa_hf.cli", "train", *GOOD.split(), "--bf16", "--fp16", cwd=material)
    assert result.returncode == 2
    assert_one_sentence(result.stderr, "jepa-hf train", ["fp16 and bf16"])


@pytest.mark.parametrize(
    ("argv", "command", "expected"),
    [
        (
            ["trian"],
            "jepa-hf",
            ["Unknown command 'trian'", "train, masks, evaluate, generate, export, report, embed and push"],
        ),
        (["train", "--accelerate_config", "nope.yaml"], "jepa-hf train", ["accelerate_config 'nope.yaml'"]),
        (["train", "--accelerate_config"], "jepa-hf train", ["accelerate_config ''"]),
        (["train", "--mask_ration", "1"], "jepa-hf train", ["Did you mean --mask_ratio"]),
    ],
)
def test_the_console_commands_own_mistakes(
    argv: list[str], command: str, expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert jepa_hf_main(argv) == 2
    assert_one_sentence(capfd.readouterr().err, command, expected)
