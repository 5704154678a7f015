"""Trainer that fine-tunes causal language models with LLM-JEPA."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from ..errors import UsageError
from ..hub.loading import hidden_loading_bars
from ..hub.model_card import DatasetInfo
from ..models.argument_owners import owner_of_argument
from ..monitoring.view_health import term_weights
from ..training.base_trainer import BaseJepaTrainer
from ..training.callbacks import MovingAverageCallback
from ..training.checkpoints import is_staging_checkpoint
from ..training.console import ConsoleCallback
from ..training.inputs import check_collator, check_single_split, iterate_rows, resolve_arguments, without_pandas
from ..training.metric_accumulator import MetricAccumulator
from .data_collator import DataCollatorForPairedViews
from .decoder import get_decoder, has_lora
from .generation import evaluate_generation
from .lora import save_adapters
from .model_card import render_llm_card
from .model_setup import (
    check_model_init,
    default_view_tokenizer,
    load_start,
    prepare_language_model,
    refuse_names,
    set_stop_tokens,
)
from .objective import PairedViewObjective
from .row_tokenization import has_label, is_untokenized, tokenize_dataset
from .teacher import copy_decoder, load_teacher, match_teacher, save_teacher
from .training_args import LlmJepaTrainingArguments
from .view_isolation import verify_view_isolation
from .view_metrics import ViewMetrics
from .view_tokenizer import IGNORE_INDEX, PairedViewTokenizer

_OBJECTIVE_ARGUMENTS = ("lm_weight", "jepa_weight", "pair_loss", "target_gradient", "stp_weight", "stp_variant")
_VIEWS = ("view_input_ids", "view_position_ids", "view_ends", "second_view")


class LlmJepaTrainer(BaseJepaTrainer):
    """Train with a next-token loss and a distance between the views of each row (LLM-JEPA).

    The model stays a plain causal language model for `save_pretrained`, `generate`, PEFT and the Hub.

    Args:
        model: a causal language model, a `PeftModel` around one, or a directory or Hub name.
        args: `LlmJepaTrainingArguments`; default writes to `out`.
        data_collator: default `DataCollatorForPairedViews`.
        train_dataset: rows of `PairedViewTokenizer`, or rows that `view_tokenizer` tokenizes (see
            `conversations.read_conversation`), also as a DataFrame; those of a `datasets.IterableDataset` during
            iteration.
        eval_dataset: as `train_dataset`, or several by name.
        processing_class: the tokenizer; default that of `model` if `model` is a name.
        view_tokenizer: for rows that are not tokenized; default a `PairedViewTokenizer` with its defaults.
        peft_config: a configuration of peft, such as `LoraConfig`: its adapters are trained, and
            the predictor tokens' embeddings.
        generation_examples: rows whose prompts the model answers in each evaluation. The proportions of correct answers
            are logged as `eval_exact_match` and so on, and can be used for `metric_for_best_model`.
        generation_metrics: see `answer_scoring.get_scorer`.
        database: path for the metric "sql", see `answer_scoring.get_scorer`.
        max_new_tokens: maximum number of tokens of a generated answer.
        callbacks: additional callbacks.
        model_init: instead of `model`: returns a new one at the start of each training.
        **kwargs: of `Trainer`.

    Raises:
        UsageError: no tokenizer, a model that is not a causal language model, or rows that cannot be tokenized.
    """

    args: LlmJepaTrainingArguments
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    objective: PairedViewObjective
    batch_keys = ("input_ids", "labels", "view_input_ids")
    _is_constructed = False
    _owner_of = staticmethod(partial(owner_of_argument, llm=True))

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollatorForPairedViews | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        view_tokenizer: PairedViewTokenizer | None = None,
        peft_config: Any = None,
        generation_examples: Sequence[dict[str, Any]] | None = None,
        generation_metrics: Sequence[str] = ("exact_match", "prefix_match"),
        database: str | Path | None = None,
        max_new_tokens: int = 128,
        callbacks: Sequence[TrainerCallback] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        **kwargs: Any,
    ):
        args = resolve_arguments(args, LlmJepaTrainingArguments)
        self.args = args  # as in `JepaTrainer`
        check_model_init(model_init, args.target_gradient, peft_config)
        check_collator(data_collator, "DataCollatorForPairedViews")
        check_single_split(train_dataset)
        refuse_names(train_dataset=train_dataset, eval_dataset=eval_dataset)
        train_dataset, eval_dataset = without_pandas(train_dataset), without_pandas(eval_dataset)
        if processing_class is None and view_tokenizer is not None:
            processing_class = view_tokenizer.tokenizer
        start, processing_class = load_start(self.resolve_model(model, model_init), processing_class)
        if view_tokenizer is None and is_untokenized(train_dataset if train_dataset is not None else eval_dataset):
            view_tokenizer = default_view_tokenizer(start, processing_class)
        language_model = prepare_language_model(start, processing_class, view_tokenizer, peft_config)
        train_dataset = tokenize_dataset(train_dataset, view_tokenizer)
        if has_length(train_dataset):
            set_stop_tokens(language_model, processing_class, iterate_rows(train_dataset))
        if generation_examples and view_tokenizer is None:
            raise UsageError("generation_examples need a view_tokenizer, which renders their prompts.")
        if data_collator is None:
            data_collator = DataCollatorForPairedViews(processing_class, args.view_passes)
        teacher = copy_decoder(language_model) if args.target_gradient == "ema" else None
        self._teacher_callback = MovingAverageCallback(lambda state: args.ema_decay)
        self.objective = PairedViewObjective(
            temperature=args.infonce_temperature,
            teacher=teacher,
            **{name: getattr(args, name) for name in _OBJECTIVE_ARGUMENTS},
        )
        self._generation_batch_size = args.per_device_eval_batch_size
        if args.pair_loss == "infonce":
            self.evaluate_in_training_batches(args)
        self._view_metrics = ViewMetrics()
        self.view_tokenizer, self.generation_examples = view_tokenizer, generation_examples
        self.generation_metrics, self.database, self.max_new_tokens = generation_metrics, database, max_new_tokens
        super().__init__(
            model=language_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*([] if teacher is None else [self._teacher_callback]), *(callbacks or ())],
            model_init=model_init,
            **kwargs,
        )
        if teacher is not None and self.is_fsdp_enabled:
            raise UsageError(
                "target_gradient ema keeps an unsharded teacher on every rank, which cannot follow FSDP2's sharded "
                "parameters. Use stop or full, or configs/accelerate/ddp.yaml."
            )
        self.objective.attach(self.model)
        self._is_constructed = True
        self._views_verified = False
        if teacher is not None:
            teacher.to(args.device)
            self._teacher_callback.pairs = match_teacher(get_decoder(self.model), teacher)

    def prepare_model(self, model: Any) -> Any:
        """Give a later model of `model_init` the tokenizer's size and the objective."""
        if self._is_constructed:
            if len(self.processing_class) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(self.processing_class))
            self.objective.attach(model)
        return model

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: `Trainer` would store the result of a trial in `objective`."""
        raise UsageError("hyperparameter_search is not supported by LlmJepaTrainer. Build a trainer for each trial.")

    def check_training(self) -> None:
        """Like the base's, and check the model with `verify_view_isolation`."""
        super().check_training()
        self._attach()
        dataset: Any = self.train_dataset
        self._check(dataset)
        if self.args.lm_weight and has_length(dataset) and not any(map(has_label, iterate_rows(dataset))):
            raise UsageError("No training row has a label, so nothing would be learned. Pass rows with answers.")

    def evaluation_metrics(self) -> set[str]:
        """Return the names of the metrics of an evaluation."""
        names = {"loss", "lm_loss", "pair_loss", "view_cosine", "view_norm", "view_rank", "view_pairwise_cosine"}
        names |= {"view_top1_accuracy", "view_top1_accuracy_chance"}
        names |= {"stp_loss"} if self.args.stp_weight else set()
        return names | (set(self.generation_metrics) if self.generation_examples else set())

    def _attach(self) -> None:
        """Attach the objective again: another trainer may have attached its own to the model."""
        self.objective.attach(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _check(self, dataset: Any) -> None:
        """Check the model once with the first row, see `verify_view_isolation`."""
        if self._views_verified:
            return
        for row in islice(iterate_rows(dataset), 1):
            verify_view_isolation(self.model, self.data_collator, row)
            self._views_verified = True

    # ---- data

    def tokenize_rows(self, dataset: Any) -> Any:
        """Tokenize rows with the view tokenizer; return tokenized ones unchanged, a DataFrame as a data set."""
        return tokenize_dataset(without_pandas(dataset), self.view_tokenizer)

    # ---- one update

    def _drops_views_this_step(self) -> bool:
        """Draw loss dropout for this update from seed and step, so that all ranks agree."""
        alpha = self.args.loss_dropout
        if alpha in (0.0, 1.0):
            return alpha == 1.0
        generator = torch.Generator().manual_seed((self.args.seed << 32) + self.state.global_step)
        return torch.rand((), generator=generator).item() < alpha

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the numbers of labels and of rows of a micro-batch, `[2]`."""
        labels = inputs["labels"]
        rows = inputs["row_valid"].sum() if "row_valid" in inputs else labels.new_tensor(len(labels))
        return torch.stack([self.count_targets(inputs), rows])

    @staticmethod
    def mask_rows(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Mask labels and views of the rows where `own`, bool `[B]`, is False."""
        inputs["labels"] = inputs["labels"].masked_fill(~own[:, None], IGNORE_INDEX)
        inputs["row_valid"] = own

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Compute the base's loss, without views if loss dropout skips them in this update."""
        if model.training and self._drops_views_this_step():
            inputs = {name: value for name, value in inputs.items() if name not in _VIEWS}
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- metrics

    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of labels of a micro-batch, a scalar."""
        return (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()

    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        """Return the number of conversation tokens of a micro-batch, a scalar."""
        mask = inputs["attention_mask"]
        return mask.new_tensor(mask.numel()) if padding else mask.sum()

    def console_callback(self) -> ConsoleCallback:
        """Return the callback that shows losses, accuracies and tokens per second."""
        return ConsoleCallback(self.loss_weights, None, counts_tokens=True, verdict=self.verdict)

    def update_metrics(self, outputs: Any, inputs: dict[str, torch.Tensor], means: MetricAccumulator) -> None:
        """Add the parts of the loss of one micro-batch, a `PairedViewOutput`, to `means`."""
        means.add("lm_loss", outputs.lm_loss, outputs.num_labels)
        if outputs.router_loss is not None:
            means.add("router_loss", outputs.router_loss, outputs.num_labels)
        if outputs.stp_loss is not None:
            means.add("stp_loss", outputs.stp_loss, outputs.num_pairs)
        self._view_metrics.update(outputs, inputs.get("row_valid"), means, means is self._means["eval"])

    def finish_evaluation(self, means: MetricAccumulator) -> None:
        """Add the metrics of all pairs together, see `ViewMetrics.finish`."""
        self._view_metrics.finish(means)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each term of the loss by its name in the log; 0 for terms that are not trained."""
        return term_weights(vars(self.args))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the base; add the proportions of correct answers to `generation_examples`."""
        dataloader = args[0] if args else kwargs["dataloader"]
        self._attach()
        self._check(dataloader.dataset)
        output = super().evaluation_loop(*args, **kwargs, metric_key_prefix=metric_key_prefix)  # type: ignore[misc]
        weights = {**self.loss_weights, "pair_loss": self.args.jepa_weight, "router_loss": self.args.lm_weight}
        named = {f"{metric_key_prefix}_{name}": weight for name, weight in weights.items()}
        parts = [weight * output.metrics[name] for name, weight in named.items() if name in output.metrics]
        if parts:
            # Trainer's loss is a mean over rows, and depends on the batches, because rows differ in labels.
            output.metrics[f"{metric_key_prefix}_loss"] = sum(parts)
        if self.generation_examples:
            for metric, share in self._generation_shares(self.generation_examples).items():
                output.metrics[f"{metric_key_prefix}_{metric}"] = share
        return output

    def _generation_shares(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the proportion of correct answers by metric, over the rows of all ranks.

        Each rank answers a part of the rows. With sharded weights each answers all, because their passes must match.
        """
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            rows = rows[self.args.process_index :: self.args.world_size]
        shares, results = evaluate_generation(
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False),
            cast(PairedViewTokenizer, self.view_tokenizer),
            rows,
            self.generation_metrics,
            self.database,
            max_new_tokens=self.max_new_tokens,
            batch_size=self._generation_batch_size,
        )
        counts = torch.tensor([len(results) * share for share in (*shares.values(), 1.0)])
        *correct, total = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").tolist()
        return {metric: count / total for metric, count in zip(shares, correct, strict=True)}

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not is_staging_checkpoint(folder.name) or not has_lora(model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapters(model, self.processing_class, folder, state_dict, with_predictor=True)
        teacher = self.objective.teacher
        if teacher is not None and self.args.should_save and folder != Path(self.args.output_dir):
            save_teacher(teacher, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.objective.teacher is not None:
            load_teacher(self.objective.teacher, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.objective.teacher is not None:
            load_teacher(self.objective.teacher, cast(str, self.state.best_model_checkpoint))

    def render_card(self, name: str, data: DatasetInfo, language: str | None, license: str | None) -> ModelCard:
        """Render the card of the model that users will load as `name`."""
        return render_llm_card(self, name, data, language, license)

    def load_weights(self, checkpoint: str) -> nn.Module:
        """Load the model of a checkpoint, or the model of its LoRA weights."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not has_lora(model):
            return super().load_weights(checkpoint)
        from peft import AutoPeftModelForCausalLM  # only adapters need peft

        with hidden_loading_bars():
            return AutoPeftModelForCausalLM.from_pretrained(checkpoint)

    def export_final_model(self, model: Any, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write a plain causal language model, or its LoRA weights, with the tokenizer."""
        if has_lora(model):
            save_adapters(model, self.processing_class, output_dir, state_dict, with_predictor=False)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
