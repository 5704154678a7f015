"""Arguments of a run with `--objective llm`: its flags and YAML keys."""

from dataclasses import dataclass, field

from ..data.arguments import check_at_least_one
from ..errors import UsageError
from ..llm_jepa import LlmJepaTrainingArguments
from ..llm_jepa.paired_data import PairedDataArguments
from ..llm_jepa.view_tokenizer import check_view_settings
from ..utils.flags import MayChange, flag
from .arguments import BaseModelArguments, CommandArguments


@dataclass
class LlmModelArguments(BaseModelArguments):
    """Language model and chat template."""

    model_name_or_path: str | None = flag(None, "Causal language model to start from: a directory or Hub name.")
    model_type: str | None = flag(None, "For a random start: llama, gpt2, qwen3 or any other causal language model.")
    chat_template_path: str | None = flag(None, "File with a Jinja chat template (default: the tokenizer's).")


@dataclass
class ViewArguments:
    """Division of a row into two views: the arguments of `PairedViewTokenizer`."""

    max_seq_length: int | None = flag(
        None, "Maximum tokens of a row and of a view (default: the model's maximum, at most 512)."
    )
    filter_overlong_rows: bool = flag(
        False, "Leave out rows longer than max_seq_length, instead of truncating or refusing them."
    )
    text_turn: int = flag(-2, "Index of the message that is the first view; -2: the one before the last answer.")
    code_turn: int = flag(-1, "Index of the message that is the second view; -1: the last answer.")
    num_predictor_tokens: int = flag(
        1, "Number of predictor tokens (k), 0 to 10; 0: the last token of the text predicts."
    )
    predictor_position: str = flag("end", "Position of the predictor tokens in the first view: end or start.")
    reverse: bool = flag(False, "The second view predicts the first.")
    pad_to_multiple_of: int | None = flag(None, "Pad to a multiple of this number of tokens.")
    train_on_prompt: bool = flag(
        False, "Next-token loss on prompts too, and not on the stop token, as in the paper's script."
    )

    def __post_init__(self) -> None:
        check_view_settings(self.num_predictor_tokens, self.predictor_position, self.max_seq_length)
        check_at_least_one(self, "pad_to_multiple_of")


@dataclass
class GenerationArguments:
    """Generation at each evaluation."""

    generation_samples: MayChange[int] = flag(0, "Number of rows to answer and score at each evaluation.")
    generation_metrics: MayChange[list[str]] = field(
        default_factory=lambda: ["exact_match", "prefix_match"],
        metadata={"help": "Scores of answers: exact_match, prefix_match, gsm8k (final number), sql (result rows)."},
    )
    max_new_tokens: MayChange[int] = flag(128, "Maximum tokens of an answer.")
    database: MayChange[str | None] = flag(None, "For the score sql: an SQLite file, or a folder of NAME/NAME.sqlite.")

    def __post_init__(self) -> None:
        if self.generation_samples < 0:
            raise UsageError(f"generation_samples must be at least 0, not {self.generation_samples}.")
        check_at_least_one(self, "max_new_tokens")


@dataclass
class LlmRunArguments(CommandArguments, LlmJepaTrainingArguments):  # type: ignore[misc]  # as in `RunArguments`
    """`LlmJepaTrainingArguments` and `CommandArguments`."""


LlmParsed = tuple[LlmModelArguments, PairedDataArguments, ViewArguments, GenerationArguments, LlmRunArguments]
# Dataclasses whose fields are the flags.
LLM_CLASSES = (LlmModelArguments, PairedDataArguments, ViewArguments, GenerationArguments, LlmRunArguments)
