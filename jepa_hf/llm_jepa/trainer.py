"""Trainer that fine-tunes causal language models with LLM-JEPA."""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ..distributed.deepspeed_state import zero3_init_disabled
from ..errors import UsageError
from ..hub.model_card import DatasetInfo, describe_hardware, hub_repo_id_or_none
from ..monitoring.metrics import effective_rank, mean_pairwise_cosine, top1_accuracy
from ..training.base_trainer import BaseJepaTrainer
from ..training.metric_accumulator import MetricAccumulator
from ..training.stream_padding import PADDING_ROW_KEY
from ..utils.atomic_files import atomic_write
from ..version import __version__
from .data_collator import DataCollatorForPairedViews
from .generation import evaluate_generation
from .lora import save_lm_lora
from .model_card import objective_rows, render_llm_card, result_rows
from .objective import PairedViewObjective, get_decoder, has_lora, verify_view_isolation
from .teacher import TeacherCallback, copy_decoder, load_teacher, save_teacher
from .training_args import LlmJepaTrainingArguments
from .view_tokenizer import IGNORE_INDEX, MAX_PREDICTOR_TOKENS, PairedViewTokenizer, predictor_tokens

logger = logging.getLogger(__name__)

_VIEWS = ("view_input_ids", "view_position_ids", "view_ends", "second_view")
# Maximum number of rows for the view metrics of an evaluation.
_MAX_EVAL_VECTORS = 1024


def add_predictor_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Add the predictor's special tokens to tokenizer and model, if they are missing.

    Args:
        model: a causal language model; its embeddings are enlarged in place.
        tokenizer: its tokenizer, changed in place.
        count: k, 0 to 10.

    Raises:
        UsageError: another `count`.
    """
    if not 0 <= count <= MAX_PREDICTOR_TOKENS:
        raise UsageError(f"num_predictor_tokens must be between 0 and {MAX_PREDICTOR_TOKENS}, got {count}.")
    tokenizer.add_tokens(predictor_tokens(count), special_tokens=True)
    if len(tokenizer) > cast(nn.Embedding, model.get_input_embeddings()).num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


class LlmJepaTrainer(BaseJepaTrainer):
    """Train with a next-token loss and a distance between the views of each row (LLM-JEPA).

    The model stays a plain causal language model for `save_pretrained`, `generate`, PEFT and the
    Hub.

    Args:
        model: a causal language model, a `PeftModel` around one, or a directory or Hub name.
        args: `LlmJepaTrainingArguments`; default writes to `out`.
        data_collator: default `DataCollatorForPairedViews`.
        train_dataset: rows of `PairedViewTokenizer`, or rows with `messages` or with `text` and
            `code`, which `view_tokenizer` tokenizes; those of a `datasets.IterableDataset` during
            iteration.
        eval_dataset: as `train_dataset`, or several by name.
        processing_class: the tokenizer; default that of `model` if `model` is a name.
        view_tokenizer: for rows that are not tokenized; default a `PairedViewTokenizer` with its
            defaults.
        generation_examples: rows whose prompts the model answers in each evaluation. The proportions of
            correct answers are logged as `eval_exact_match` and so on, and can be used for
            `metric_for_best_model`.
        generation_metrics: see `answer_scoring.scorer`.
        database: path for the metric "sql", see `answer_scoring.scorer`.
        max_new_tokens: maximum number of tokens of a generated answer.
        callbacks: additional callbacks.
        **kwargs: of `Trainer`.

    Raises:
        UsageError: no tokenizer, a model that is not a causal language model, or rows that cannot
            be tokenized.
    """

    args: LlmJepaTrainingArguments
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    objective: PairedViewObjective

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: LlmJepaTrainingArguments | None = None,
        data_collator: DataCollatorForPairedViews | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        view_tokenizer: PairedViewTokenizer | None = None,
        generation_examples: Sequence[dict[str, Any]] | None = None,
        generation_metrics: Sequence[str] = ("exact_match", "prefix_match"),
        database: str | Path | None = None,
        max_new_tokens: int = 128,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else LlmJepaTrainingArguments()
        if isinstance(model, (str, Path)):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            with zero3_init_disabled():
                model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None and view_tokenizer is not None:
            processing_class = view_tokenizer.tokenizer
        processing_class = _checked_tokenizer(processing_class, model)
        if view_tokenizer is None and _is_untokenized(train_dataset if train_dataset is not None else eval_dataset):
            view_tokenizer = _default_view_tokenizer(model, processing_class)
        if generation_examples and view_tokenizer is None:
            raise UsageError("generation_examples need a view_tokenizer, which renders their prompts.")
        if data_collator is None:
            data_collator = DataCollatorForPairedViews(processing_class, args.view_passes)
        teacher = copy_decoder(model) if args.target_gradient == "ema" else None
        self._teacher_callback = TeacherCallback(args.ema_decay)
        self.objective = _make_objective(args, teacher)
        self._generation_batch_size = args.per_device_eval_batch_size
        if args.pair_loss == "infonce":
            self._evaluate_in_training_batches(args)
        self._embeddings: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.view_tokenizer, self.generation_examples = view_tokenizer, generation_examples
        self.generation_metrics, self.database, self.max_new_tokens = generation_metrics, database, max_new_tokens
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=tokenize_views(train_dataset, view_tokenizer),
            eval_dataset=tokenize_views(eval_dataset, view_tokenizer),
            processing_class=processing_class,
            callbacks=[*([] if teacher is None else [self._teacher_callback]), *(callbacks or ())],
            **kwargs,
        )
        if teacher is not None and self.is_fsdp_enabled:
            raise UsageError(
                "target_gradient ema keeps an unsharded teacher on every rank, which cannot follow FSDP2's sharded "
                "parameters. Use stop or full, or configs/accelerate/ddp.yaml."
            )
        self.objective.attach(self.model)
        self._views_verified = False
        if teacher is not None:
            teacher.to(args.device)
            self._teacher_callback.pair(get_decoder(self.model), teacher)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train`, after checking the model with `verify_view_isolation`."""
        self._attach()
        rows: Any = self.train_dataset or ()
        first = list(islice(rows, 1))
        if not first:
            raise UsageError("There are no rows to train on. Pass LlmJepaTrainer(train_dataset=...).")
        self._check(first)
        return super().train(*args, **kwargs)

    def _attach(self) -> None:
        """Attach the objective again: another trainer may have attached its own to the model."""
        self.objective.attach(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _check(self, rows: Iterable[dict[str, Any]]) -> None:
        """Check the model once with the first row, see `verify_view_isolation`."""
        if self._views_verified:
            return
        for row in islice(rows, 1):
            verify_view_isolation(self.model, self.data_collator, row)
            self._views_verified = True

    # ---- data

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the base's loader; accepts untokenized rows, as the constructor does."""
        return super().get_eval_dataloader(tokenize_views(eval_dataset, self.view_tokenizer))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return `Trainer`'s loader; accepts untokenized rows, as the constructor does."""
        return super().get_test_dataloader(tokenize_views(test_dataset, self.view_tokenizer))

    def _set_signature_columns_if_needed(self) -> None:
        columns: Any = [
            "input_ids", "labels", "stp_span", "text_input_ids", "text_end", "code_input_ids", "code_end",
            PADDING_ROW_KEY,
        ]  # fmt: skip
        self._signature_columns = columns

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

    def update_metrics(self, outputs: Any, inputs: dict[str, torch.Tensor], means: MetricAccumulator) -> None:
        """Add the parts of the loss of one micro-batch, a `PairedViewOutput`, to `means`."""
        means.add("lm_loss", outputs.lm_loss, outputs.num_labels)
        if outputs.stp_loss is not None:
            means.add("stp_loss", outputs.stp_loss, outputs.num_pairs)
        if outputs.predictions is None:
            return
        predictions, targets = outputs.predictions.detach().float(), outputs.targets.detach().float()
        weights = inputs["row_valid"].float() if "row_valid" in inputs else predictions.new_ones(len(predictions))
        weights = weights / weights.sum().clamp_min(1)
        cosines = F.cosine_similarity(predictions, targets, dim=-1)
        means.add("pair_loss", outputs.pair_loss, outputs.num_pairs)
        means.add("view_cosine", (cosines * weights).sum(), outputs.num_pairs)
        means.add("view_norm", (targets.norm(dim=-1) * weights).sum(), outputs.num_pairs)
        if means is self._means["eval"] and sum(len(views) for views, _ in self._embeddings) < _MAX_EVAL_VECTORS:
            self._embeddings.append((predictions, targets))

    def finish_evaluation(self, means: MetricAccumulator) -> None:
        """Add view-collapse metrics. No single one is sufficient, nor is the distance.

        `view_rank` detects second views in few dimensions, `view_pairwise_cosine` those in one
        direction. `view_top1_accuracy` is the top-1 accuracy of retrieving a row's second view by its
        first, among the rows of this rank. The second views' mean is subtracted from both.
        """
        embeddings, self._embeddings = self._embeddings, []
        if sum(len(targets) for _, targets in embeddings) > 1:
            predictions, targets = (torch.cat(views)[:_MAX_EVAL_VECTORS] for views in zip(*embeddings, strict=True))
            one = targets.new_ones(())
            means.add("view_rank", effective_rank(targets), one)
            means.add("view_pairwise_cosine", mean_pairwise_cosine(targets), one)
            means.add("view_top1_accuracy", top1_accuracy(predictions, targets), one)
            means.add("view_top1_accuracy_chance", one / len(targets), one)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the base; add the proportions of correct answers to `generation_examples`."""
        dataloader = args[0] if args else kwargs["dataloader"]
        self._attach()
        self._check(dataloader.dataset)
        output = super().evaluation_loop(*args, **kwargs, metric_key_prefix=metric_key_prefix)  # type: ignore[misc]
        parts = _weighted_losses(self.args, output.metrics, metric_key_prefix)
        if parts:
            # Trainer's loss is a mean over rows, and depends on the batches, because rows differ in
            # labels.
            output.metrics[f"{metric_key_prefix}_loss"] = sum(parts)
        if self.generation_examples:
            for metric, share in self._generation_shares(self.generation_examples).items():
                output.metrics[f"{metric_key_prefix}_{metric}"] = share
        return output

    def _generation_shares(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the proportion of correct answers by metric, over the rows of all ranks.

        Each rank answers a part of the rows. With sharded weights each answers all, because their
        passes must match.
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
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
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

    def create_model_card(  # type: ignore[override]  # **kwargs holds Trainer's arguments
        self, model_name: str | None = None, data: DatasetInfo | None = None, **kwargs: Any
    ) -> None:
        """Write `README.md`, with the arguments of `HubTrainer.create_model_card`."""
        if not self.is_world_process_zero():
            return
        args = self.args
        folder = Path(args.output_dir).absolute().name
        data, datasets_on_hub = data or DatasetInfo(), kwargs.get("dataset") or []
        data.datasets += [datasets_on_hub] if isinstance(datasets_on_hub, str) else datasets_on_hub
        config: Any = self.model.config
        card = render_llm_card(
            self.hub_model_id or args.hub_model_id or model_name or folder,
            __version__,
            self._card_settings(),
            result_rows(self.state.log_history, self.generation_metrics),
            data,
            cites_stp=bool(args.stp_weight),
            with_template=self.processing_class.chat_template is not None,
            base_model=hub_repo_id_or_none(config.name_or_path),
            language=kwargs.get("language"),
            license=kwargs.get("license"),
        )
        with atomic_write(Path(args.output_dir) / "README.md") as file:
            card.save(file)

    def _card_settings(self) -> dict[str, Any]:
        """Return the rows of the card's training table."""
        args = self.args
        return {
            "steps": self.state.global_step,
            "adapters": "LoRA" if has_lora(self.model) else None,
            "rows per step": self.get_total_train_batch_size(args),
            **objective_rows(args, self.view_tokenizer),
            "hardware": describe_hardware(args.device, args.world_size),
            "seed": args.seed,
        }

    def load_weights(self, checkpoint: str) -> nn.Module:
        """Load the model of a checkpoint, or the model of its LoRA weights."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not has_lora(model):
            return super().load_weights(checkpoint)
        from peft import AutoPeftModelForCausalLM  # only adapters need peft

        return AutoPeftModelForCausalLM.from_pretrained(checkpoint)

    def export_final_model(self, model: Any, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write a plain causal language model, or its LoRA weights, with the tokenizer."""
        if has_lora(model):
            save_lm_lora(model, self.processing_class, output_dir, state_dict)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)


def _weighted_losses(args: LlmJepaTrainingArguments, metrics: dict[str, float], prefix: str) -> list[float]:
    """Return the parts of the loss that an evaluation measured, times their weights."""
    weights = {"lm": args.lm_weight, "pair": args.jepa_weight, "tube": args.stp_weight}
    names = {f"{prefix}_{part}_loss": weight for part, weight in weights.items()}
    return [weight * metrics[name] for name, weight in names.items() if name in metrics]


def _make_objective(args: LlmJepaTrainingArguments, teacher: nn.Module | None) -> PairedViewObjective:
    return PairedViewObjective(
        lm_weight=args.lm_weight,
        jepa_weight=args.jepa_weight,
        pair_loss=args.pair_loss,
        temperature=args.infonce_temperature,
        target_gradient=args.target_gradient,
        teacher=teacher,
        stp_weight=args.stp_weight,
        stp_variant=args.stp_variant,
    )


def _checked_tokenizer(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a padding token.

    Raises:
        UsageError: there is no tokenizer, or the model is not a causal language model.
    """
    if tokenizer is None:
        raise UsageError("LlmJepaTrainer needs the model's tokenizer (processing_class=...).")
    if not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} is not a causal language model. LLM-JEPA adds to next-token prediction; use "
            "JepaTrainer for encoders."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _default_view_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairedViewTokenizer:
    """Return a view tokenizer with one predictor token, which is added to tokenizer and model."""
    if has_lora(model) and predictor_tokens(1)[0] not in tokenizer.get_added_vocab():
        # Its embedding would not be trained, and the adapters would not load into a model with
        # fewer embeddings.
        raise UsageError(
            "The model has adapters but no predictor token: call add_predictor_tokens(model, tokenizer, 1) before "
            "add_lora(model, tokenizer, settings, 1)."
        )
    add_predictor_tokens(model, tokenizer, 1)
    return PairedViewTokenizer(tokenizer)


def _is_untokenized(dataset: Any) -> bool:
    if isinstance(dataset, dict):
        return any(map(_is_untokenized, dataset.values()))
    if dataset is None or isinstance(dataset, str):
        return False
    first = next(iter(dataset), None)
    return first is not None and "labels" not in first


def tokenize_views(dataset: Any, view_tokenizer: PairedViewTokenizer | None) -> Any:
    """Tokenize rows, and log how many were truncated. Tokenized rows are returned unchanged.

    Rows of a stream are tokenized during iteration, without the count.

    Args:
        dataset: rows; or several data sets, by name; or the name of one.
        view_tokenizer: tokenizes the rows.

    Raises:
        UsageError: rows that are not tokenized, without a `view_tokenizer`.
    """
    if not _is_untokenized(dataset):
        return dataset
    if isinstance(dataset, dict):
        return {name: tokenize_views(part, view_tokenizer) for name, part in dataset.items()}
    if view_tokenizer is None:
        raise UsageError("Expected tokenized rows, got rows of text. Pass view_tokenizer=... to tokenize them.")
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(view_tokenizer, with_indices=True, remove_columns=dataset.column_names)
    rows = [view_tokenizer(row, number) for number, row in enumerate(dataset)]
    warn_truncated(rows, view_tokenizer.max_length)
    return rows


def warn_truncated(rows: Sequence[dict[str, Any]], max_length: int) -> None:
    """Warn with the number of truncated rows of `PairedViewTokenizer`, if there are any."""
    truncated = sum(row["truncated"] for row in rows)
    if truncated:
        logger.warning("%d of %d rows were truncated to %d tokens", truncated, len(rows), max_length)
