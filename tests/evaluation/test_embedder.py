"""Tests of `Embedder`: reference values, independence of batches, all modalities, error messages."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    GPT2Model,
    IJepaConfig,
    T5Config,
    T5Model,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from helpers.batches import image_config, scale_weights, tiny_jepa
from helpers.tiny_models import CORPUS, FAMILIES, save_tiny_encoder, tiny_config, tiny_tokenizer
from jepa_hf import FeatureEncoderConfig, FeatureEncoderModel, JepaForRepresentationPrediction, UsageError
from jepa_hf.data.file_readers import log_once
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.evaluation.names import POOLINGS
from jepa_hf.hub.export import export_run

torch.set_num_threads(1)

TEXTS = CORPUS[:12]
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


def text_embedder(family: str = "bert", **kwargs: Any) -> Embedder:
    return Embedder(tiny_jepa(family).get_encoder(), tiny_tokenizer(family), name=family, device="cpu", **kwargs)


def image_processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 8, "width": 8})


def image_embedder(config: Any = None, **kwargs: Any) -> Embedder:
    encoder = AutoModel.from_config(image_config() if config is None else config)
    scale_weights(encoder)
    return Embedder(encoder, image_processor(), name="images", device="cpu", **kwargs)


def feature_embedder(mode: str, **kwargs: Any) -> Embedder:
    config = FeatureEncoderConfig(
        3, mode=mode, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=1, hidden_dropout_prob=0.0
    )
    encoder = FeatureEncoderModel(config)
    scale_weights(encoder)
    return Embedder(encoder, name=mode, device="cpu", **kwargs)


def series(count: int = 9) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(1 + number % 5, 3)) for number in range(count)]


@pytest.fixture(scope="module")
def embedders() -> dict[str, tuple[Embedder, list[Any]]]:
    """One of each kind, with samples of different lengths where there are any."""
    return {
        "text": (text_embedder(), TEXTS),
        "images": (image_embedder(), list(PIXELS)),
        "vectors": (feature_embedder("patches"), [row[0] for row in series()]),
        "series": (feature_embedder("time"), series()),
    }


@pytest.mark.parametrize("kind", ["text", "images", "vectors", "series"])
@given(data=st.data(), batch_size=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_neither_batches_nor_order_change_a_sample_s_vectors(
    kind: str, data: st.DataObject, batch_size: int, embedders: dict[str, tuple[Embedder, list[Any]]]
) -> None:
    embedder, samples = embedders[kind]
    poolings = POOLINGS if kind in ("text", "images") else ("mean", "layers")
    order = data.draw(st.permutations(range(len(samples))))
    embedder.batch_size = 1
    alone = embedder.embed(samples, poolings)
    embedder.batch_size = batch_size
    together = embedder.embed([samples[at] for at in order], poolings)
    for name in poolings:
        assert together[name].dtype == np.float32
        np.testing.assert_allclose(together[name], alone[name][order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_pooling_is_that_of_sentence_transformers(family: str, tmp_path: Path) -> None:
    """Also for truncated texts and texts that begin with blanks."""
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, " ".join(CORPUS[:30]), "  Blanks first.", "x"]
    export_run(tiny_jepa(family), tmp_path, tiny_tokenizer(family))
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    actual = Embedder.from_pretrained(tmp_path, device="cpu", batch_size=4).embed(texts)["mean"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_cls_and_layers_pooling() -> None:
    embedder = text_embedder("distilbert")
    actual = embedder.embed(TEXTS[:3], ("cls", "layers"))
    for row, text in enumerate(TEXTS[:3]):
        output = embedder.encoder(**tiny_tokenizer("distilbert")(text, return_tensors="pt"), output_hidden_states=True)
        np.testing.assert_allclose(actual["cls"][row], output.last_hidden_state[0, 0], rtol=1e-4, atol=1e-5)
        last = output.hidden_states[2][0]  # the upper half of two layers is the second
        normalised = (last - last.mean(-1, keepdim=True)) / (last.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        np.testing.assert_allclose(actual["layers"][row], normalised.mean(0), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_mean_of_an_image_is_over_its_patches() -> None:
    """Without [CLS] and register tokens; I-JEPA has none."""
    for config in (image_config(), IJepaConfig(**image_config().to_dict())):
        embedder = image_embedder(config)
        pixels = embedder.processing_class(list(PIXELS), return_tensors="pt")["pixel_values"]
        patches = embedder.encoder(pixel_values=pixels).last_hidden_state[:, -16:]
        np.testing.assert_allclose(embedder.embed(list(PIXELS))["mean"], patches.mean(1), rtol=1e-4, atol=1e-4)


def test_images_may_come_in_every_form(tmp_path: Path) -> None:
    pictures = [Image.fromarray(array) for array in PIXELS]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    stored = [{"bytes": None, "path": str(tmp_path / f"{number}.png")} for number in range(9)]
    embedder = image_embedder()
    expected = embedder.embed(list(PIXELS))["mean"]
    np.testing.assert_array_equal(embedder.embed(pictures)["mean"], expected)
    np.testing.assert_array_equal(embedder.embed(stored)["mean"], expected)


def test_one_sample_gives_one_vector(tmp_path: Path) -> None:
    """As in sentence-transformers; of each modality, in every form that a sample may have."""
    text, texts = text_embedder(), TEXTS[:1]
    for sample in (texts[0], np.str_(texts[0]), np.array(texts[0])):
        np.testing.assert_array_equal(text.embed(sample, "mean")["mean"], text.embed(texts)["mean"][0])
    image, expected = image_embedder(), None
    Image.fromarray(PIXELS[0]).save(tmp_path / "0.png")
    expected = image.embed([PIXELS[0]])["mean"][0]
    path = tmp_path / "0.png"
    stored = {"bytes": path.read_bytes(), "path": None}
    for sample in (PIXELS[0], Image.fromarray(PIXELS[0]), path, str(path), path.read_bytes(), stored):
        np.testing.assert_array_equal(image.embed(sample)["mean"], expected)
    assert image.embed(PIXELS[0, ..., 0])["mean"].shape == expected.shape
    vectors, row = feature_embedder("patches"), series()[0][0]
    for sample in (row, row.tolist(), tuple(row), torch.tensor(row)):
        np.testing.assert_allclose(vectors.embed(sample)["mean"], vectors.embed([row])["mean"][0], atol=1e-6)
    steps, one = feature_embedder("time"), series()[3]
    for sample in (one, one.tolist(), torch.tensor(one)):
        np.testing.assert_allclose(steps.embed(sample)["mean"], steps.embed([one])["mean"][0], atol=1e-6)


def test_samples_come_in_every_container() -> None:
    """Iterators, arrays and columns of tables are lists of samples."""
    embedder = text_embedder()
    expected = embedder.embed(TEXTS)["mean"]
    columns = (pd.Series(TEXTS, index=range(5, 17)), Dataset.from_dict({"text": TEXTS})["text"])
    for samples in (tuple(TEXTS), iter(TEXTS), (text for text in TEXTS), np.array(TEXTS), *columns):
        np.testing.assert_array_equal(embedder.embed(samples)["mean"], expected)
    np.testing.assert_array_equal(image_embedder().embed(PIXELS)["mean"], image_embedder().embed(list(PIXELS))["mean"])
    embedder, rows = feature_embedder("patches"), np.stack([row[0] for row in series()])
    for samples in (rows, rows.tolist(), torch.tensor(rows), iter(rows)):
        np.testing.assert_allclose(embedder.embed(samples)["mean"], embedder.embed(list(rows))["mean"], atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (Path("a.txt"), "Expected a text or a list of texts, got PosixPath. To embed files, use jepa-hf embed."),
        (b"text", "got bytes"),
        (None, "got NoneType"),
        (7, "got int"),
        ({"text": "a"}, "got dict"),
        ({"a", "b"}, "got set"),
        (pd.DataFrame({"text": TEXTS}), "got DataFrame. Give one of its columns, such as data['text']."),
        (Dataset.from_dict({"text": TEXTS}), "got Dataset. Give one of its columns"),
        ([], "Got no samples"),
        (iter([]), "Got no samples"),
        (np.array([]), "Got no samples"),
        (["a", None], "'bert' reads texts, but sample 2 is NoneType"),
        (["a", float("nan")], "'bert' reads texts, but sample 2 is float"),
        ([["a"]], "'bert' reads texts, but sample 1 is list"),
    ],
)
def test_no_text_is_one_sentence(samples: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        text_embedder().embed(samples)


def named_embedder(names: list[str] | None) -> Embedder:
    embedder = feature_embedder("patches")
    embedder.encoder.config.feature_column_names = names
    return embedder


def test_columns_of_features_are_found_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """In tables of any kind, in any order, among others, which are named once; a missing one is refused."""
    embedder, rows = named_embedder(["x", "y", "z"]), np.stack([row[0] for row in series()]).astype(np.float32)
    expected = embedder.embed(rows)["mean"]
    frame = pd.DataFrame(rows, columns=["x", "y", "z"])[["z", "x", "y"]].assign(id="a", w=1.0)
    with caplog.at_level(logging.INFO, "jepa_hf"):
        for samples in (frame, Dataset.from_pandas(frame), frame.to_dict("records")):
            np.testing.assert_allclose(embedder.embed(samples)["mean"], expected, atol=1e-6)
        for row in (frame.iloc[0].to_dict(), frame.iloc[0], next(frame.itertuples(index=False))):
            np.testing.assert_allclose(embedder.embed(row)["mean"], expected[0], atol=1e-6)
        for samples in (list(frame.itertuples(index=False)), [row for _, row in frame.iterrows()]):
            np.testing.assert_allclose(embedder.embed(samples)["mean"], expected, atol=1e-6)
        caplog.clear()
        for _ in range(2):
            other = embedder.embed(np.c_[rows, rows][:, [5, 2, 0, 1]], feature_column_names=["w", "z", "x", "y"])
            np.testing.assert_allclose(other["mean"], expected, atol=1e-6)
    assert caplog.messages == ["patches does not read the columns w"]
    for repeated in (
        lambda: embedder.embed(pd.concat([frame, frame["y"]], axis=1)),
        lambda: embedder.embed(np.c_[rows, rows[:, :1]], feature_column_names=["x", "y", "z", "x"]),
    ):
        with pytest.raises(UsageError, match="more than once"):
            repeated()
    with pytest.raises(UsageError, match="No column 'y' in the samples, which lacks 1 of the 3 columns"):
        embedder.embed(frame.drop(columns="y"))
    with pytest.raises(UsageError, match=r"'patches' reads the column 'y', which the features lack, as 1 of its 3"):
        embedder.embed(rows, feature_column_names=["x", "Y", "z"])
    with pytest.raises(UsageError, match="Expected 4 features, as feature_column_names has, got the shape"):
        embedder.embed(rows, feature_column_names=["w", "z", "x", "y"])
    with pytest.raises(UsageError, match=r"got \[2\] in sample 1. Give the columns it was trained on: x, y, z."):
        embedder.embed(rows[:, :2])


def test_lost_differences_of_raw_features_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Numbers that float32 makes equal: as in tables, a warning for one column, and an error for all that vary."""
    embedder = named_embedder(["x", "y", "z"])
    rows = np.random.default_rng(0).normal(size=(20, 3))
    rows[:, 1] = 1.7e9 + np.arange(20)
    with caplog.at_level(logging.WARNING, "jepa_hf"):
        for samples in (rows, rows.tolist(), torch.from_numpy(rows), [list(row) for row in rows]):
            log_once.cache_clear()
            caplog.clear()
            embedder.embed(samples)
            assert "In the samples, float32 loses the differences between the values of 1 column ('y')" in caplog.text
        caplog.clear()
        embedder.embed(rows.astype(np.float32))  # whose differences were lost before
        embedder.embed(rows - rows.mean(axis=0))
    assert not caplog.messages
    with pytest.raises(UsageError, match=r"In the samples, float32 loses .* 3 columns \('x', 'y', 'z'\)"):
        embedder.embed(rows + 1e12)
    with pytest.raises(UsageError, match=r"1 column \(number 2\)"):
        feature_embedder("time").embed([rows[:, [1, 1, 1]] * [0, 1, 0]])


def test_series_come_in_tables_too() -> None:
    """A column of lists of lists, among others, by its name; a row as a dict."""
    embedder = feature_embedder("time")
    embedder.encoder.config.feature_column_names = ["steps"]
    rows = [row.tolist() for row in series()]
    frame = pd.DataFrame({"id": range(9), "other": rows[::-1], "steps": rows})
    np.testing.assert_allclose(embedder.embed(frame)["mean"], embedder.embed(series())["mean"], atol=1e-6)
    found = embedder.embed({"steps": rows[3]})["mean"]
    np.testing.assert_allclose(found, embedder.embed(series()[3])["mean"], atol=1e-6)


def test_an_encoder_without_names_reads_columns_in_their_order(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.stack([row[0] for row in series()])
    embedder = named_embedder(None)
    with caplog.at_level(logging.INFO, "jepa_hf"):
        found = embedder.embed(rows, feature_column_names=["c", "b", "a"])
    np.testing.assert_array_equal(found["mean"], embedder.embed(rows)["mean"])
    assert "patches was trained without column names; columns are read in the order of the table" in caplog.messages


def test_features_are_pooled_as_the_encoder_itself_pools_them() -> None:
    embedder = feature_embedder("time")
    expected = [
        embedder.encoder(features=torch.tensor(row, dtype=torch.float32)[None]).pooler_output[0].detach()
        for row in series()
    ]
    np.testing.assert_allclose(embedder.embed(series())["mean"], torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modality", ["text", "images", "features"])
def test_a_run_directory_gives_its_context_encoder(modality: str, tmp_path: Path) -> None:
    """`out/` and `out/jepa/` give the trained context encoder."""
    from jepa_hf import JepaConfig

    encoder, processor, samples = {
        "text": (tiny_config("bert"), tiny_tokenizer("bert"), TEXTS),
        "images": (image_config(), image_processor(), list(PIXELS)),
        "features": (
            FeatureEncoderConfig(3, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
            None,
            [row[0] for row in series()],
        ),
    }[modality]
    model = JepaForRepresentationPrediction(JepaConfig.for_encoder(encoder, pred_num_hidden_layers=1)).eval()
    scale_weights(model)
    export_run(model, tmp_path, processor)
    context, target = (
        Embedder(model.get_encoder(which), processor, device="cpu").embed(samples)["mean"]
        for which in ("context", "target")
    )
    assert np.abs(context - target).max() > 0.01
    for folder in (tmp_path, tmp_path / "jepa"):
        embedder = Embedder.from_pretrained(folder, device="cpu")
        assert (embedder.modality, embedder.name) == (modality, str(folder))
        np.testing.assert_allclose(embedder.embed(samples)["mean"], context, rtol=1e-4, atol=1e-5)


def test_a_shorter_limit_cuts_texts() -> None:
    long, short = text_embedder(), text_embedder(max_seq_length=6)
    assert long.max_seq_length == 128
    assert np.abs(long.embed(TEXTS)["mean"] - short.embed(TEXTS)["mean"]).max() > 0.01
    ids = tiny_tokenizer("bert")(TEXTS[5], truncation=True, max_length=6, return_tensors="pt")
    with torch.no_grad():
        expected = short.encoder(**ids).last_hidden_state.mean(1)[0]
    np.testing.assert_allclose(short.embed(TEXTS[5:6])["mean"][0], expected, rtol=1e-4, atol=1e-5)


def broken() -> Embedder:
    embedder = text_embedder()
    with torch.no_grad():
        next(embedder.encoder.parameters()).fill_(float("nan"))
    return embedder


NAN = [np.array([1.0, float("nan"), 0.0])]


@pytest.mark.parametrize(
    ("embedder", "samples", "pooling", "sentence"),
    [
        (text_embedder, [], "mean", "Got no samples to embed"),
        (text_embedder, ["a", 3], "mean", "'bert' reads texts, but sample 2 is int"),
        (text_embedder, ["a"], "max", "Expected pooling to be one of mean, cls, layers, got 'max'"),
        (
            lambda: image_embedder(IJepaConfig(**image_config().to_dict())),
            list(PIXELS),
            "cls",
            "'images' puts no \\[CLS\\] token first. Choose the pooling mean or layers",
        ),
        (lambda: feature_embedder("time"), series(), "cls", "'time' puts no \\[CLS\\] token first"),
        (lambda: feature_embedder("patches"), NAN, "mean", "Sample 1 has a number that is not finite"),
        (
            lambda: feature_embedder("patches"),
            series(),
            "mean",
            "Expected features of shape \\[3\\] for 'patches', got \\[1, 3\\] in sample 1",
        ),
        (lambda: feature_embedder("patches"), ["text"], "mean", "sample 1 is not a rectangular array of numbers"),
        (image_embedder, PIXELS[0].transpose(2, 0, 1), "mean", r"Sample 1 holds uint8 of shape \(3, 8, 8\).*transpose"),
        (image_embedder, [PIXELS[0] / 255], "mean", r"Sample 1 holds float64 of shape .*by \(array \* 255\)"),
        (
            image_embedder,
            [Image.new("I", (8, 8))],
            "mean",
            "Sample 1 holds a PIL image of mode 'I', numbers of unknown",
        ),
        (image_embedder, [7], "mean", "Sample 1 holds int, not an image"),
        (image_embedder, ["no.png"], "mean", r"Sample 1 \('no.png'\) cannot be read: No such file"),
        (
            image_embedder,
            [{"bytes": b"no", "path": None}],
            "mean",
            "Sample 1 is an image that PIL cannot identify. Fix it",
        ),
        (broken, TEXTS, "mean", "'bert' gives representations that are not finite"),
        (lambda: text_embedder(batch_size=0), TEXTS, "mean", "Expected batch_size to be at least 1, got 0"),
        (lambda: text_embedder(max_seq_length=500), TEXTS, "mean", "Expected max_seq_length from 1 to 128"),
        (
            lambda: image_embedder(image_config(image_size=16)),
            list(PIXELS),
            "mean",
            "'images' cannot read its own input",
        ),
    ],
)
def test_what_cannot_be_embedded_is_one_sentence(embedder: Any, samples: Any, pooling: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        embedder().embed(samples, (pooling,))
    assert "\n" not in str(refusal.value)


TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)), "is a decoder \\(gpt2\\)"),
        (lambda: T5Model(T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=9)), "is an encoder-decoder \\(t5\\)"),
        (
            lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY, conv_dim=(8,) * 7, num_conv_pos_embedding_groups=2)),
            "reads input_values. Give an encoder of texts, images or feature vectors",
        ),
        (lambda: AutoModel.from_config(BertConfig(**TINY, vocab_size=9)), "lacks its tokenizer"),
        (lambda: AutoModel.from_config(image_config()), "cannot be loaded: .* image processor"),
    ],
    ids=["decoder", "encoder-decoder", "audio", "no tokenizer", "no image processor"],
)
def test_a_model_that_is_no_encoder_is_refused_in_one_sentence(model: Any, sentence: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=sentence) as refusal:
        Embedder.from_pretrained(tmp_path, device="cpu")
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_model_and_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        Embedder.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="neither a local directory nor a model on the Hub"):
        Embedder.from_pretrained(tmp_path / "nothing")
    folder = Path(save_tiny_encoder("bert", tmp_path / "bert"))
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match="cannot be loaded"):
        Embedder.from_pretrained(folder)
