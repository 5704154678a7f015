"""The claim that no input, however odd, does more harm than being refused in one sentence.

One test per door: the collators, the configuration, the recipe, the readers of texts, features, images and tasks. Each
draws its cases from the strategies below; `JEPA_HF_FUZZ_CASES=5000 pytest tests/test_fuzz.py --hypothesis-seed=1` draws
more, and `benchmarks/reliability/fuzz.py` counts them. Each fixed failure stays as an explicit example.

Covered is our own code and what it calls on the way: pyarrow, numpy, csv, json, yaml, argparse, PIL, and `datasets`
where it holds rows in memory or streams them (texts that it caches: one case in ten, in a folder of its own).
Not covered: data sets that `load_dataset` loads by name, weights, and what a model makes of a batch. A case that takes
longer than `DEADLINE_S` counts as a hang.
"""

import contextlib
import copy
import csv
import functools
import gzip
import io
import json
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from helpers.batches import image_config
from helpers.tiny_models import tiny_config, tiny_tokenizer
from jepa_hf.cli.console import report_error
from jepa_hf.cli.encoder_loading import load_encoder_config
from jepa_hf.cli.parsing import parse_command
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.feature_datasets import load_feature_datasets
from jepa_hf.data.file_readers import find_files
from jepa_hf.data.image_datasets import load_image_datasets
from jepa_hf.data.text_datasets import load_text_datasets
from jepa_hf.errors import UsageError
from jepa_hf.evaluation.tasks import load_tasks
from jepa_hf.masking.block_collator import DataCollatorForBlockJEPA
from jepa_hf.masking.feature_collator import DataCollatorForFeatureJEPA
from jepa_hf.masking.span_collator import DataCollatorForSpanJEPA
from jepa_hf.models.configuration_feature_encoder import FeatureEncoderConfig
from jepa_hf.models.configuration_jepa import JepaConfig

pytestmark = pytest.mark.fuzz

CASES = int(os.environ.get("JEPA_HF_FUZZ_CASES", "50"))
DEADLINE_S = 30.0  # seconds
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)

Result = TypeVar("Result")


def call_or_usage_error(call: Callable[[], Result]) -> Result | None:
    """What `call` gives; None where it is refused in one sentence. Any other error, and a hang, is passed on."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"still at it after {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except UsageError as error:
        assert_one_line_error(error)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_one_line_error(error: UsageError) -> None:
    """The command line says it in one printable line of bearable length."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert report_error("jepa-hf", error) == 2
    line = stderr.getvalue().removesuffix("\n")
    assert line.isprintable()
    assert "Traceback" not in line
    assert len("jepa-hf: error: ") < len(line) < 12_000


# ---- strategies


def weighted_choice(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A case is refused for one bad value, so that these have to be rare."""
    return st.integers(0, 19).flatmap(lambda number: bad if number == 19 else good)


EDGE_CASE_VALUES = (
    "", "\ufeff", "\0", "\x1a", "\u2028", "\x85", "\x0b", "\r", "\n", "\t", "😀", "a\u0301", "\u202e", "ﷺ", "\ud800",
    "\udc80", "\x1b[2J", "nan", "-inf", "1e999", "9" * 400, "-0", "0x10", "1_000", "true", "null", '"', "'", "{",
    "[", "]]", "{}", "[]", "\\u0000", "%s", "[MASK]", "[SEP]", "<mask>", "../../x", "UsageError: ",
)  # fmt: skip
WORDS = st.sampled_from(("the quiet river returns", "label", "text", "a", "1", "2.5"))
TEXTS = st.one_of(WORDS, st.text(max_size=20), st.lists(st.sampled_from(EDGE_CASE_VALUES), max_size=3).map("".join))
WRITABLE = TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())  # without lone surrogates
NEWLINES = st.sampled_from(("\n", "\r\n", "\r"))
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.floats(-10, 10, width=32),
    st.sampled_from((2**31, 2**53 + 1, -(2**63), 2**64, 10**400, 1e39, 3.4e38, 5e-324)),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
COLUMN_NAMES = st.one_of(
    st.sampled_from(("text", "label", "features", "lengths", "x", "image", "sentence1", "sentence2", "score", "query")),
    st.sampled_from(("document", "a", "b", "a,b", "a b", "1", "")),
    TEXTS,
)
CELLS = st.one_of(
    st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=2),
    st.lists(st.lists(NUMBERS, max_size=3), max_size=3),
    st.sampled_from((["a"], {"bytes": None, "path": "x"}, [[[1.0]]])),
    SCALARS,
)
TEXT_ROWS = (
    [{"text": f"line {row}", "label": row % 2} for row in range(12)],
    [{"document": f"the {row}. text"} for row in range(3)],
)
FEATURE_ROWS = (
    [{"x": float(row), "y": row / 3, "label": "ab"[row % 2]} for row in range(12)],
    [{"features": [row / 7, 2.0], "label": row % 3} for row in range(12)],
    [{"features": [[row / 7, 2.0]] * (1 + row % 3)} for row in range(6)],
)
TASK_ROWS = (
    *TEXT_ROWS[:1],
    *FEATURE_ROWS[:2],
    [{"sentence1": "a", "sentence2": "b", "score": row} for row in range(4)],
    [{"query": f"q{row}", "document": f"d{row}"} for row in range(4)],
)


@st.composite
def tables(draw: st.DrawFn, sound: tuple[list[dict[str, Any]], ...]) -> list[dict[str, Any]]:
    """One of these sound tables, with a few cells, or a whole column, changed; or rows of anything."""
    if draw(st.integers(0, 9)) == 9:
        return draw(st.lists(st.dictionaries(COLUMN_NAMES, CELLS, max_size=4), max_size=5))
    rows = copy.deepcopy(draw(st.sampled_from(sound)))
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        row, name, cell = draw(st.sampled_from(rows)), draw(st.sampled_from(sorted(rows[1]) or ["a"])), draw(CELLS)
        match draw(st.sampled_from(("cell", "column", "missing", "more"))):
            case "cell":
                row[name] = cell
            case "column":
                for other in rows:
                    other[name] = cell
            case "missing":
                row.pop(name, None)
            case "more":
                row[draw(COLUMN_NAMES)] = cell
    return rows


def written_table(rows: list[dict[str, Any]], kind: str, newline: str, ascii_only: bool) -> bytes:
    """The rows in a file of this kind; what it cannot hold is left out or becomes a string."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    match kind:
        case "txt":
            return newline.join(str(cell) for row in rows for cell in row.values()).encode("utf-8", "surrogatepass")
        case "jsonl":
            lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
            return newline.join(lines).encode("utf-8", "surrogatepass")
        case "json":
            return json.dumps(rows, ensure_ascii=ascii_only, indent=1).encode("utf-8", "surrogatepass")
        case "csv" | "tsv":
            file = io.StringIO()
            # The writer puts no quotes around a cell that holds the one newline where the other ends a row.
            quoting = csv.QUOTE_MINIMAL if newline == "\r\n" else csv.QUOTE_ALL
            writer = csv.writer(
                file, "excel" if kind == "csv" else "excel-tab", lineterminator=newline, quoting=quoting
            )
            writer.writerow(names)
            writer.writerows([row.get(name) for name in names] for row in rows)
            return file.getvalue().encode("utf-8", "surrogatepass")
        case "parquet":
            buffer = io.BytesIO()
            columns = [_arrow([row.get(name) for row in rows]) for name in names]
            pq.write_table(pa.table(columns, [name.encode("utf-8", "replace").decode() for name in names]), buffer)
            return buffer.getvalue()
        case "npy":
            buffer = io.BytesIO()
            np.save(buffer, _array([list(row.values()) for row in rows]), allow_pickle=True)
            return buffer.getvalue()
        case _:
            buffer = io.BytesIO()
            arrays = {re.sub(r"\W", "_", name): _array([row.get(name) for row in rows]) for name in names}
            np.savez(buffer, **{name: array for name, array in arrays.items() if name != "file"}, allow_pickle=True)
            return buffer.getvalue()


def _arrow(values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
        pq.write_table(pa.table([array], ["tried"]), io.BytesIO())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([ascii(value) for value in values])
    return array


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _array(values: list[Any]) -> np.ndarray:
    try:
        return np.array(values)
    except ValueError:
        return np.array([ascii(value) for value in values], dtype=object)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes as they are, cut short, with a byte changed or some put in, after a BOM, or in another encoding."""
    place = draw(st.integers(0, len(content)))
    match draw(st.sampled_from((*["whole"] * 12, "cut", "changed", "more", "bom", "utf-16"))):
        case "cut":
            return content[:place]
        case "changed":
            return content[:place] + draw(st.binary(min_size=1, max_size=1)) + content[place + 1 :]
        case "more":
            return content[:place] + draw(st.binary(max_size=8)) + content[place:]
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "utf-16":
            return content.decode("utf-8", "replace").encode("utf-16")
    return content


@st.composite
def files(draw: st.DrawFn, sound: tuple[list[dict[str, Any]], ...], *kinds: str) -> tuple[str, bytes]:
    """A name and bytes: a table written as one of these kinds and then perhaps damaged, or anything; perhaps packed."""
    kind = draw(st.sampled_from(kinds))
    if draw(st.integers(0, 9)) == 9:
        content = draw(st.binary(max_size=200) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
    else:
        content = draw(damaged(written_table(draw(tables(sound)), kind, draw(NEWLINES), draw(st.booleans()))))
    name = draw(st.sampled_from(("data", "дані", "a b", "a,b", "[x]*", "-f", "it's", "x" * 200)))
    if draw(st.integers(0, 9)) == 9:
        return f"{name}.{kind}.gz", draw(damaged(gzip.compress(content, compresslevel=1)))
    return f"{name}.{kind}", content


@contextlib.contextmanager
def on_disk(file: tuple[str, bytes]) -> Iterator[Path]:
    """The file in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file[0]
        path.write_bytes(file[1])
        yield path


# ---- the collators

TOKENIZERS = ("bert", "roberta", "deberta-v2", "modernbert")
RATIOS = weighted_choice(st.floats(0.01, 0.99), st.sampled_from((0.0, 1.0, -1.0, float("nan"), 1e-300, 1 - 1e-16)))
SPANS = weighted_choice(st.floats(1, 20), st.sampled_from((0.0, 1e308, float("inf"), float("nan"))))
ON_TOO_SHORT = st.sampled_from(("error", "nonsense"))
SPAN_SETTINGS = st.fixed_dictionaries(
    {"mask_ratio": RATIOS, "mean_span_length": SPANS, "on_too_short": weighted_choice(st.just("skip"), ON_TOO_SHORT)},
    optional={
        "masked_tokens": st.sampled_from(("mask_token", "drop")),
        "num_masks": weighted_choice(st.integers(1, 4), st.integers(-1, 0)),
        "max_length": weighted_choice(st.integers(30, 40), st.integers(-1, 29)),
        "seed": st.integers(-(2**70), 2**70),
    },
)


@st.composite
def token_rows(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]], bool]:
    """A family, rows of its tokens, special ones anywhere among them, and whether whole words are hidden."""
    family = draw(st.sampled_from(TOKENIZERS))
    tokenizer = tiny_tokenizer(family)
    ids = st.integers(0, len(tokenizer) - 1) | st.sampled_from(tokenizer.all_special_ids)
    rows = [{"input_ids": row} for row in draw(st.lists(st.lists(ids, max_size=30), min_size=1, max_size=5))]
    whole_word = draw(st.booleans())
    if whole_word:
        for row in rows:
            size = len(row["input_ids"])
            starts = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
            row["word_ids"] = np.cumsum(np.array(starts, dtype=int)).tolist()
    if draw(st.integers(0, 19)) == 19:
        row = draw(st.sampled_from(rows))
        row[draw(st.sampled_from(sorted(row)))] = draw(st.lists(SCALARS, max_size=5) | SCALARS)
    return family, rows, whole_word


@functools.cache
def padding_on(side: str, family: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.padding_side = side
    return tokenizer


@fuzz
@given(
    token_rows(),
    SPAN_SETTINGS,
    st.sampled_from(("left", "right")),
    weighted_choice(st.sampled_from((None, 1, 8)), st.sampled_from((0, -3))),
)
@example(("bert", [{"input_ids": [5, 6, 7]}], False), {}, "right", 0)
@example(("bert", [{"input_ids": None}], False), {}, "right", None)
@example(("bert", [{"input_ids": [5, 6, 7], "word_ids": [0, 1]}], True), {}, "right", None)
@example(("bert", [{"input_ids": [5, 6, 7], "word_ids": [0, 1, 1]}, {"input_ids": [5]}], True), {}, "right", None)
def test_masks_of_tokens(
    drawn: tuple[str, list[dict[str, Any]], bool], options: dict[str, Any], side: str, multiple: int | None
) -> None:
    """No target on a special token or padding, none outside of its row, at least one where two units may be hidden."""
    family, rows, whole_word = drawn
    tokenizer = padding_on(side, family)
    batch = call_or_usage_error(
        lambda: DataCollatorForSpanJEPA(tokenizer, whole_word=whole_word, pad_to_multiple_of=multiple, **options)(rows)
    )
    if batch is None:
        return
    ids, attention = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(bool)
    maskable = attention & ~np.isin(ids, tokenizer.all_special_ids)
    for number, row in enumerate(rows):
        # Padding at the ends of a row is removed.
        tokens = np.flatnonzero(np.array(row["input_ids"], dtype=int) != tokenizer.pad_token_id)
        own = slice(tokens[0], tokens[-1] + 1) if tokens.size else slice(0)
        assert ids[number][attention[number]].tolist() == list(row["input_ids"])[own]
        units = np.flatnonzero(maskable[number])
        words = np.array(row["word_ids"])[own][maskable[number][attention[number]]] if whole_word else units
        possible = len(units) >= 2 and (not whole_word or len(np.unique(words)) >= 2)
        for targets, valid in zip(batch["target_positions"][number], batch["target_valid"][number], strict=True):
            hidden = targets[valid].numpy()
            assert maskable[number][hidden].all()
            assert len(set(hidden)) == len(hidden) < max(len(units), 1)
            assert not possible or len(hidden) > 0
        if "context_input_ids" in batch:
            view = np.atleast_2d(batch["context_input_ids"][number].numpy())
            flags = np.zeros(view.shape, dtype=bool)
            for mask in range(len(view)):
                flags[mask, batch["target_positions"][number, mask][batch["target_valid"][number, mask]]] = True
            assert (view == np.where(flags, tokenizer.mask_token_id, ids[number])).all()
        else:
            shown = batch["context_positions"][number], batch["context_valid"][number]
            for mask, (places, valid) in enumerate(zip(*shown, strict=True)):
                hidden = batch["target_positions"][number, mask][batch["target_valid"][number, mask]]
                assert sorted([*places[valid].tolist(), *hidden.tolist()]) == np.flatnonzero(attention[number]).tolist()


@fuzz
@given(
    st.sampled_from(("time", "patches", "flat")),
    weighted_choice(st.integers(2, 6), st.just(1)),
    weighted_choice(st.just(1), st.integers(1, 6)),
    st.lists(st.lists(st.lists(NUMBERS, min_size=1, max_size=6), max_size=9) | CELLS, min_size=1, max_size=4),
    SPAN_SETTINGS,
    weighted_choice(st.just(True), st.just(False)),
)
@example("time", 2, 1, [[[10**400, 1]]], {}, False)
def test_masks_of_features(
    mode: str, width: int, patch: int, rows: list[Any], options: dict[str, Any], fitting: bool
) -> None:
    """Targets are real positions and disjoint from the context; a series of two steps, and each vector, has one."""
    if fitting:  # cut to the width, so that most cases come past the check of shapes
        series = [row if isinstance(row, list) else [row] for row in rows]
        flat = [[value for value in np.ravel(row).tolist() if isinstance(value, float)] for row in map(_array, series)]
        steps = [np.resize(values or [0.0], (1 + len(values) % 7, width)) for values in flat]
        rows = [row.tolist() if mode == "time" else row[0].tolist() for row in steps]
    features = [{"features": row} for row in rows]

    def collate() -> dict[str, torch.Tensor]:
        config = FeatureEncoderConfig(width, mode, 8, 1, 2, patch_size=min(patch, width), max_position_embeddings=40)
        mode_of_context = {"masked_tokens": "mask_token"} if mode == "flat" else {}
        return DataCollatorForFeatureJEPA(config, **{**mode_of_context, **options})(features)

    batch = call_or_usage_error(collate)
    if batch is None:
        return
    for number, row in enumerate(rows):
        real = len(row) if mode == "time" else 1 if mode == "flat" else -(-width // min(patch, width))
        for mask in range(batch["target_positions"].shape[1]):
            hidden = batch["target_positions"][number, mask][batch["target_valid"][number, mask]].tolist()
            assert set(hidden) <= set(range(real))
            assert hidden or (mode == "time" and real < 2)
            if "context_positions" in batch:
                shown = batch["context_positions"][number, mask][batch["context_valid"][number, mask]].tolist()
                assert sorted([*hidden, *shown]) == list(range(real))


PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})
GREY = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])


@st.composite
def encoded_images(draw: st.DrawFn) -> bytes:
    """A picture of any size and mode in a format that takes it, perhaps damaged; or no picture."""
    kind, mode = draw(
        st.sampled_from(
            (
                *(("PNG", mode) for mode in ("RGB", "1", "L", "LA", "P", "RGBA", "I;16")),
                *(("TIFF", mode) for mode in ("F", "I", "LAB", "YCbCr")),
                *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB")),
            )
        )
    )
    width, height = draw(st.integers(1, 40)), draw(st.sampled_from((1, 2, 16, 33, 3000)))
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return draw(damaged(buffer.getvalue()) | st.binary(max_size=60))


CELLS_OF_IMAGES = weighted_choice(
    st.one_of(
        encoded_images().map(lambda data: {"bytes": data, "path": None}),
        encoded_images().map(lambda data: {"bytes": data, "path": "no-such-file.png"}),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from((1, 3, 4))).map(
            lambda shape: np.zeros(shape, dtype=np.uint8)
        ),
    ),
    st.one_of(
        st.just({"bytes": None, "path": None}),
        st.sampled_from(("no-such-file.png", "\0", "/", "")).map(lambda path: {"bytes": None, "path": path}),
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from((1, 2, 3, 4))).map(
            lambda shape: np.zeros(shape, dtype=np.uint8)
        ),
        st.dictionaries(st.sampled_from(("bytes", "path", "x")), SCALARS),
        JSON,
    ),
)
ODD_PAIRS = st.tuples(*[st.floats(0.05, 1) | st.sampled_from((0.0, -1.0, 2.0, float("nan"), float("inf")))] * 2)
SHARES = weighted_choice(st.floats(0.05, 1).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 1))), ODD_PAIRS)


@fuzz
@given(
    st.lists(CELLS_OF_IMAGES, min_size=1, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "num_masks": weighted_choice(st.integers(1, 6), st.integers(-1, 0)),
            "target_scale": SHARES,
            "target_aspect_ratio": SHARES,
            "context_scale": SHARES,
            "keep_blocks_inside": st.booleans(),
            "random_resized_crop": SHARES,
            "random_flip": st.booleans(),
            "num_channels": weighted_choice(st.sampled_from((1, 3)), st.just(2)),
            "seed": st.integers(-(2**70), 2**70),
        },
    ),
    weighted_choice(st.sampled_from(((4, 4), (2, 8), (1, 2), (16, 16))), st.sampled_from(((1, 1), (3, 4), (0, 4)))),
)
@example([{"bytes": b"no image"}], {}, (4, 4))
@example([{"path": []}], {}, (4, 4))
def test_blocks_of_images(cells: list[Any], options: dict[str, Any], grid: tuple[int, int]) -> None:
    """Targets lie on the plane, there is one wherever there is context, and the context shows none of them."""
    processor = GREY if options.get("num_channels") == 1 else PROCESSOR
    batch = call_or_usage_error(
        lambda: DataCollatorForBlockJEPA(processor, grid, **options)([{"image": cell} for cell in cells])
    )
    if batch is None:
        return
    assert batch["pixel_values"].isfinite().all()
    for number in range(len(cells)):
        blocks = [
            set(block[valid].tolist())
            for block, valid in zip(batch["target_positions"][number], batch["target_valid"][number], strict=True)
        ]
        shown = set(batch["context_positions"][number, 0][batch["context_valid"][number, 0]].tolist())
        targets = set().union(*blocks)
        assert targets | shown <= set(range(grid[0] * grid[1]))
        assert not targets & shown
        assert bool(targets) == bool(shown)


# ---- the configuration

CONFIGURATIONS = (
    JepaConfig(tiny_config("bert")),
    JepaConfig(tiny_config("modernbert")),
    JepaConfig(tiny_config("deberta-v2")),
    JepaConfig.for_images(image_config()),
    JepaConfig.for_features(10, num_heads=2),
)
# Not so large that a list with an entry for each layer fills the memory.
SETTINGS_OF_CONFIGURATIONS = st.one_of(
    st.integers(-3, 300), st.floats(), st.none(), st.booleans(), TEXTS, st.just([]), st.just({}), st.just([1, "a"])
)


@st.composite
def configurations(draw: st.DrawFn) -> Any:
    """A configuration as JSON, with some of its values, or of its encoder's, changed or gone; or any JSON."""
    if draw(st.integers(0, 6)) == 0:
        return draw(JSON)
    content = copy.deepcopy(draw(st.sampled_from(CONFIGURATIONS)).to_dict())
    for _ in range(draw(st.integers(0, 3))):
        part = content.get("encoder_config") if draw(st.booleans()) else content
        if not isinstance(part, dict) or not part:
            break
        name = draw(st.sampled_from(sorted(part)) | TEXTS)
        if draw(st.integers(0, 4)) == 0:
            part.pop(name, None)
        else:
            part[name] = draw(SETTINGS_OF_CONFIGURATIONS)
    return content


@fuzz
@given(configurations().filter(lambda content: isinstance(content, dict)))
@example({"encoder_config": {}})
@example({"encoder_config": "bert"})
@example({"encoder_config": {"model_type": "no such"}})
@example({"encoder_config": {"model_type": "bert", "hidden_size": "wide"}})
@example({"encoder_config": {"model_type": "bert", "dtype": []}})
@example({"encoder_config": {"model_type": "vit", "patch_size": []}})
@example({"encoder_config": {"model_type": "feature_encoder", "input_dim": "ten"}})
@example({"encoder_config": {"model_type": "bert"}, "pred_hidden_size": "wide"})
@example({"encoder_config": {"model_type": "bert"}, "covariance_weight": None})
@example({"encoder_config": {"model_type": "bert"}, "mlm_weight": float("nan")})
@example({"encoder_config": {"model_type": "bert"}, "id2label": "a"})
def test_a_configuration_from_python(content: dict[str, Any]) -> None:
    """What is accepted comes back the same from its own dictionary."""
    config = call_or_usage_error(lambda: JepaConfig.from_dict(copy.deepcopy(content)))
    if config is not None:
        assert JepaConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@fuzz
@given(configurations().flatmap(lambda content: damaged(json.dumps(content).encode())) | st.binary(max_size=50))
@example(b"null")
@example(b'{"model_type": "bert", "hidden_size": "wide"}')
def test_a_configuration_on_disk(content: bytes) -> None:
    """The command line loads it or says why not, whatever lies in config.json."""
    with on_disk(("config.json", content)) as path:
        parsed = parse_command(["--model_name_or_path", str(path.parent), "--output_dir", str(path.parent / "out")])
        config = call_or_usage_error(lambda: load_encoder_config(parsed[0], parsed[1]))
    assert config is None or isinstance(config.model_type, str)


# ---- the recipe

KEYS = st.one_of(
    st.sampled_from(("mask_ratio", "max_steps", "report_to", "target_scale", "output_dir", "seed", "model_type")),
    st.sampled_from(("learning_rate", "eval_strategy", "logging_steps", "train_file", "bf16", "num_masks", "packed")),
    st.sampled_from(("lr_scheduler_kwargs", "warmup_steps", "run_name", "config_overrides", "ema_decay", "optim_args")),
    st.sampled_from(("save_strategy", "label_names", "whole_word", "stride", "random_resized_crop", "mask_ration")),
    TEXTS,
)
VALUES = {
    "mask_ratio": st.floats(0.1, 0.9),
    "max_steps": st.integers(-1, 9),
    "report_to": st.sampled_from(("none", ["none"], [])),
    "target_scale": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list),
    "learning_rate": st.floats(0, 1),
    "eval_strategy": st.sampled_from(("no", "steps", "epoch", False)),
    "lr_scheduler_kwargs": st.just({"num_cycles": 2}),
    "run_name": TEXTS,
    "train_file": TEXTS,
    "bf16": st.just(False),
}
RECIPES = weighted_choice(st.fixed_dictionaries({}, optional=VALUES), st.dictionaries(KEYS, JSON, max_size=4)) | (
    st.sampled_from(sorted(VALUES)).flatmap(lambda key: st.fixed_dictionaries({key: JSON}))
)


@fuzz
@given(
    st.one_of(
        RECIPES.map(lambda recipe: yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass")),
        RECIPES.map(lambda recipe: json.dumps(recipe).encode()),
        RECIPES.flatmap(lambda recipe: damaged(yaml.safe_dump(recipe).encode())),
        st.binary(max_size=60),
        TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.tuples(KEYS, TEXTS).map(lambda pair: f"{pair[0]}: {pair[1]}".encode("utf-8", "surrogatepass")),
    )
)
@example(b'"\\e[2J": 1')
@example(b'"UsageError: ": 1')
def test_a_recipe(content: bytes) -> None:
    """It is parsed into arguments or refused, and nothing is written."""
    with on_disk(("recipe.yaml", content)) as path:
        parsed = call_or_usage_error(
            lambda: parse_command([str(path), "--output_dir", str(path.parent / "out"), "--use_cpu"])
        )
        assert os.listdir(path.parent) == ["recipe.yaml"]
    assert parsed is None or len(parsed) == 4


# ---- the readers


@fuzz
@given(TEXTS.filter(lambda name: "/" not in name) | st.text("*?[]a,. \0", max_size=8))
def test_names_of_files(name: str) -> None:
    """Any name is found or not, with a sentence."""
    with on_disk(("a", b"")) as path, contextlib.chdir(path.parent):
        assert call_or_usage_error(lambda: find_files("train_file", name)) in (None, ["a"], ["./a"])


@fuzz
@given(
    files(TEXT_ROWS, "txt", "md", "json", "jsonl", "csv", "tsv", "parquet"),
    weighted_choice(st.none(), COLUMN_NAMES),
    st.sampled_from((True,) * 9 + (False,)),
)
def test_a_file_of_texts(file: tuple[str, bytes], column: str | None, streaming: bool) -> None:
    """Texts are not blank and can be written as UTF-8."""
    with on_disk(file) as path:

        def texts() -> list[str]:
            args = DataArguments(
                train_file=str(path), text_column_name=column, streaming=streaming, cache_dir=str(path.parent)
            )
            train, _ = load_text_datasets(args, seed=0, need_validation=False)
            return [row["text"] for row in train]

        actual = call_or_usage_error(texts)
    assert actual is None or all(text.strip() and text.encode() for text in actual)


@fuzz
@given(
    st.lists(WRITABLE, max_size=6),
    st.sampled_from(("txt", "json", "jsonl", "csv", "tsv", "parquet")),
    NEWLINES,
    st.booleans(),
    st.booleans(),
    st.sampled_from((b"", b"\xef\xbb\xbf")),
)
@example(["word " * 2**21], "txt", "\n", False, False, b"")
@example(["word " * 2**21], "jsonl", "\n", True, False, b"")
@example(["word " * 2**21, "\n" * 2**21 + "a"], "csv", "\r\n", False, True, b"")
@example(["a", "b\nc"], "tsv", "\r", False, False, b"")
@example(["a", "b\rc"], "tsv", "\n", False, False, b"")
def test_texts_come_back_as_they_were_written(
    texts: list[str], kind: str, newline: str, ascii_only: bool, packed: bool, mark: bytes
) -> None:
    """Every kind of file gives the texts that a standard writer put in, without the blank ones."""
    content = written_table([{"text": text} for text in texts], kind, newline, ascii_only)
    content = content if kind == "parquet" else mark + content
    expected = re.split("\r\n|\r|\n", content.decode("utf-8-sig")) if kind == "txt" else texts
    with on_disk((f"data.{kind}{'.gz' if packed else ''}", gzip.compress(content) if packed else content)) as path:
        args = DataArguments(train_file=str(path), text_column_name="text", streaming=True)
        actual = call_or_usage_error(
            lambda: [row["text"] for row in load_text_datasets(args, seed=0, need_validation=False)[0]]
        )
    expected = [text for text in expected if text.strip()]
    tabs = {text.strip().count("\t") for text in expected}
    if kind == "txt" and len(expected) > 1 and len(tabs) == 1 and tabs != {0}:
        expected = []  # a table
    if kind in ("csv", "tsv") and all(_is_number(text) for text in texts if text):
        expected = []  # no column of texts
    assert (actual or []) == expected


# The header of an array of 10^17 numbers, of which none follows.
HUGE = b"\x93NUMPY\x01\x00F\x00{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000,)}"


@fuzz
@given(
    files(FEATURE_ROWS, "npy", "npz", "csv", "tsv", "json", "jsonl", "parquet"),
    weighted_choice(st.none(), COLUMN_NAMES),
    weighted_choice(st.none(), COLUMN_NAMES),
)
@example(("torn.npy", b"\x93NUMPY\x01\x00\x03\x00{('"), None, None)
@example(("huge.npy", HUGE), None, None)
def test_a_file_of_features(file: tuple[str, bytes], columns: str | None, label: str | None) -> None:
    """Rows are finite float32 of one width."""
    with on_disk(file) as path:
        args = DataArguments(train_file=str(path), feature_column_names=columns, label_column_name=label)
        rows = call_or_usage_error(lambda: load_feature_datasets(args, seed=0, need_validation=False)[0])
        if rows is None:
            return
        arrays = [np.asarray(row) for row in rows.with_format("numpy")["features"]]
    assert len({(array.dtype.name, array.ndim, array.shape[-1]) for array in arrays}) == 1
    assert arrays[0].dtype == np.float32
    assert all(np.isfinite(array).all() and array.size for array in arrays)


@fuzz
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(st.floats(width=32), min_size=width, max_size=width), min_size=1, max_size=6)
    ),
    st.sampled_from(("csv", "tsv", "jsonl", "json", "parquet", "npy", "npz")),
    NEWLINES,
)
def test_features_come_back_as_they_were_written(vectors: list[list[float]], kind: str, newline: str) -> None:
    """Every kind of file gives the numbers that a standard writer put in, and one that is not finite is refused."""
    rows = [{f"c{number}": value for number, value in enumerate(vector)} for vector in vectors]
    content = written_table(rows, kind, newline, True)
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, features=np.array(vectors))
        content = buffer.getvalue()
    with on_disk((f"data.{kind}", content)) as path:
        args = DataArguments(train_file=str(path))
        actual = call_or_usage_error(
            lambda: load_feature_datasets(args, seed=0, need_validation=False)[0].with_format("numpy")
        )
        values = None if actual is None else np.array(actual["features"])
    expected = np.array(vectors, dtype=np.float32)
    assert (values is not None) == bool(np.isfinite(expected).all())
    assert values is None or np.array_equal(values, expected)


@fuzz
@given(
    st.one_of(
        encoded_images().map(lambda data: ("a.png", data)),
        files(TASK_ROWS, "parquet"),
        st.lists(encoded_images(), max_size=3).map(
            lambda cells: ("a.parquet", written_table([{"image": cell} for cell in cells], "parquet", "\n", True))
        ),
    ),
    weighted_choice(st.none(), COLUMN_NAMES),
)
def test_a_file_of_images(file: tuple[str, bytes], column: str | None) -> None:
    """Its rows are images for the collator, or are refused there."""
    with on_disk(file) as path:

        def batch() -> dict[str, torch.Tensor]:
            args = DataArguments(train_file=str(path), image_column_name=column, cache_dir=str(path.parent / "cache"))
            rows, _ = load_image_datasets(args, seed=0, need_validation=False)
            return DataCollatorForBlockJEPA(PROCESSOR, (4, 4))(list(rows))

        actual = call_or_usage_error(batch)
    assert actual is None or actual["pixel_values"].isfinite().all()


@fuzz
@given(files(TASK_ROWS, "csv", "tsv", "json", "jsonl", "parquet", "npz", "npy"))
def test_a_file_of_a_task(file: tuple[str, bytes]) -> None:
    """It makes a task with something in each part, every sample with its target."""
    with on_disk(file) as path:
        tasks = call_or_usage_error(lambda: load_tasks([str(path)]))
    for task in tasks or []:
        for split in (task.test, *(() if task.train is None else (task.train,))):
            assert len(split) > 0
            assert {len(side) for side in split.samples} == {len(split)}
            assert split.targets is None or len(split.targets) == len(split)
        assert task.kind != "labels" or len(set(task.train.targets)) > 1
