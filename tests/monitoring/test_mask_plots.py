"""Claims about the picture of the masks: it shows what is in the batch, all of that and nothing else."""

import copy
import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import IJepaConfig, ViTImageProcessorPil

from helpers.batches import pack, rows, tiny_jepa
from helpers.tiny_models import CORPUS, FAMILIES, tiny_tokenizer
from jepa_hf import (
    DataCollatorForBlockJEPA,
    DataCollatorForFeatureJEPA,
    DataCollatorForSpanJEPA,
    FeatureEncoderConfig,
    JepaConfig,
    JepaForRepresentationPrediction,
    UsageError,
)
from jepa_hf.monitoring.mask_plots import _GREY, _pieces, _wrap_lines, plot_masks, write_masks

torch.set_num_threads(1)
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Batch = dict[str, torch.Tensor]
GRID, PIXELS = (4, 8), 2  # patches, and pixels of a patch
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

pytestmark = pytest.mark.usefixtures("rendered_pictures")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def flags(positions: torch.Tensor, valid: torch.Tensor, length: int) -> np.ndarray:
    """bool `[length]` of the positions of one mask."""
    listed = np.zeros(length, dtype=bool)
    listed[positions[valid].numpy()] = True
    return listed


def names(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


# ---- images


def image_model(channels: int = 3) -> JepaForRepresentationPrediction:
    size = (GRID[0] * PIXELS, GRID[1] * PIXELS)
    encoder = IJepaConfig(image_size=size, patch_size=PIXELS, num_channels=channels, intermediate_size=16, **SIZES)
    return JepaForRepresentationPrediction(JepaConfig(encoder, pred_num_hidden_layers=1))


def image_collator(channels: int = 3, num_masks: int = 4, **options: Any) -> DataCollatorForBlockJEPA:
    size = {"height": GRID[0] * PIXELS, "width": GRID[1] * PIXELS}
    mean = [0.5] * channels
    processor = ViTImageProcessorPil(**{"size": size, "image_mean": mean, "image_std": mean, **options})
    return DataCollatorForBlockJEPA(processor, GRID, num_masks, num_channels=channels)


def pixels(seed: int, channels: int = 3) -> np.ndarray:
    shape = (GRID[0] * PIXELS, GRID[1] * PIXELS, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


MODEL = image_model()


@settings(few, max_examples=10)
@given(
    seed=st.integers(0, 10**6),
    masks=st.integers(1, 6),
    normalise=st.booleans(),
    mean=st.floats(0, 1),
    std=st.floats(0.1, 2),
)
def test_panels_show_the_image_its_context_and_each_target_alone(
    seed: int, masks: int, normalise: bool, mean: float, std: float, tmp_path: Path, drawn: list[Figure]
) -> None:
    """Pixel for pixel, whatever the processor made of them; everything else is one grey."""
    options = {"do_normalize": normalise, "image_mean": [mean, 0.5, 0.1], "image_std": [std, 0.5, 0.3]}
    collator = image_collator(num_masks=masks, **options)
    image = pixels(seed)
    batch = collator([{"image": image}])
    plot_masks(MODEL, batch, tmp_path / "masks.png", collator.image_processor)
    panels = [axis.images[0].get_array() for axis in drawn[-1].axes]
    shown = [flags(batch["context_positions"][0, 0], batch["context_valid"][0, 0], GRID[0] * GRID[1])]
    shown += [
        flags(*target, GRID[0] * GRID[1])
        for target in zip(batch["target_positions"][0], batch["target_valid"][0], strict=True)
    ]
    assert len(panels) == 2 + min(masks, 4)
    np.testing.assert_allclose(panels[0], image / 255, atol=1e-5)
    for panel, patches in zip(panels[1:], shown, strict=False):
        assert 0 < patches.sum() < patches.size
        visible = np.kron(patches.reshape(GRID), np.ones((PIXELS, PIXELS))).astype(bool)
        np.testing.assert_allclose(panel, np.where(visible[..., None], image / 255, _GREY), atol=1e-5)


def test_a_target_is_framed_exactly(tmp_path: Path, drawn: list[Figure]) -> None:
    collator = image_collator()
    batch = collator([{"image": pixels(0)}])
    plot_masks(MODEL, batch, tmp_path / "masks.png", collator.image_processor)
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["image", "context", *(f"target {number} of 4" for number in range(1, 5))]
    for number, axis in enumerate(drawn[0].axes[2:]):
        (frame,) = axis.patches
        inside = np.zeros((GRID[0] * PIXELS, GRID[1] * PIXELS), dtype=bool)
        left, top = frame.get_x() + 0.5, frame.get_y() + 0.5
        inside[int(top) : int(top + frame.get_height()), int(left) : int(left + frame.get_width())] = True
        block = flags(batch["target_positions"][0, number], batch["target_valid"][0, number], GRID[0] * GRID[1])
        np.testing.assert_array_equal(inside, np.kron(block.reshape(GRID), np.ones((PIXELS, PIXELS))).astype(bool))


def test_an_undecodable_image_has_a_note_in_its_row(tmp_path: Path, drawn: list[Figure]) -> None:
    collator = image_collator()
    file = io.BytesIO()
    Image.fromarray(pixels(1)).save(file, "PNG")
    cells = [pixels(0), {"bytes": b"nonsense", "path": None}, {"bytes": file.getvalue(), "path": None}]
    plot_masks(MODEL, collator([{"image": cell} for cell in cells]), tmp_path / "m.png", collator.image_processor)
    rows = np.array(drawn[0].axes).reshape(3, 6)
    output = [[text for axis in row for text in names(axis)] for row in rows]
    assert output == [[], ["cannot be\ndecoded,\nskipped"], []]
    assert all((axis.images[0].get_array() == _GREY).all() for axis in rows[1])
    assert [len(axis.patches) for axis in rows[1]] == [0] * 6


def test_grey_images_are_grey(tmp_path: Path, drawn: list[Figure]) -> None:
    collator = image_collator(channels=1, do_convert_rgb=False)
    image = pixels(0, 1)
    plot_masks(image_model(1), collator([{"image": image}]), tmp_path / "masks.png", collator.image_processor)
    shown = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, np.broadcast_to(image / 255, shown.shape), atol=1e-5)


# ---- texts


def text_batch(texts: list[str], family: str = "bert", masked_tokens: str = "drop", **options: Any) -> Batch:
    collator = DataCollatorForSpanJEPA(
        tiny_tokenizer(family), masked_tokens=masked_tokens, on_too_short="skip", mean_span_length=2, **options
    )
    return collator([{"input_ids": ids} for ids in tiny_tokenizer(family)(texts)["input_ids"]])


def lines(axis: Axes) -> list[tuple[str, str]]:
    """The lines of a picture of texts, from top to bottom: their text and its marked part, token by token."""
    words: dict[float, list[tuple[float, str, bool]]] = {}
    corners = {(round(patch.get_x(), 3), round(patch.get_y(), 3)) for patch in axis.patches}
    assert len(corners) == len(axis.patches)
    for text in axis.texts:
        left, baseline = text.get_position()
        tops = [top for x, top in corners if x == round(left, 3) and 0 < baseline - top < 20]
        words.setdefault(baseline, []).append((left, text.get_text(), bool(tops)))
    rows = [sorted(row) for _, row in sorted(words.items())]
    return [("".join(word for _, word, _ in row), "|".join(word for _, word, on in row if on)) for row in rows]


def body(axis: Axes) -> list[tuple[str, str]]:
    """The lines without headings."""
    return [line for line in lines(axis) if not re.match(r"text \d|what the context", line[0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_shown_in_full_with_its_targets_marked(family: str, tmp_path: Path, drawn: list[Figure]) -> None:
    """What the lines say is the decoded text; what is marked are the target tokens."""
    batch = text_batch([CORPUS[20]], family, "drop" if family != "deberta-v2" else "mask_token")
    tokenizer = tiny_tokenizer(family)
    plot_masks(tiny_jepa(family), batch, tmp_path / "masks.png", tokenizer)
    output = body(drawn[0].axes[0])
    if family == "deberta-v2":
        output = output[: len(output) // 2]
    assert "".join(" ".join(line for line, _ in output).split()) == "".join(
        tokenizer.decode(batch["input_ids"][0], clean_up_tokenization_spaces=False).split()
    )
    targets = batch["input_ids"][0][batch["target_positions"][0, 0][batch["target_valid"][0, 0]]]
    marked = [token.replace("##", "").strip() for token in map(tokenizer.decode, targets[:, None])]
    assert len(marked) > 2
    assert [word.strip() for _, marks in output if marks for word in marks.split("|")] == marked


def test_where_masked_tokens_are_kept_each_mask_shows_its_view(tmp_path: Path, drawn: list[Figure]) -> None:
    batch = text_batch([CORPUS[5]], masked_tokens="mask_token", num_masks=2)
    tokenizer = tiny_tokenizer("bert")
    plot_masks(tiny_jepa("bert", "mask_token"), batch, tmp_path / "masks.png", tokenizer)
    output = [line for line, _ in lines(drawn[0].axes[0])]
    assert [line for line in output if line.startswith("text 1")] == [
        f"text 1, mask {number} of 2, {int(count)} of {batch['input_ids'].shape[1]} tokens hidden"
        for number, count in enumerate(batch["target_valid"][0].sum(dim=1), 1)
    ]
    views = " ".join(output).split("what the context encoder reads ")[1:]
    assert len(views) == 2
    for view, ids in zip(views, batch["context_input_ids"][0], strict=True):
        read = re.sub(r"text 1.*", "", view)
        assert read.split() == tokenizer.decode(ids, clean_up_tokenization_spaces=False).split()
        assert "[MASK]" in read
    assert "[MASK]" not in "".join(output).split("what the context")[0]


def test_dollar_signs_are_no_formulas(tmp_path: Path, drawn: list[Figure]) -> None:
    """A token of mathematical notation that matplotlib would refuse is drawn as it stands."""
    tokenizer = copy.deepcopy(tiny_tokenizer("bert"))
    tokenizer.add_tokens([r"$\frac{$"])
    collator = DataCollatorForSpanJEPA(tokenizer)
    batch = collator([{"input_ids": tokenizer(r"it costs $5, then $\frac{$ more")["input_ids"]}])
    plot_masks(tiny_jepa(), batch, tmp_path / "masks.png", tokenizer)
    assert [word for word in names(drawn[0].axes[0]) if "$" in word] == ["$", r"$\frac{$"]
    assert imread(tmp_path / "masks.png").std() > 0.05


def test_characters_that_the_font_lacks_are_drawn_without_a_warning(tmp_path: Path) -> None:
    batch = text_batch(["amber \u4e2d\u6587 river garden"], "roberta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_masks(tiny_jepa("roberta"), batch, tmp_path / "masks.png", tiny_tokenizer("roberta"))
    assert imread(tmp_path / "masks.png").std() > 0.05


def test_a_long_text_ends_with_an_ellipsis_inside_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    batch = text_batch([" ".join(CORPUS[:40]), "a b c d"])
    plot_masks(tiny_jepa(), batch, tmp_path / "masks.png", tiny_tokenizer("bert"))
    axis = drawn[0].axes[0]
    first, second = " ".join(line for line, _ in lines(axis)).split("text 1, ")[1].split("text 2, ")
    assert first.endswith("… ")
    assert second.endswith("[SEP]")
    assert len(body(axis)) == 7
    right = max(text.get_window_extent().x1 for text in axis.texts)
    assert 0.8 < right / drawn[0].bbox.width < 1


def test_of_packed_rows_each_text_is_drawn_by_itself(tmp_path: Path, drawn: list[Figure]) -> None:
    """As in a row of its own; the first N of all texts."""
    collator, texts = DataCollatorForSpanJEPA(tiny_tokenizer("bert")), rows("bert", 9)
    packed = pack(texts, 60)[0]
    for batch in (packed, texts):
        plot_masks(tiny_jepa(), collator(batch), tmp_path / "masks.png", tiny_tokenizer("bert"), rows=5)
    ours, theirs = (lines(figure.axes[0]) for figure in drawn)
    headings = [line for line, _ in ours if line.startswith("row ")]
    assert len(headings) == 5
    assert headings[0].startswith(f"row 1, text 1 of {packed[0]['document_ids'][-1] + 1}, ")
    named = re.compile(r"^(row \d+, text \d+ of \d+|text \d+), ")
    assert [(named.sub("", line), marks) for line, marks in ours] == [
        (named.sub("", line), marks) for line, marks in theirs
    ]


def test_a_text_too_short_to_be_masked_has_a_note(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_masks(tiny_jepa(), text_batch([CORPUS[3], "a"]), tmp_path / "masks.png", tiny_tokenizer("bert"))
    assert ("text 2, too short to be masked, skipped", "") in lines(drawn[0].axes[0])
    assert body(drawn[0].axes[0])[-1] == ("[CLS] a [SEP]", "")


@few
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    family=st.sampled_from(FAMILIES),
    data=st.data(),
)
def test_pieces_are_the_text_and_none_loses_a_target(text: str, family: str, data: st.DataObject) -> None:
    """Of any characters in any tokenizer, also where several tokens make one character."""
    tokenizer = tiny_tokenizer(family)
    ids = np.array(tokenizer(text)["input_ids"])
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=bool)
    pieces = list(_pieces(ids, targets, tokenizer, lambda piece: float(len(piece))))
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join("".join(piece for piece, _, _ in pieces).split()) == "".join(decoded.split())
    assert any(is_target for _, _, is_target in pieces) == targets.any()
    assert all(width == len(piece) for piece, width, _ in pieces)


@few
@given(
    st.lists(st.sampled_from([" ", " ", "a", "bc", "def", "ghijkl", "m" * 30])),
    st.integers(5, 20),
    st.integers(1, 5),
)
def test_lines_are_narrow_enough_and_nothing_is_lost_without_an_ellipsis(
    words: list[str], width: int, most_lines: int
) -> None:
    """Only a single piece that is wider than a line sticks out."""
    pieces = [(word, float(len(word)), False) for word in words]
    wrapped = _wrap_lines(pieces, width, most_lines, lambda text: float(len(text)))
    assert len(wrapped) <= most_lines
    for line in wrapped:
        texts = [text for text, _, _ in line if text.strip()]
        assert len("".join(text for text, _, _ in line).strip()) <= width or len(texts) == 1
    shown = "".join(text for line in wrapped for text, _, _ in line).replace(" ", "")
    everything = "".join(words).replace(" ", "")
    if "…" in shown:
        assert everything.startswith(shown.removesuffix("…"))
    else:
        assert shown == everything


# ---- features


def feature_model(mode: str, masked_tokens: str, width: int = 11) -> JepaForRepresentationPrediction:
    encoder = FeatureEncoderConfig(width, mode=mode, patch_size=2, max_position_embeddings=32, **SIZES)
    model = JepaForRepresentationPrediction(JepaConfig(encoder, masked_tokens=masked_tokens, pred_num_hidden_layers=1))
    model.set_standardization(torch.arange(width) * 1.0, torch.arange(width) + 1.0)
    return model


def feature_batch(model: JepaForRepresentationPrediction, masks: int, lengths: list[int]) -> Batch:
    config = model.context_encoder.config
    rng = np.random.default_rng(0)
    shapes = [(length, config.input_dim) if config.mode == "time" else (config.input_dim,) for length in lengths]
    collator = DataCollatorForFeatureJEPA(
        config,
        masked_tokens=model.config.masked_tokens,
        num_masks=masks,
        mean_span_length=2,
        fill_values=model.context_encoder.feature_mean.numpy(),
        on_too_short="skip",
    )
    return collator([{"features": rng.normal(3, 2, shape)} for shape in shapes])


def shaded(axis: Axes, sample: int | None, width: int) -> np.ndarray:
    """bool `[width]`: the columns that are shaded, in one row of cells or (None) from top to bottom."""
    actual = np.zeros(width, dtype=bool)
    for patch in axis.patches:
        assert isinstance(patch, Rectangle)
        assert patch.get_hatch()
        if sample is None or patch.get_y() == sample - 0.5:
            start = patch.get_x() + 0.5
            actual[round(start) : round(start + patch.get_width())] = True
    return actual


@pytest.mark.parametrize(
    ("mode", "masked_tokens"), [("patches", "drop"), ("patches", "mask_token"), ("flat", "mask_token")]
)
@pytest.mark.parametrize("masks", [1, 3])
def test_hidden_features_of_vectors_are_shaded(
    mode: str, masked_tokens: str, masks: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    """The cells are the standardised values; shaded are those that the context does not show, and no others."""
    model = feature_model(mode, masked_tokens)
    batch = feature_batch(model, masks, [0] * 5)
    plot_masks(model, batch, tmp_path / "masks.png")
    values = (batch["features"].numpy() - np.arange(11)) / (np.arange(11) + 1)
    maps = drawn[0].axes[:masks]
    for mask, axis in enumerate(maps):
        np.testing.assert_allclose(axis.images[0].get_array(), values, rtol=1e-5, atol=1e-6)
        assert axis.get_title() == (f"mask {mask + 1} of 3" if masks > 1 else "")
        for sample in range(5):
            if masked_tokens == "mask_token":
                view = batch["context_features"].reshape(5, masks, 11)[sample, mask]
                expected = (view != batch["features"][sample]).numpy()
            else:
                patches = flags(batch["target_positions"][sample, mask], batch["target_valid"][sample, mask], 6)
                expected = patches.repeat(2)[:11]
            assert 0 < expected.sum() < 11
            np.testing.assert_array_equal(shaded(axis, sample, 11), expected)


@pytest.mark.parametrize("masked_tokens", ["drop", "mask_token"])
@pytest.mark.parametrize("masks", [1, 2])
def test_hidden_steps_of_series_are_shaded(masked_tokens: str, masks: int, tmp_path: Path, drawn: list[Figure]) -> None:
    """A panel per sample and mask, features by steps; padding has no values, and is in the legend."""
    model, lengths = feature_model("time", masked_tokens, width=3), [12, 1, 20]
    batch = feature_batch(model, masks, lengths)
    plot_masks(model, batch, tmp_path / "masks.png")
    axes = np.array(drawn[0].axes[: 3 * masks]).reshape(3, masks)
    for sample, length in enumerate(lengths):
        values = (batch["features"][sample, :length].numpy() - np.arange(3)) / (np.arange(3) + 1)
        for mask, axis in enumerate(axes[sample]):
            cells = axis.images[0].get_array()
            np.testing.assert_allclose(cells[:, :length], values.T, rtol=1e-5, atol=1e-6)
            assert np.ma.getmaskarray(cells)[:, length:].all()
            hidden = flags(batch["target_positions"][sample, mask], batch["target_valid"][sample, mask], 20)
            np.testing.assert_array_equal(shaded(axis, None, 20), hidden)
            assert hidden.any() == (length > 1)
            assert names(axis) == ([] if length > 1 else ["too short to be masked, skipped"])
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["hidden from the context, to be predicted", "padding"]


# ---- all


def cases() -> list[tuple[JepaForRepresentationPrediction, Any, list[dict[str, Any]], Any]]:
    """Of each modality: model, collator, eight rows, and what reads them."""
    images, model = image_collator(), feature_model("patches", "drop")
    tokenizer = tiny_tokenizer("bert")
    ids = tokenizer(CORPUS[:8])["input_ids"]
    vectors = np.random.default_rng(0).normal(size=(8, 11))
    return [
        (MODEL, images, [{"image": pixels(seed)} for seed in range(8)], images.image_processor),
        (tiny_jepa(), DataCollatorForSpanJEPA(tokenizer), [{"input_ids": row} for row in ids], tokenizer),
        (
            model,
            DataCollatorForFeatureJEPA(model.context_encoder.config),
            [{"features": row} for row in vectors],
            None,
        ),
    ]


@pytest.mark.parametrize("case", cases(), ids=["images", "text", "features"])
def test_a_data_set_is_read_no_further_than_its_picture_goes(case: tuple[Any, ...], tmp_path: Path) -> None:
    """The first rows, as one collated batch, of which the picture is the same; also where there are fewer."""
    model, collator, rows, tool = case
    taken = iter(rows)
    write_masks(model, collator, taken, tmp_path / "masks.png", tool, rows=3)
    assert len(list(taken)) == 5
    picture = (tmp_path / "masks.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(imread(tmp_path / "masks.png").shape[:2]) > 100
    plot_masks(model, collator(rows[:3]), tmp_path / "batch.png", tool)
    assert (tmp_path / "batch.png").read_bytes() == picture
    plot_masks(model, collator(rows[:4]), tmp_path / "more.png", tool)
    assert (tmp_path / "more.png").read_bytes() != picture
    write_masks(model, collator, rows[:1], tmp_path / "one.png", tool)
    assert (tmp_path / "one.png").read_bytes() != picture


@pytest.mark.parametrize("case", cases()[:2], ids=["images", "text"])
def test_without_what_reads_the_samples_it_says_what_is_missing(case: tuple[Any, ...], tmp_path: Path) -> None:
    model, collator, rows, _ = case
    with pytest.raises(UsageError, match=r"needs their (image processor|tokenizer)\. Pass it as processing_class"):
        plot_masks(model, collator(rows), tmp_path / "masks.png")
    assert not (tmp_path / "masks.png").exists()
