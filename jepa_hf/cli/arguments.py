"""Flags and YAML keys, their names those of transformers' run_mlm.py wherever it has one, and how they are parsed."""

import argparse
import difflib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import datasets
import transformers
import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..data.arguments import DataArguments
from ..errors import RunError, UsageError
from ..training.training_args import JepaTrainingArguments


@dataclass
class StartArguments:
    """Which model a run starts from; what every objective asks alike."""

    objective: str | None = field(
        default=None,
        metadata={
            "help": "span (text), images, features or llm (a language model and two views of its rows, which has "
            "flags of its own: --objective llm --help); default: what the model, or the data, is for."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder to start from: a directory or Hub name; an encoder, an MLM checkpoint or a JEPA."},
    )
    model_type: str | None = field(
        default=None,
        metadata={
            "help": "For a random start: bert, distilbert, roberta, electra, deberta-v2, modernbert; ijepa, vit, "
            "dinov2; feature_encoder."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "For a random start: directory or Hub name of a model's configuration."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "For a random start: changes to that configuration, hidden_size=128,num_hidden_layers=4."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, where it is not the model's."})
    tokenizer_vocab_size: int = field(
        default=8192, metadata={"help": "Vocabulary of the tokenizer that a random start without one trains."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights; --bf16 computes in bfloat16 anyway."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention: sdpa, eager, ..."})
    smoke_test: bool = field(
        default=False, metadata={"help": "Train a tiny model from a random start on the embedded corpus, 20 steps."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters; the model's own weights stay."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale, times the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of what they read."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Ends of the names of the layers that get one; default every linear layer."}
    )

    def lora_settings(self) -> dict[str, Any] | None:
        """The arguments of peft's `LoraConfig` that were given; None without --use_peft."""
        if not self.use_peft:
            return None
        settings = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        if self.lora_target_modules is not None:
            settings["target_modules"] = self.lora_target_modules
        return settings


@dataclass
class ModelArguments(StartArguments):
    """Which encoder, and what is built around it."""

    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, where it is not the model's."}
    )
    add_tokens: str | None = field(
        default=None, metadata={"help": "A text file of tokens, one a line, to add to the tokenizer."}
    )
    # JepaConfig; None leaves its default.
    context_mode: str | None = field(
        default=None, metadata={"help": "Masked positions are kept as [MASK] tokens, or dropped from the context view."}
    )
    predictor_type: str | None = field(default=None, metadata={"help": "transformer or mlp."})
    pred_hidden_size: int | None = field(default=None, metadata={"help": "Width of the transformer predictor."})
    pred_num_hidden_layers: int | None = field(default=None, metadata={"help": "Its number of layers."})
    pred_num_attention_heads: int | None = field(default=None, metadata={"help": "Its number of heads."})
    pred_mlp_ratio: float | None = field(default=None, metadata={"help": "Width of hidden layers over the input's."})
    pred_dropout: float | None = field(default=None, metadata={"help": "Dropout in the predictor."})
    pred_init: str | None = field(
        default=None,
        metadata={
            "help": "Random weights of the transformer predictor: unit_gain, or small (0.02; default for encoders with "
            "absolute positions)."
        },
    )
    loss: str | None = field(default=None, metadata={"help": "smooth_l1, l2, l1 or cosine."})
    smooth_l1_beta: float | None = field(default=None, metadata={"help": "Where smooth L1 turns linear."})
    target_layers: int | None = field(default=None, metadata={"help": "How many top layers the targets average."})
    target_norm: str | None = field(default=None, metadata={"help": "Normalisation of targets: layer, instance, none."})
    prediction_weight: float | None = field(
        default=None, metadata={"help": "Weight of the prediction loss; 0 trains on the other terms alone."}
    )
    mlm_weight: float | None = field(default=None, metadata={"help": "Weight of a masked-language-model loss."})
    variance_weight: float | None = field(default=None, metadata={"help": "Weight of the variance hinge."})
    covariance_weight: float | None = field(default=None, metadata={"help": "Weight of the covariance penalty."})
    sigreg_weight: float | None = field(default=None, metadata={"help": "Weight of the SIGReg term."})
    contrastive_weight: float | None = field(
        default=None, metadata={"help": "Weight of finding each sample's own target among the batch's; of text 1."}
    )
    contrastive_temperature: float | None = field(
        default=None, metadata={"help": "What the cosines of that comparison are divided by."}
    )
    pooled_targets: bool | None = field(
        default=None, metadata={"help": "Predict the mean of a mask's targets instead of each."}
    )

    def jepa_kwargs(self) -> dict[str, Any]:
        """The arguments of `JepaConfig` that were given."""
        names = [item.name for item in fields(self)]
        values = {name: getattr(self, name) for name in names[names.index("context_mode") :]}
        values["lora"] = self.lora_settings()
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class MaskArguments:
    """How parts are hidden: the collators' arguments; None leaves their default."""

    mask_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of tokens, time steps or feature patches that is hidden, default 0.3."},
    )
    mean_span_length: float | None = field(
        default=None,
        metadata={
            "help": "Mean length of a hidden span, 1 for single ones: default 5 tokens or time steps, 1 feature patch."
        },
    )
    whole_word: bool = field(default=False, metadata={"help": "Hide whole words; spans then count words."})
    num_masks: int | None = field(
        default=None, metadata={"help": "Masks per sample, which share one target pass: default 1, images 4 blocks."}
    )
    on_short: str | None = field(
        default=None,
        metadata={"help": "A row of fewer than two maskable positions: skip and count it (default), or error."},
    )
    target_scale: list[float] | None = field(
        default=None, metadata={"help": "Images: range of a target block's area, a share of the image: 0.15 0.2."}
    )
    target_aspect_ratio: list[float] | None = field(
        default=None, metadata={"help": "Images: range of a target block's height over width: 0.75 1.5."}
    )
    context_scale: list[float] | None = field(
        default=None, metadata={"help": "Images: range of the context block's area before targets go: 0.85 1.0."}
    )
    inside_targets: bool = field(
        default=False, metadata={"help": "Images: no target block leaves the image; its edges are hidden less often."}
    )
    random_resized_crop: list[float] | None = field(
        default=None, metadata={"help": "Images: crop a random part, of an area in this range, such as 0.4 1.0."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Images: mirror every other image."})

    def __post_init__(self) -> None:
        for name in ("target_scale", "target_aspect_ratio", "context_scale", "random_resized_crop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (list, tuple)) or len(value) != 2):
                raise UsageError(f"{name} takes two numbers, the least and the most, not {value}")

    def chosen(self, objective: str, names: Sequence[str]) -> dict[str, Any]:
        """The arguments that were given.

        Raises:
            UsageError: one that the objective does not read.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        for name in given:
            if name not in names:
                raise UsageError(f"{name} is not for the objective {objective}, which takes {', '.join(names)}")
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@dataclass
class RunArguments(JepaTrainingArguments):
    """`JepaTrainingArguments`, and what only a command has."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start over, deleting what an earlier run wrote to output_dir."}
    )


Parsed = tuple[ModelArguments, DataArguments, MaskArguments, RunArguments]
# Whose fields the flags of an encoder's run are.
_CLASSES = (ModelArguments, DataArguments, MaskArguments, RunArguments)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` of a command beside `train`, whose error is one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def output_folder(output_dir: str) -> Path:
    """A directory that results can be written to; it is not made here.

    Raises:
        UsageError: it cannot be one.
    """
    folder = Path(output_dir)
    places = (folder, *folder.parents)
    if any(place.exists() and not place.is_dir() for place in places):
        raise UsageError(f"output_dir {output_dir!r} is a file, or lies under one; name a directory")
    if not os.access(next(place for place in places if place.exists()), os.W_OK):
        raise UsageError(f"output_dir {output_dir!r} cannot be written to; name another directory")
    return folder


class _Parser(HfArgumentParser):
    """A parser whose error is one sentence, not two hundred flags and a sentence; every yes-or-no flag stands alone."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        # Each flag also goes by its name with hyphens: once is enough.
        raise UsageError(re.sub(r"^argument (--\w+)(/--?[\w-]+)*", r"\1", message))


def objective_of(argv: Sequence[str]) -> str | None:
    """The objective that a command, or the recipe that it begins with, names: it decides which flags there are.

    >>> objective_of(["--objective", "llm", "--seed", "1"]), objective_of(["--seed", "1"])
    ('llm', None)

    Raises:
        UsageError: a recipe that cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--objective", nargs="?")
    found = parser.parse_known_args(list(argv))[0].objective
    if found is None and argv and not argv[0].startswith("-"):
        found = _yaml_content(argv[0]).get("objective")
    return found


def parse_command(
    argv: Sequence[str],
    classes: Sequence[type] = _CLASSES,
    description: str = "Pretrain an encoder with JEPA.",
) -> tuple[Any, ...]:
    """Parse `[CONFIG.yaml] [--flag value ...]`; flags override the file.

    Args:
        classes: dataclasses whose fields are the flags; default those of an encoder's run.
        description: what --help says first.

    Returns:
        An instance of each class.

    Raises:
        UsageError: an unknown flag or key (naming the nearest valid one), or a value of the wrong kind.
    """
    parser = _Parser(classes, prog="run_jepa.py", description=description, allow_abbrev=False)
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        # A pretrained start on the command line takes the place of a recipe's random one.
        pretrained = any(flag.split("=")[0].replace("-", "_") == "__model_name_or_path" for flag in argv[1:])
        argv = _read_yaml(argv[0], parser, _RANDOM_START if pretrained else ()) + argv[1:]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:  # from TrainingArguments
        raise UsageError(" ".join(str(error).split())) from None
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("-"):
            raise UsageError(f"{flag!r} follows no flag; a config file comes first, and a flag takes one value")
        raise UsageError(f"unknown {_unknown(flag, [f'--{name}' for name in _names(parser)], 'flag')}")
    return tuple(parsed)


def parse_flags(flags: dict[str, Any], classes: Sequence[type] = _CLASSES) -> tuple[Any, ...]:
    """The same from Python: names and values as they are.

    Raises:
        UsageError: an unknown name.
    """
    parser = _Parser(classes)
    valid = _names(parser)
    for name in flags:
        if name not in valid:
            raise UsageError(f"unknown {_unknown(name, valid, 'argument')}")
    return tuple(parser.parse_dict(flags))


def _names(parser: HfArgumentParser) -> list[str]:
    return [item.name for kind in parser.dataclass_types for item in fields(kind) if item.init]


def _unknown(name: str, valid: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_") if what != "flag" else name, valid, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists the valid ones"
    return f"{what} {name}{hint}"


# What a recipe says of an encoder with random weights.
_RANDOM_START = ("model_type", "config_name", "config_overrides")


def _yaml_content(path: str) -> dict[Any, Any]:
    if not Path(path).is_file():
        raise UsageError(f"config file {path!r} does not exist")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"config file {path!r} must hold lines of the form `key: value`")
    return content


def _read_yaml(path: str, parser: HfArgumentParser, leave_out: Sequence[str] = ()) -> list[str]:
    """The file as flags, so that its values are converted and checked as on the command line."""
    content = _yaml_content(path)
    valid = _names(parser)
    for key in content:
        if key not in valid:
            raise UsageError(f"config file {path!r} has the unknown {_unknown(str(key), valid, 'key')}")
    argv = []
    for key, value in content.items():
        if key in leave_out:
            continue
        if isinstance(value, list):
            if not _takes_list(key, parser.dataclass_types):
                raise UsageError(f"config file {path!r}: {key} takes one value, not the list {value}")
            argv += [f"--{key}", *map(str, value)]
        elif isinstance(value, bool):  # as YAML reads `save_strategy: no` too
            argv.append(f"--{key}={'yes' if value else 'no'}")
        elif value is not None:
            argv.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def _takes_list(name: str, classes: Sequence[type]) -> bool:
    hint = next(hints[name] for hints in map(get_type_hints, classes) if name in hints)
    return any(part is list or get_origin(part) is list for part in (hint, *get_args(hint)))


# Characters of a sentence on the terminal.
_LONGEST = 1000
# Seconds that other ranks wait: a launcher ends all ranks when one leaves, and the one that tells may be slower.
_PATIENCE = 10


def complain(command: str, error: Exception) -> int:
    """Print the sentence and return the exit code: 2 for bad input, 1 for a run that cannot go on.

    Of bad input all processes know the same, and one tells; a run may have ended for what one of them alone met.
    """
    sentence = str(error)
    if sentence.startswith("Caught UsageError in "):
        # A loader's worker sends its whole traceback as the message; the sentence is its end.
        sentence = sentence.rpartition("UsageError: ")[2]
    if isinstance(error, RunError) or os.environ.get("RANK", "0") == "0":
        print(f"{command}: error: {_in_one_line(sentence)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_PATIENCE)
    return 2 if isinstance(error, UsageError) else 1


def _in_one_line(sentence: str) -> str:
    """Names that files bring may hold anything, orders to the terminal too, and be of any length."""
    if len(sentence) > _LONGEST:
        sentence = f"{sentence[: _LONGEST // 2]} ... {sentence[-_LONGEST // 2 :]}"
    sentence = " ".join(sentence.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in sentence
    )


def quiet_libraries() -> None:
    """Their warnings would bury our sentence; what matters we say ourselves."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("jepa_hf").setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading and writing weights; training has its own
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # torch's, of a name of accelerate's
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # torch's, whose new name older ones lack
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")  # which is as it should be
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft's, of a name of transformers'
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if os.environ.get("WORLD_SIZE") else "true")
