"""Claims about the checks before torch is imported: fast, the same names as the parsers', and the right suggestion."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cli import REPOSITORY, start_process
from jepa_hf import UsageError
from jepa_hf.cli import requirements
from jepa_hf.cli.help import short_help
from jepa_hf.cli.llm_arguments import LLM_CLASSES
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.main import run_process
from jepa_hf.cli.parsing import _CLASSES, _field_names, _Parser, parse_command, parse_flags
from jepa_hf.cli.quick_checks import check_train_command, flag_names
from jepa_hf.cli.requirements import check_packages


@pytest.mark.parametrize(("objective", "classes"), [("span", _CLASSES), ("llm", LLM_CLASSES)])
def test_the_names_are_those_of_the_parsers(objective: str, classes: tuple[type, ...]) -> None:
    """They are read from sources, which must not miss a class or take one of another objective."""
    names = set(_field_names(_Parser(classes)))
    assert names <= flag_names(objective)
    assert flag_names(objective) - names == {"distributed_state"} & flag_names(objective)
    for flag in re.findall(r"^  --(\w+)", short_help("jepa-hf train", objective), re.MULTILINE):
        assert flag in names | {"help_all", "accelerate_config"}


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("--help", 0, "pretrain an encoder"),
        ("train --help", 0, "--help_all"),
        ("train --lerning_rate 1", 2, "Did you mean --learning_rate?"),
        ("train --model_type bert --train_file nope.txt", 2, "train_file 'nope.txt' does not exist. Check the path."),
        ("train nope.yaml", 2, "Config file 'nope.yaml' does not exist."),
        ("masks nope.yaml", 2, "Config file 'nope.yaml' does not exist."),
        ("report nope", 2, "'nope' is not a directory. Name the output_dir of a run."),
        ("push nope me/x", 2, "'nope' is not a directory. Name the output_dir of a run."),
        ("evaluate --help", 0, "--pooling"),
        ("embed --help", 0, "--output"),
        ("export --help", 0, "--onnx"),
        ("generate --help", 0, "--metrics"),
        ("evaluate me/model --tasks nope.csv", 2, "--tasks: 'nope.csv' does not exist. Check the path."),
        ("embed ./nope x.txt --output x.npy", 2, "MODEL: './nope' is neither a directory nor a name on the Hub."),
        ("generate me/model --data_file nope.jsonl", 2, "--data_file: 'nope.jsonl' does not exist. Check the path."),
        ("export nope out", 2, "SOURCE: 'nope' is not a directory."),
        ("embed me/model . --output x.npy --bach_size 4", 2, "unrecognized arguments: --bach_size 4"),
    ],
)
def test_help_and_mistakes_are_answered_without_torch(command: str, code: int, words: str, tmp_path: Path) -> None:
    result = start_process("-X", "importtime", "-m", "jepa_hf.cli", *command.split(), cwd=tmp_path, fresh=True)
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", result.stderr, re.MULTILINE))
    assert result.returncode == code
    assert words in result.stdout + result.stderr
    assert {"torch", "transformers", "datasets", "matplotlib"} & imported == set()


@pytest.mark.parametrize("command", ["--help", "train --help", "embed --help"])
def test_a_reader_that_closes_the_pipe_ends_a_command_quietly(command: str, tmp_path: Path) -> None:
    """With the exit code of SIGPIPE, as in `jepa-hf --help | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "jepa_hf.cli", *command.split()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}
    process = subprocess.run(arguments, env=environment, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize(("said", "words"), [("", "Run the same command again."), ("Go on.", "Go on.")])
def test_ctrl_c_ends_a_command_with_a_sentence(said: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the exit code of SIGINT, also during the imports of training; there were tracebacks."""

    def interrupted() -> int:
        raise KeyboardInterrupt(said)

    with pytest.raises(SystemExit, match="130"):
        run_process(interrupted)
    assert capsys.readouterr().err == f"\nInterrupted. {words}\n"


@pytest.mark.parametrize(
    "settings",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C"],
)
def test_characters_that_the_terminal_lacks_are_replaced(settings: dict[str, str], tmp_path: Path) -> None:
    """A training ended with a UnicodeEncodeError at its first line, whose parts are divided by dots."""
    text = "step 1 · 0.4×9.8 ü 文 → \U0001f600"
    script = f"from jepa_hf.cli.main import run_process; run_process(lambda: print({text!a}) or 0)"
    result = start_process("-c", script, cwd=tmp_path, fresh=True, **settings)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "step 1 - 0.4x9.8 \\xfc \\u6587 -> \\U0001f600\n"


def test_a_broken_pipe_of_another_kind_is_an_error() -> None:
    def fail() -> int:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_process(fail)


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["import jepa_hf\nfrom transformers import AutoModel", "import transformers, jepa_hf"]
)
def test_importing_the_package_registers_its_models(order: str, tmp_path: Path) -> None:
    """In any order of imports, without a name of the package being used."""
    code = "from transformers import AutoConfig, AutoModel\n"
    four = "input_dim=4"
    for model_type, arguments in (("feature_encoder", four), ("jepa", f"dict(model_type='feature_encoder', {four})")):
        code += f"AutoModel.from_config(AutoConfig.for_model('{model_type}', {arguments}))\n"
    result = start_process("-c", f"{order}\n{code}", cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--context_mode kept", "Unknown flag --context_mode. Did you mean --masked_tokens?"),
        ("--batch_size 4", "Unknown flag --batch_size. Did you mean --per_device_train_batch_size?"),
        ("--lr 4", "Unknown flag --lr. Did you mean --learning_rate?"),
        ("--zzzz", "Unknown flag --zzzz. See --help_all for all flags."),
        ("--jepa_weight 1", "It is for the objective llm, and this run's is span. Omit it."),
        ("--objective llm --mask_ratio 1", "It is for the objective span, images and features"),
        ("--train_file a.txt,b.txt", "train_file 'a.txt' does not exist."),
    ],
)
def test_a_mistake_gets_the_right_suggestion_or_none(flags: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        check_train_command(flags.split())


def test_good_commands_pass(tmp_path: Path) -> None:
    (tmp_path / "a, b.txt").write_text("text")
    check_train_command(["--train_file", str(tmp_path / "a, b.txt"), "--no_use_legacy_prediction_loop"][:2])
    check_train_command(["--train_file", f"{tmp_path}/*.none", "--max-steps=3", "--learning_rate", "-1e-3"])
    check_train_command([str(REPOSITORY / "configs/quickstart.yaml"), "--report_to", "none", "--do_eval", "false"])
    check_train_command(["--objective", "llm", "--jepa_weight", "1"])


def test_a_negative_number_with_an_exponent_is_a_value() -> None:
    """argparse takes it for a flag; the check of the range then has the sentence."""
    with pytest.raises(UsageError, match=r"learning_rate must be at least 0, not -0\.001"):
        parse_command(["--learning_rate", "-1e-3"])


@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_is_no_weight(value: bool, tmp_path: Path) -> None:
    """From the command line, a recipe and Python alike."""
    (tmp_path / "recipe.yaml").write_text(f"mlm_weight: {str(value).lower()}\n")
    with pytest.raises(UsageError, match=f"mlm_weight takes a number, not {value}"):
        parse_command([str(tmp_path / "recipe.yaml")])
    with pytest.raises(UsageError, match=f"mlm_weight takes a number, not {value}"):
        parse_flags({"mlm_weight": value})
    with pytest.raises(UsageError, match="mlm_weight"):
        parse_command(["--mlm_weight", str(value).lower()])


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": ["tensorboard", "comet_ml"]}, "tensorboard"),
        ({"report_to": "comet_ml"}, "comet-ml"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn --no-build-isolation"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "kernels"),
        ({"optim": "galore_adamw_layerwise"}, "galore-torch"),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"optim": "adalomo"}, "lomo-optim"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"use_liger_kernel": True}, "liger-kernel"),
        ({"deepspeed": "ds.json"}, "deepspeed"),
        ({"use_peft": True}, "'jepa_hf[peft]'"),
        ({"probe_task": "labelled.csv"}, "'jepa_hf[evaluate]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    values: dict[str, object], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape(f"not installed. Install it with: pip install {package}")):
        check_packages(values)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_what_torch_has_needs_no_package(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    check_packages({"optim": optimizer, "report_to": [], "attn_implementation": "sdpa", "use_peft": False})


def test_all_flags_are_in_the_complete_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups, under the name of the command; a terminal shows at once that it takes a while."""
    assert jepa_hf_main(["train", "--help_all"]) == 0
    text, error = capsys.readouterr()
    assert error == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert jepa_hf_main(["train", "--objective", "llm", "--help-all"]) == 0
    llm_text, error = capsys.readouterr()
    assert error == "collecting all options ...\n"
    assert "--jepa_weight" in llm_text
    assert text.startswith("usage: jepa-hf train [CONFIG.yaml]")
    assert [title for title in ("model:", "data:", "mask:", "run:") if f"\n{title}\n" in text] == [
        "model:",
        "data:",
        "mask:",
        "run:",
    ]
    for name in _field_names(_Parser(_CLASSES)):
        assert f"--{name}" in text
