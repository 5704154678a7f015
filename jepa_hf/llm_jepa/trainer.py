"""`LlmJepaTrainer`: fine-tunes a causal language model with LLM-JEPA's two views."""

import copy
import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ..distributed.deepspeed_state import whole_weights
from ..errors import UsageError
from ..hub.model_card import DataNames, hardware, hub_name
from ..monitoring.metrics import effective_rank, hit_rate, mean_pairwise_cosine
from ..training.base_trainer import RepresentationTrainer
from ..training.ema import match_parameters, update_target
from ..training.metric_accumulator import RunningMeans
from ..training.stream_padding import REPEATED
from ..utils.atomic_files import whole_file
from ..version import __version__
from .data_collator import DataCollatorForPairedViews
from .generation import judge
from .lora import save_adapters
from .model_card import render_card
from .objective import PairedViewObjective, PairedViewOutput, check_model, decoder_of, has_adapters
from .training_args import LlmJepaTrainingArguments
from .view_tokenizer import IGNORED, MOST_PREDICTOR_TOKENS, PairedViewTokenizer, predictor_tokens

logger = logging.getLogger(__name__)

TEACHER_FILE = "teacher.safetensors"
_VIEWS = ("view_input_ids", "view_position_ids", "view_ends", "second_view")
# Rows whose views tell of their health.
_SAMPLE = 1024


def add_predictor_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Teach tokenizer and model the tokens that stand for the predictor, where they do not know them yet.

    Args:
        count: k, 0 to 10.
    """
    if not 0 <= count <= MOST_PREDICTOR_TOKENS:
        raise UsageError(f"num_predictor_tokens must lie between 0 and {MOST_PREDICTOR_TOKENS}, not {count}")
    tokenizer.add_tokens(predictor_tokens(count), special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


class TeacherCallback(TrainerCallback):
    """Moves the teacher once per real optimizer step: its weights are an average of the model's."""

    def __init__(self, decay: float):
        self.decay = decay
        self.pairs: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    def pair(self, decoder: nn.Module, teacher: nn.Module) -> None:
        """Say which weights are averaged where: all that are trained."""
        trained = {name for name, value in decoder.named_parameters() if value.requires_grad}
        self.pairs = match_parameters(
            *(((n, p) for n, p in part.named_parameters() if n in trained) for part in (decoder, teacher))
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not kwargs["optimizer"].step_was_skipped:
            update_target(*self.pairs, self.decay)


class LlmJepaTrainer(RepresentationTrainer):
    """Next-token loss on the answers, and a distance between the representations of two views of the same row.

    The model stays a plain causal language model: `save_pretrained`, `generate`, PEFT and the Hub work as ever.

    Args:
        model: a causal language model, a `PeftModel` around one, or a directory or Hub name.
        args: `LlmJepaTrainingArguments`; default writes to `out`.
        data_collator: default `DataCollatorForPairedViews`.
        train_dataset, eval_dataset: rows of `PairedViewTokenizer`, or rows with `messages`, or with `text` and `code`,
            which `view_tokenizer` reads, those of a `datasets.IterableDataset` on the way.
        processing_class: the tokenizer; default the one beside `model`, where that is a name.
        view_tokenizer: default a `PairedViewTokenizer` with its defaults, for rows that are not tokenised.
        generation_rows: rows with messages or columns whose prompts the model answers at each evaluation; the shares
            that are right become `eval_exact_match` and so on, fit for `metric_for_best_model`.
        generation_metrics: see `generation.scorer`.
        database: of the metric "sql", see `generation.scorer`.
        max_new_tokens: most tokens of such an answer.
        callbacks: more callbacks.
        kwargs: as `Trainer` takes them.

    Raises:
        UsageError: no tokenizer, a model that is no causal language model, or rows that cannot be read.
    """

    args: LlmJepaTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: LlmJepaTrainingArguments | None = None,
        data_collator: DataCollatorForPairedViews | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        view_tokenizer: PairedViewTokenizer | None = None,
        generation_rows: Sequence[dict[str, Any]] | None = None,
        generation_metrics: Sequence[str] = ("exact_match", "prefix_match"),
        database: str | Path | None = None,
        max_new_tokens: int = 128,
        callbacks: Sequence[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else LlmJepaTrainingArguments()
        if isinstance(model, (str, Path)):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            with whole_weights():
                model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None and view_tokenizer is not None:
            processing_class = view_tokenizer.tokenizer
        if processing_class is None:
            raise UsageError("LlmJepaTrainer needs the model's tokenizer (processing_class=...)")
        if not model.can_generate():
            raise UsageError(
                f"{type(model).__name__} is no causal language model: LLM-JEPA adds to next-token prediction; for "
                "encoders there is JepaTrainer"
            )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if view_tokenizer is None and _is_raw(train_dataset if train_dataset is not None else eval_dataset):
            if has_adapters(model) and predictor_tokens(1)[0] not in processing_class.get_added_vocab():
                # Its embedding would not be trained, and adapters beside a larger embedding would not load.
                raise UsageError(
                    "the model has adapters and does not know the predictor token: call add_predictor_tokens(model, "
                    "tokenizer, 1) before add_adapters(model, tokenizer, settings, 1)"
                )
            add_predictor_tokens(model, processing_class, 1)
            view_tokenizer = PairedViewTokenizer(processing_class)
        if generation_rows and view_tokenizer is None:
            raise UsageError("generation_rows need to know how prompts are written (view_tokenizer=...)")
        if data_collator is None:
            data_collator = DataCollatorForPairedViews(processing_class, args.view_passes)
        teacher = None
        callbacks = list(callbacks or ())
        if args.target_gradient == "ema":
            teacher = copy.deepcopy(decoder_of(model)).eval().requires_grad_(False)
            teacher._forward_hooks.clear()  # of an objective that was attached before, and copied with its model
            self._teacher_callback = TeacherCallback(args.ema_decay)
            callbacks.insert(0, self._teacher_callback)
        self.objective = PairedViewObjective(
            lm_weight=args.lm_weight,
            pair_weight=args.pair_weight,
            pair_loss=args.pair_loss,
            temperature=args.infonce_temperature,
            target_gradient=args.target_gradient,
            teacher=teacher,
            tube_weight=args.tube_weight,
            tube_form=args.tube_form,
        )
        self._generation_batch_size = args.per_device_eval_batch_size
        if args.pair_loss == "infonce":
            self._evaluate_in_training_batches(args)
        self._embeddings: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.view_tokenizer, self.generation_rows = view_tokenizer, generation_rows
        self.generation_metrics, self.database, self.max_new_tokens = generation_metrics, database, max_new_tokens
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=read_rows(train_dataset, view_tokenizer),
            eval_dataset=read_rows(eval_dataset, view_tokenizer),
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        if teacher is not None and self.is_fsdp_enabled:
            raise UsageError(
                "target_gradient ema keeps a whole teacher on every rank, which the shards of FSDP2 do not move: take "
                "stop or full, or configs/accelerate/ddp.yaml"
            )
        self.objective.attach(self.model)
        self._checked = False
        if teacher is not None:
            teacher.to(args.device)
            self._teacher_callback.pair(decoder_of(self.model), teacher)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and resume, as `Trainer` does, if the model can tell the views apart (see `check_model`)."""
        self._attach()
        first = list(islice(self.train_dataset or (), 1))
        if not first:
            raise UsageError("there are no rows to train on: LlmJepaTrainer(train_dataset=...)")
        self._check(first)
        return super().train(*args, **kwargs)

    def _attach(self) -> None:
        """Have the model compute this trainer's objective, though another one was made for the same model since."""
        self.objective.attach(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _check(self, rows: Iterable[dict[str, Any]]) -> None:
        """Once, by the first of them, see `check_model`."""
        if self._checked:
            return
        for row in islice(rows, 1):
            check_model(self.model, self.data_collator, row)
            self._checked = True

    # ---- data

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the base's, of rows as the constructor takes them."""
        return super().get_eval_dataloader(read_rows(eval_dataset, self.view_tokenizer))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `Trainer`'s, of rows as the constructor takes them."""
        return super().get_test_dataloader(read_rows(test_dataset, self.view_tokenizer))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "input_ids", "labels", "content", "text_input_ids", "text_end", "code_input_ids", "code_end", REPEATED,
        ]  # fmt: skip

    # ---- one update

    def _leaves_views_out(self) -> bool:
        """Whether this update is one of loss dropout's: a pure function of seed and step, the same on every rank."""
        alpha = self.args.loss_dropout
        if alpha in (0.0, 1.0):
            return alpha == 1.0
        draw = torch.Generator().manual_seed((self.args.seed << 32) + self.state.global_step)
        return torch.rand((), generator=draw).item() < alpha

    def count_items(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[2]`: labels and rows."""
        labels = inputs["labels"]
        rows = inputs["row_valid"].sum() if "row_valid" in inputs else labels.new_tensor(len(labels))
        return torch.stack([self.count_targets(inputs), rows])

    @staticmethod
    def leave_out(inputs: dict[str, torch.Tensor], own: torch.Tensor) -> None:
        """Neither answers nor views of these rows count."""
        inputs["labels"] = inputs["labels"].masked_fill(~own[:, None], IGNORED)
        inputs["row_valid"] = own

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the base's; an update that loss dropout draws leaves the views out."""
        if model.training and self._leaves_views_out():
            inputs = {name: value for name, value in inputs.items() if name not in _VIEWS}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # ---- what is logged

    def count_targets(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["labels"][:, 1:] != IGNORED).sum()

    def count_tokens(self, inputs: dict[str, torch.Tensor], padding: bool = False) -> torch.Tensor:
        mask = inputs["attention_mask"]
        return mask.new_tensor(mask.numel()) if padding else mask.sum()

    def track(self, outputs: PairedViewOutput, inputs: dict[str, torch.Tensor], means: RunningMeans) -> None:
        means.add("lm_loss", outputs.lm_loss, outputs.num_labels)
        if outputs.tube_loss is not None:
            means.add("tube_loss", outputs.tube_loss, outputs.num_pairs)
        if outputs.predictions is not None:
            predictions, targets = outputs.predictions.detach().float(), outputs.targets.detach().float()
            share = inputs["row_valid"].float() if "row_valid" in inputs else predictions.new_ones(len(predictions))
            share = share / share.sum().clamp_min(1)
            means.add("pair_loss", outputs.pair_loss, outputs.num_pairs)
            means.add(
                "view_cosine", (F.cosine_similarity(predictions, targets, dim=-1) * share).sum(), outputs.num_pairs
            )
            means.add("view_norm", (targets.norm(dim=-1) * share).sum(), outputs.num_pairs)
            if means is self._means["eval"] and sum(len(seen) for seen, _ in self._embeddings) < _SAMPLE:
                self._embeddings.append((predictions, targets))

    def finish_evaluation(self, means: RunningMeans) -> None:
        """Health of the views, of which neither the distance alone nor one figure alone tells a collapse.

        `view_rank` and `view_pairwise_cosine` of the second views see few directions, and a single one. `view_hit_rate`
        is the share of rows whose first view is nearest to its own second view among those of all rows of this rank,
        once the second views' mean is taken away from all.
        """
        found, self._embeddings = self._embeddings, []
        if found and sum(len(targets) for _, targets in found) > 1:
            predictions, targets = (torch.cat(views)[:_SAMPLE] for views in zip(*found, strict=True))
            one = targets.new_ones(())
            means.add("view_rank", effective_rank(targets), one)
            means.add("view_pairwise_cosine", mean_pairwise_cosine(targets), one)
            means.add("view_hit_rate", hit_rate(predictions, targets), one)
            means.add("view_hit_rate_chance", one / len(targets), one)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Adds the share of right answers, where there are rows to generate for.

        Every rank does its part of them; all of them where weights are divided among ranks, which then have to make the
        same passes.
        """
        self._attach()
        self._check(dataloader.dataset)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        weights = {"lm": self.args.lm_weight, "pair": self.args.pair_weight, "tube": self.args.tube_weight}
        names = {f"{metric_key_prefix}_{part}_loss": weight for part, weight in weights.items()}
        parts = [weight * output.metrics[name] for name, weight in names.items() if name in output.metrics]
        if parts:
            # Trainer's own is a mean over rows, and so depends on which rows share a batch: labels are not rows.
            output.metrics[f"{metric_key_prefix}_loss"] = sum(parts)
        if self.generation_rows:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            mine = self.generation_rows
            if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
                mine = mine[self.args.process_index :: self.args.world_size]
            shares, found = judge(
                model,
                self.view_tokenizer,
                mine,
                self.generation_metrics,
                self.database,
                max_new_tokens=self.max_new_tokens,
                batch_size=self._generation_batch_size,
            )
            for metric, share in shares.items():
                counted = torch.tensor([share * len(found), float(len(found))], device=self.accelerator.device)
                right, rows = self.accelerator.reduce(counted, reduction="sum").tolist()
                output.metrics[f"{metric_key_prefix}_{metric}"] = right / rows
        return output

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.objective.teacher is not None and self.args.should_save and folder != Path(self.args.output_dir):
            state = {name: value.contiguous() for name, value in self.objective.teacher.state_dict().items()}
            save_file(state, folder / TEACHER_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_teacher(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_teacher(self.state.best_model_checkpoint)

    def _load_teacher(self, checkpoint: str) -> None:
        """Load the teacher that a checkpoint holds, where this run has one.

        Raises:
            UsageError: the checkpoint holds none.
        """
        if self.objective.teacher is None:
            return
        path = Path(checkpoint) / TEACHER_FILE
        if not path.is_file():
            raise UsageError(f"{checkpoint} holds no teacher ({TEACHER_FILE}); start over")
        self.objective.teacher.load_state_dict(load_file(path))

    def create_model_card(self, model_name: str | None = None, data: DataNames | None = None, **kwargs: Any) -> None:
        """Write `README.md`.

        Args:
            model_name: what users pass to `from_pretrained`; default the Hub repository, or the output directory.
            data: names of the data.
            kwargs: `language`, `license` and `dataset` as `Trainer.create_model_card` takes them.
        """
        if not self.is_world_process_zero():
            return
        args, state = self.args, self.state
        folder = Path(args.output_dir).absolute().name
        data, given = data or DataNames(), kwargs.get("dataset") or []
        data.datasets += [given] if isinstance(given, str) else given
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        views = ("view_cosine", "view_rank", "view_pairwise_cosine", "view_hit_rate")
        shown = ("lm_loss", "pair_loss", *views, *self.generation_metrics)
        last = evaluations[-1] if evaluations else {}
        training = {
            "steps": state.global_step,
            "adapters": "LoRA" if has_adapters(self.model) else None,
            "rows per step": self.get_total_train_batch_size(args),
            "learning rate": f"{args.learning_rate:.4g}",
            "weights": f"next token {args.lm_weight}, views {args.pair_weight} ({args.pair_loss})",
            **self._views_told(),
            "gradient through the predicted view": args.target_gradient,
            "loss dropout": args.loss_dropout,
            "STP": f"{args.tube_weight} ({args.tube_form})" if args.tube_weight else None,
            "hardware": hardware(args.device, args.world_size),
            "seed": args.seed,
        }
        base = self.model.config.name_or_path
        card = render_card(
            self.hub_model_id or args.hub_model_id or model_name or folder,
            __version__,
            training,
            {name.replace("_", " "): last[f"eval_{name}"] for name in shown if f"eval_{name}" in last},
            data,
            with_paths=bool(args.tube_weight),
            with_template=self.processing_class.chat_template is not None,
            base_model=hub_name(base),
            language=kwargs.get("language"),
            license=kwargs.get("license"),
        )
        with whole_file(Path(args.output_dir) / "README.md") as new:
            card.save(new)

    def _views_told(self) -> dict[str, Any]:
        """Rows of the card's table about the views."""
        views = self.view_tokenizer
        if views is None:
            return {}
        count, where = len(views.predictors), views.predictor_position
        return {
            "next-token loss on": "prompts and answers, no stop token" if views.train_on_prompt else "answers",
            "predictor tokens": f"{count}, at the {where} of the first view" if count else "none",
            "which view predicts": "the second" if views.reverse else "the first",
            "most tokens of a row": views.max_length,
        }

    def load_weights(self, checkpoint: str) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not has_adapters(model):
            return super().load_weights(checkpoint)
        from peft import AutoPeftModelForCausalLM  # only adapters need it

        return AutoPeftModelForCausalLM.from_pretrained(checkpoint)

    def write_final(self, model: nn.Module, output_dir: str, state_dict: dict[str, torch.Tensor] | None) -> None:
        """A plain causal language model, or its adapters, with the tokenizer."""
        if has_adapters(model):
            save_adapters(model, self.processing_class, output_dir, state_dict)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)


def _is_raw(dataset: Any) -> bool:
    if isinstance(dataset, dict):
        return any(map(_is_raw, dataset.values()))
    if dataset is None or isinstance(dataset, str):
        return False
    first = next(iter(dataset), None)
    return first is not None and "labels" not in first


def read_rows(dataset: Any, view_tokenizer: PairedViewTokenizer | None) -> Any:
    """Rows of token ids as they are, others through the tokenizer; what was cut is counted in the log, but for streams,
    whose rows are read on the way.

    Args:
        dataset: or several, by name; or the name of one.

    Raises:
        UsageError: rows that are not tokenised, without a tokenizer.
    """
    if not _is_raw(dataset):
        return dataset
    if isinstance(dataset, dict):
        return {name: read_rows(part, view_tokenizer) for name, part in dataset.items()}
    if view_tokenizer is None:
        raise UsageError("rows of text among rows of token ids: say how they are read (view_tokenizer=...)")
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(view_tokenizer, with_indices=True, remove_columns=dataset.column_names)
    rows = [view_tokenizer(row, number) for number, row in enumerate(dataset)]
    tell_of_cuts(rows, view_tokenizer.max_length)
    return rows


def tell_of_cuts(rows: Sequence[dict[str, Any]], max_length: int) -> None:
    """Count in the log the rows of `PairedViewTokenizer` that were cut, where there are any."""
    cut = sum(row["truncated"] for row in rows)
    if cut:
        logger.warning("%d of %d rows were cut at %d tokens", cut, len(rows), max_length)
