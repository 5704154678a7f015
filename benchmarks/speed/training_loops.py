"""The loops whose speed `throughput.py` compares, and the windows of steps in which their clocks run."""

import copy
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    set_seed,
)

from jepa_hf import (
    DataCollatorForSpanJEPA,
    JepaConfig,
    JepaForRepresentationPrediction,
    JepaTrainer,
    JepaTrainingArguments,
)
from jepa_hf.training.callbacks import EmaTargetCallback

Row = dict[str, Any]

# Width, layers, heads, inner width, vocabulary.
SIZES = {
    "tiny": (32, 2, 2, 64, 512),
    "4x256": (256, 4, 4, 1024, 30522),
    "6x384": (384, 6, 12, 1536, 30522),
    "bert-base": (768, 12, 12, 3072, 30522),
    "bert-large": (1024, 24, 16, 4096, 30522),
}
ARTICLE_OBJECTIVE = {
    "masked_tokens": "mask_token", "predictor_type": "mlp", "loss": "cosine", "average_top_k_layers": 1,
    "target_norm": "none",
}  # fmt: skip
OBJECTIVES: dict[str, Row] = {"jepa-dropped": {}, "jepa-kept": ARTICLE_OBJECTIVE}
TOKENS_ALONE = {"contrastive_weight": 0.0}  # as the article's loop
LOOPS = (*OBJECTIVES, "article", "mlm")
PAD, CLS, SEP, MASK = 0, 101, 102, 103
SPECIAL = {PAD: "[PAD]", 100: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", MASK: "[MASK]"}
POOL, ROWS, MAX_STEPS = 4096, 2**18, 100_000  # different rows; rows of the data set; never reached
SETTLE = 2  # steps of a window before its clock starts: the pipeline was empty
MEAN_SPAN = 5.0


@dataclass(frozen=True)
class Cell:
    """One column of what is compared.

    Args:
        args: further training arguments of a `Trainer`'s cell.
        model: further arguments of `JepaConfig`.
        num_masks: masks of a text, which share its pass of the target encoder; `batch_size` counts masked views.
        launch: file of configs/accelerate that starts the processes; empty for one process.
        processes: their number, each with `batch_size` rows.
    """

    loop: str
    size: str = "6x384"
    length: int = 128
    batch_size: int = 8
    precision: str = "fp32"
    compiled: bool = False
    mask_ratio: float = 0.3
    args: Row = field(default_factory=dict)
    model: Row = field(default_factory=dict)
    num_masks: int = 1
    launch: str = ""
    processes: int = 1

    @property
    def name(self) -> str:
        words = [self.loop, *(["compiled"] if self.compiled else []), self.precision]
        words += [f"ratio {self.mask_ratio}"] if self.mask_ratio != 0.3 else []
        words += [f"{name}={value}" for name, value in (*self.args.items(), *self.model.items())]
        words += [f"{self.num_masks} masks of a text"] if self.num_masks > 1 else []
        words += [f"{self.launch} x {self.processes}"] if self.launch else []
        return " ".join(words)

    @property
    def place(self) -> tuple[str, int, int]:
        """What it has in common with those that it is compared with."""
        return self.size, self.length, self.batch_size

    @property
    def encoder(self) -> BertConfig:
        width, layers, heads, inner, vocabulary = SIZES[self.size]
        return BertConfig(
            vocab_size=max(vocabulary, 512),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
        )

    @property
    def jepa(self) -> JepaConfig:
        objective = TOKENS_ALONE | OBJECTIVES.get(self.loop, ARTICLE_OBJECTIVE)
        return JepaConfig(self.encoder, **(objective | self.model))


class RandomTokens(torch.utils.data.Dataset):
    """Rows of random ids between [CLS] and [SEP], as lists, which is what a tokenised data set gives."""

    def __init__(self, vocabulary: int, length: int, seed: int):
        ids = np.random.default_rng(seed).integers(MASK + 1, vocabulary, (POOL, length), dtype=np.uint16)
        ids[:, 0], ids[:, -1] = CLS, SEP
        self.ids = ids

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.ids[index % POOL].tolist()}


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """A vocabulary of BERT's size without meaning, with BERT's special tokens at their ids."""
    names = {SPECIAL.get(number, f"t{number}"): number for number in range(vocabulary)}
    named = {f"{name[1:-1].lower()}_token": name for name in SPECIAL.values()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="[UNK]")), model_max_length=512, **named
    )


def settings(cell: Cell, folder: str, device: torch.device, workers: int, seed: int) -> Row:
    """Training arguments that both trainers take. Nothing but training is to take time."""
    return {
        "output_dir": folder,
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": cell.batch_size // cell.num_masks,
        "dataloader_num_workers": workers,
        "dataloader_drop_last": True,
        "bf16": cell.precision == "bf16" and not cell.launch.startswith("zero"),  # whose file asks for it
        "torch_compile": cell.compiled,
        "use_cpu": device.type == "cpu",
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": MAX_STEPS,
        "seed": seed,
        **cell.args,
    }


# ---- what is timed


class Stopwatch:
    """Seconds between marks in the stream of work: of the device's clock if it has one."""

    def __init__(self, device: torch.device):
        self.cuda, self._begun, self._pairs = device.type == "cuda", None, []

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._begun = self._mark()

    def __exit__(self, *_: object) -> None:
        self._pairs.append((self._begun, self._mark()))

    def read(self) -> float:
        """Seconds since the last reading; the device must have been waited for."""
        pairs, self._pairs = self._pairs, []
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs)


class TimedEma(EmaTargetCallback):
    """The real callback, and how long it takes."""

    def __init__(self, stopwatch: Stopwatch):
        super().__init__()
        self.stopwatch = stopwatch

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        with self.stopwatch:
            super().on_step_end(*args, **kwargs)


class Windows:
    """Runs windows of steps on request: it counts the steps and waits between two windows.

    Args:
        commands: each is ("window", steps) or ("profile", steps); at their end training is to end.
        done: takes what was measured, a row each; the first one says that the loop is warm.
        host: whether a profile includes the host.
    """

    def __init__(
        self,
        device: torch.device,
        warmup: int,
        commands: Iterator[tuple[str, int]],
        done: Callable[[Row], None],
        host: bool = False,
    ):
        self.device, self.commands, self.done, self.host = device, commands, done, host
        self.ema, self.data = Stopwatch(device), 0.0
        self._kind, self._begin, self._end, self._step = "warm", 0, warmup, 0
        self._since, self._idle_from, self._graphs = time.perf_counter(), time.perf_counter(), 0
        self._worked_since = 0.0
        self._profile: Any = None

    def step_begin(self) -> None:
        """The batch is there."""
        self.data += time.perf_counter() - self._idle_from

    def step_end(self) -> bool:
        """Returns whether training is to end."""
        self._step += 1
        ended = False
        if self._step == self._begin:
            self._start()
        elif self._step == self._end:
            self._stop()
            ended = not self._next()
        self._idle_from = time.perf_counter()
        return ended

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _start(self) -> None:
        self._wait()
        self.ema.read()
        if self._kind == "profile":
            self._profile = profiler(self.device, self.host)
            self._profile.start()
        self.data, self._since, self._worked_since = 0.0, time.perf_counter(), time.process_time()

    def _stop(self) -> None:
        self._wait()
        seconds, steps = time.perf_counter() - self._since, self._end - self._begin
        ema = self.ema.read()
        worked = time.process_time() - self._worked_since
        row = {"kind": self._kind, "step_s": seconds / steps, "ema_s": ema / steps, "data_s": self.data / steps}
        if self.device.type == "cpu":
            row["cpu_s"] = worked / steps
        if self._kind == "warm":
            self._graphs = graphs()
            row = {"kind": "warm", "seconds": seconds, "graphs": self._graphs}
        elif self._kind == "profile":
            self._profile.stop()
            row["profile"], self._profile = (self._profile, steps), None
        self.done({**row, **peak_memory(self.device), "recompiled": graphs() - self._graphs})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next cell's turn

    def _next(self) -> bool:
        order = next(self.commands, None)
        if order is None:
            return False
        self._kind, steps = order
        self._begin = self._step + SETTLE
        self._end = self._begin + steps
        return True


class WindowsCallback(TrainerCallback):
    def __init__(self, windows: Windows):
        self.windows = windows

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.windows.step_begin()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = self.windows.step_end()


def graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def peak_memory(device: torch.device) -> Row:
    """Of this process, in GiB: what the device allocated, or on a CPU what the system counts as resident."""
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def profiler(device: torch.device, host: bool) -> profile:
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(activities=activities + ([ProfilerActivity.CPU] if host or not activities else []))


# ---- the loops


def train(cell: Cell, device: torch.device, windows: Windows, workers: int, seed: int) -> None:
    """Train until the windows are through."""
    set_seed(seed)
    rows = RandomTokens(cell.encoder.vocab_size, cell.length, seed)
    with tempfile.TemporaryDirectory() as folder:
        if cell.loop == "article":
            train_article(cell, device, windows, rows)
            return
        given = settings(cell, folder, device, workers, seed)
        tokenizer = tokenizer_of(cell.encoder.vocab_size)
        if cell.loop == "mlm":
            collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=cell.mask_ratio)
            trainer = Trainer(BertForMaskedLM(cell.encoder), TrainingArguments(**given), collator, train_dataset=rows)
        else:
            collator = DataCollatorForSpanJEPA(
                tokenizer,
                mask_ratio=cell.mask_ratio,
                mean_span_length=MEAN_SPAN,
                masked_tokens=cell.jepa.masked_tokens,
                num_masks=cell.num_masks,
                max_length=cell.length if cell.compiled else None,  # as run_jepa.py does
                seed=seed,
            )
            trainer = JepaTrainer(
                JepaForRepresentationPrediction(cell.jepa),
                JepaTrainingArguments(**given, health_steps=0),
                collator,
                train_dataset=rows,
                callbacks=[TimedEma(windows.ema)],
            )
        trainer.add_callback(WindowsCallback(windows))
        trainer.train()


def train_article(cell: Cell, device: torch.device, windows: Windows, rows: RandomTokens) -> None:
    """Reimplementation of the article's loop, with its operations in its order."""
    context = BertModel(cell.encoder)
    target = copy.deepcopy(context).requires_grad_(False)
    width = cell.encoder.hidden_size
    predictor = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), nn.Linear(4 * width, width))
    model = nn.ModuleDict({"context": context, "target": target, "predictor": predictor}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    model.train()  # the target encoder's dropout too

    def collate(batch: list[dict[str, list[int]]]) -> tuple[torch.Tensor, ...]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        attention = torch.ones_like(ids)
        views, masks = zip(
            *(article_view(row, real, cell.mask_ratio) for row, real in zip(ids, attention, strict=True)), strict=True
        )
        return ids, attention, torch.stack(views), torch.stack(masks)

    loader = torch.utils.data.DataLoader(
        rows, batch_size=cell.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    running, ended = 0.0, False
    while not ended:
        for batch in loader:
            ids, attention, view, mask = (tensor.to(device) for tensor in batch)
            windows.step_begin()
            guess = predictor(context(input_ids=view, attention_mask=attention).last_hidden_state)
            with torch.no_grad():
                aim = target(input_ids=ids, attention_mask=attention).last_hidden_state
            loss = 1 - (F.normalize(guess[mask], dim=-1) * F.normalize(aim[mask], dim=-1)).sum(dim=-1).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with windows.ema, torch.no_grad():
                for trained, averaged in zip(context.parameters(), target.parameters(), strict=True):
                    averaged.mul_(0.99).add_(trained, alpha=0.01)
            running += loss.item()
            ended = windows.step_end()
            if ended:
                break


def article_view(ids: torch.Tensor, attention: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's masked view and mask, as the article's script makes them: a look at each token, then spans."""
    length = int(attention.sum().item())
    special = {place for place in range(length) if int(ids[place].item()) in (CLS, SEP, PAD)}
    hidden = article_mask(length, ratio, MEAN_SPAN, special)
    view = ids.clone()
    view[:length][hidden] = MASK
    mask = torch.zeros_like(attention, dtype=torch.bool)
    mask[:length] = hidden
    return view, mask


def article_mask(length: int, ratio: float, mean: float, special: set[int]) -> torch.Tensor:
    """Spans of exponential length from uniform starts, one at a time, until enough tokens are hidden."""
    mask = torch.zeros(length, dtype=torch.bool)
    wanted, masked = max(1, round(length * ratio)), 0
    for _ in range(4 * length):
        if masked >= wanted:
            break
        span = min(max(1, int(random.expovariate(1 / mean))), length)
        start = random.randint(0, length - 1)
        for place in [each for each in range(start, min(length, start + span)) if each not in special]:
            if not mask[place]:
                mask[place] = True
                masked += 1
    return mask
