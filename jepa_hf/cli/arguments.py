"""Arguments of a training run: flags and YAML keys, named as in transformers' run_mlm.py where it has them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

from ..data.arguments import DataArguments
from ..errors import UsageError
from ..masking.base_collator import check_mask_settings
from ..masking.block_sampling import check_block_settings
from ..masking.span_sampling import check_span_settings
from ..models.jepa_config_checks import check_settings
from ..models.lora import check_lora_numbers
from ..training.training_args import JepaTrainingArguments
from ..utils.flags import MayChange, flag


@dataclass
class BaseModelArguments:
    """The model that a run starts from, for every objective."""

    # Set on an instance if the model was passed from Python, and so saved to a temporary `model_name_or_path`: the
    # directory or Hub name from which it was loaded, if any.
    passed_model: ClassVar[str | None] = None

    objective: MayChange[str | None] = flag(
        None,
        "span (text), images, features, or llm (LLM-JEPA, with its own flags: --objective llm --help); "
        "default: that of the model or the data.",
    )
    model_name_or_path: str | None = flag(
        None, "Pretrained start: directory or Hub name of an encoder, an MLM checkpoint or a JEPA."
    )
    model_type: str | None = flag(
        None,
        "For a random start: bert, distilbert, roberta, electra, deberta-v2, modernbert; ijepa, vit, "
        "dinov2; feature_encoder.",
    )
    config_name: str | None = flag(None, "For a random start: directory or Hub name of a configuration.")
    config_overrides: str | None = flag(
        None, "For a random start: changes to the configuration, e.g. hidden_size=128,num_hidden_layers=4."
    )
    tokenizer_name: str | None = flag(None, "Tokenizer (default: the model's).")
    tokenizer_vocab_size: int = flag(8192, "Vocabulary size of the tokenizer that is trained for a random start.")
    model_revision: str = flag("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = flag(False, "Run code that comes with the model.")
    dtype: str = flag("float32", "Data type of the weights; --bf16 computes in bfloat16 whatever it is.")
    attn_implementation: str | None = flag(None, "Attention implementation: sdpa, eager, ...")
    smoke_test: MayChange[bool] = flag(False, "Train a tiny random model on the built-in corpus for 20 steps.")
    use_peft: bool = flag(False, "Train LoRA adapters; the weights of the model stay frozen.")
    lora_r: int = flag(16, "Rank of the LoRA adapters.")
    lora_alpha: int = flag(32, "Scale of the LoRA adapters, times their rank.")
    lora_dropout: float = flag(0.05, "Dropout on the LoRA inputs.")
    lora_target_modules: list[str] | None = flag(
        None, "Suffixes of the modules that get an adapter (default: all linear layers)."
    )

    def __post_init__(self) -> None:
        if self.tokenizer_vocab_size < 1:
            raise UsageError(f"tokenizer_vocab_size must be at least 1, not {self.tokenizer_vocab_size}. Raise it.")
        check_lora_numbers(self.lora_r, self.lora_dropout)

    def lora_settings(self) -> dict[str, Any] | None:
        """Return the arguments of peft's `LoraConfig`; None without --use_peft."""
        if not self.use_peft:
            return None
        settings: dict[str, Any] = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        if self.lora_target_modules is not None:
            settings["target_modules"] = self.lora_target_modules
        return settings


@dataclass
class ModelArguments(BaseModelArguments):
    """The encoder, and the JEPA around it."""

    image_processor_name: str | None = flag(None, "Image processor (default: the model's).")
    add_tokens: str | None = flag(None, "Text file of tokens to add to the tokenizer, one per line.")
    resize_token_embeddings: bool = flag(
        False,
        "Accept a tokenizer that is not the pretrained model's, and enlarge the embeddings to its size. "
        "Tokens that the model does not have start from random embeddings, tokens of other numbers from wrong ones.",
    )
    # From here on arguments of JepaConfig; None means its default.
    masked_tokens: str | None = flag(
        None,
        "Masked positions: mask_token keeps them as [MASK] tokens (default for text with a pretrained start), "
        "drop leaves them out.",
    )
    predictor_type: str | None = flag(
        None, "Predictor: transformer, or mlp (default for text with a pretrained start), which reads [MASK] tokens."
    )
    pred_hidden_size: int | None = flag(None, "Width of the transformer predictor.")
    pred_num_hidden_layers: int | None = flag(None, "Number of layers of the transformer predictor.")
    pred_num_attention_heads: int | None = flag(None, "Number of attention heads of the transformer predictor.")
    pred_mlp_ratio: float | None = flag(None, "Hidden width of the predictor's MLPs, as a multiple of their input.")
    pred_dropout: float | None = flag(None, "Dropout in the predictor.")
    pred_init: str | None = flag(
        None,
        "Initialization of the transformer predictor: unit_gain, or small (std 0.02; default for encoders "
        "with absolute positions).",
    )
    loss: str | None = flag(None, "Prediction loss: smooth_l1, l2, l1 or cosine.")
    smooth_l1_beta: float | None = flag(None, "Error at which smooth L1 turns from quadratic to linear.")
    average_top_k_layers: int | None = flag(None, "Number of top layers that the targets average.")
    target_norm: str | None = flag(None, "Normalization of the targets: layer, instance or none.")
    prediction_weight: float | None = flag(None, "Weight of the prediction loss; 0 trains on the other terms only.")
    mlm_weight: float | None = flag(None, "Weight of the masked-language-model loss.")
    variance_weight: float | None = flag(None, "Weight of VICReg's variance loss.")
    covariance_weight: float | None = flag(None, "Weight of VICReg's covariance loss.")
    sigreg_weight: float | None = flag(None, "Weight of LeJEPA's SIGReg loss.")
    contrastive_weight: float | None = flag(
        None, "Weight of the contrastive loss between samples (default: 1 for text, else 0)."
    )
    contrastive_temperature: float | None = flag(
        None, "Temperature of the contrastive loss (default: 0.1; text with a pretrained start: 0.05)."
    )
    contrastive_predictor: str | None = flag(
        None,
        "Predictor of the contrastive loss: mlp, or none (default for text with a pretrained start), which "
        "compares the exported vectors.",
    )
    pool_targets: bool | None = flag(None, "Predict the mean of a mask's targets instead of each target.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.jepa_kwargs())

    def jepa_kwargs(self) -> dict[str, Any]:
        """Return the arguments of `JepaConfig` that are set."""
        names = [item.name for item in fields(self)]
        values = {name: getattr(self, name) for name in names[names.index("masked_tokens") :]}
        values["lora"] = self.lora_settings()
        return {name: value for name, value in values.items() if value is not None}


# Ranges of areas, as fractions of an image.
_AREAS = ("target_scale", "context_scale", "random_resized_crop")


@dataclass
class MaskArguments:
    """Masks: the collators' arguments; None means their default."""

    mask_ratio: float | None = flag(None, "Fraction of tokens, time steps or feature patches to mask (default: 0.3).")
    mean_span_length: float | None = flag(
        None, "Mean length of a masked span (default: 5 tokens or time steps, 1 feature patch)."
    )
    whole_word: bool = flag(False, "Mask complete words; spans then count words.")
    num_masks: int | None = flag(None, "Masks per sample, which share one target pass (default: 1; images: 4 blocks).")
    on_too_short: str | None = flag(
        None, "Rows with fewer than two maskable positions: skip and count them (default), or error."
    )
    target_scale: list[float] | None = flag(
        None, "Images: range of a target block's area as a fraction of the image (default: 0.15 0.2)."
    )
    target_aspect_ratio: list[float] | None = flag(
        None, "Images: range of a target block's height / width (default: 0.75 1.5)."
    )
    context_scale: list[float] | None = flag(
        None, "Images: range of the context block's area before targets are removed (default: 0.85 1.0)."
    )
    keep_blocks_inside: bool = flag(
        False, "Images: keep target blocks inside the image; edges are then masked less often."
    )
    random_resized_crop: list[float] | None = flag(None, "Images: range of the area of a random crop, e.g. 0.4 1.0.")
    random_flip: bool = flag(False, "Images: flip half of the images horizontally.")

    def __post_init__(self) -> None:
        for name in (*_AREAS, "target_aspect_ratio"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (list, tuple)) or len(value) != 2):
                raise UsageError(f"{name} takes two numbers, minimum and maximum, not {value}. Give both.")
        check_span_settings(self.mask_ratio, self.mean_span_length)
        check_mask_settings(self.num_masks, self.on_too_short)
        ranges: dict[str, Any] = {name: getattr(self, name) for name in _AREAS if getattr(self, name) is not None}
        check_block_settings(ranges, cast(tuple[float, float] | None, self.target_aspect_ratio))

    def given_for(self, objective: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the arguments that are set; refuse those that the objective does not use."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values = {name: value for name, value in values.items() if value is not None and value is not False}
        for name in values:
            if name not in names:
                raise UsageError(
                    f"{name} is not for the objective {objective}, which takes {', '.join(names)}. Omit it."
                )
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@dataclass
class CommandArguments:
    """Arguments of a run that a `Trainer` does not have, for every objective."""

    overwrite_output_dir: MayChange[bool] = flag(False, "Start over, deleting what an earlier run wrote to output_dir.")
    do_train: MayChange[bool | None] = flag(
        None, "Train. Default: unless --do_eval alone is given, which only evaluates."
    )


@dataclass
class RunArguments(CommandArguments, JepaTrainingArguments):  # type: ignore[misc]  # do_train may be None
    """`JepaTrainingArguments` and `CommandArguments`."""


Parsed = tuple[ModelArguments, DataArguments, MaskArguments, RunArguments]
