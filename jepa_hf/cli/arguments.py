"""Flags and YAML keys, their names those of transformers' run_mlm.py wherever it has one, and how they are parsed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..data.arguments import DataArguments
from ..errors import UsageError
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
