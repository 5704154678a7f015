"""Tests of embedding files: order of rows, columns, parts, and resuming."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.batches import tiny_jepa
from helpers.tiny_models import CORPUS, tiny_tokenizer, write_lines
from jepa_hf import UsageError
from jepa_hf.data.arguments import DataArguments
from jepa_hf.evaluation.embed_files import embed_files
from jepa_hf.evaluation.embedder import Embedder
from jepa_hf.evaluation.row_sources import RowSource, open_source
from jepa_hf.hub.export import export_run

from .test_embedder import feature_embedder, image_embedder, text_embedder

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _small_parts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jepa_hf.evaluation.row_sources._ROWS_PER_PART", dict.fromkeys(("text", "images", "features"), 7))
        yield


@pytest.fixture(autouse=True, scope="module")
def _somewhere(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("somewhere"))
        yield


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return text_embedder()


def texts_of(files: str, **columns: Any) -> RowSource:
    return open_source("text", DataArguments(train_file=files, **columns))


def new(name: str) -> str:
    """A file name that does not exist."""
    Path(name).unlink(missing_ok=True)
    return name


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format of the file's ending."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
    elif name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        write_lines(name, lines)
    else:
        write_lines(name, map(json.dumps, rows))
    return name


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_each_row_s_embedding_is_that_of_sentence_transformers(kind: str, ending: str, tmp_path: Path) -> None:
    """In the order of the rows, blank ones included."""
    from sentence_transformers import SentenceTransformer

    texts = [*CORPUS[:16], "", "  Blanks first.", " ".join(CORPUS[:30]), *CORPUS[30:34]]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    name = f"data.{kind}"
    if kind == "txt":
        write_lines(name, texts)
    elif kind == "txt.gz":
        Path(name).write_bytes(gzip.compress("".join(f"{text}\n" for text in texts).encode()))
    elif kind == "json":
        Path(name).write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_rows(name, rows)
    export_run(tiny_jepa("bert"), tmp_path / "model", tiny_tokenizer("bert"))
    expected = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    embedder = Embedder.from_pretrained(tmp_path / "model", device="cpu", batch_size=4)
    assert embed_files(embedder, texts_of(name), tmp_path / f"out{ending}") == 32
    if ending == ".npy":
        actual = np.load(tmp_path / "out.npy")
    else:
        table = pq.read_table(tmp_path / "out.parquet")
        actual = np.array(table["embedding"].to_pylist(), dtype=np.float32)
        assert table.schema.field("embedding").type.value_type == pa.float32()
        assert table["text"].to_pylist() == texts
        if "txt" not in kind:
            ids = [str(number) if kind == "csv" else number for number in range(len(texts))]
            assert table["id"].to_pylist() == ids
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", f"out{ending}"]


def test_columns_keep_their_values(embedder: Embedder) -> None:
    """Of JSON: numbers stay numbers, and what has no one type becomes JSON; a null text is an empty one."""
    rows = [
        {"text": "one", "score": 1, "flag": True, "mixed": 1, "deep": {"a": [1]}, "big": 2**70},
        {"text": None, "score": 0.5, "flag": None, "mixed": "x", "deep": None, "big": 1},
        *({"text": text, "score": None} for text in CORPUS[:9]),
        {"text": "last \ud800", "score": 2, "new": "only here"},
    ]
    embed_files(embedder, texts_of(write_rows("columns.jsonl", rows)), "columns.parquet")
    table = pq.read_table("columns.parquet")
    assert table.column_names == ["text", "score", "flag", "mixed", "deep", "big", "new", "embedding"]
    assert table["score"].to_pylist() == [1.0, 0.5, *[None] * 9, 2.0]
    assert table["mixed"].to_pylist()[:2] == ["1", "x"]
    assert table["deep"].to_pylist()[:2] == ['{"a": [1]}', None]
    assert table["big"].to_pylist()[:2] == [str(2**70), "1"]
    assert table["flag"].to_pylist()[:2] == [True, None]
    assert table["new"].to_pylist()[-1] == "only here"
    assert (table["text"].to_pylist()[1], table["text"].to_pylist()[-1]) == (None, "last \ufffd")
    np.testing.assert_allclose(table["embedding"].to_pylist()[1], embedder.embed([""])["mean"][0], atol=1e-5)


def test_the_types_of_parquet_stay(embedder: Embedder) -> None:
    table = pa.table(
        {
            "when": pa.array(range(20), pa.timestamp("ms")),
            "name": pa.array(["a", "b"] * 10).dictionary_encode(),
            "sentence": CORPUS[:20],
            "lists": [[number] for number in range(20)],
        }
    )
    pq.write_table(table, "types.parquet", row_group_size=9)
    embed_files(embedder, texts_of("types.parquet", text_column_name="sentence"), "typed.parquet")
    assert pq.read_table("typed.parquet").drop_columns("embedding").equals(table)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_no_row_is_lost_or_moved(texts: list[str]) -> None:
    """Also with lone surrogates and line breaks."""
    embedder = text_embedder()
    source = texts_of(write_rows("any.jsonl", [{"text": text} for text in texts]))
    embed_files(embedder, source, new("any.npy"))
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    np.testing.assert_allclose(np.load("any.npy"), embedder.embed(clean)["mean"], atol=1e-5)


class FailingEmbedder(Exception):
    pass


class CountingEmbedder:
    """An embedder that counts its parts and fails after N of them."""

    def __init__(self, embedder: Embedder, dies_after: int = 10**9):
        self.embedder, self.name = embedder, embedder.name
        self.dies_after, self.sizes = dies_after, []

    def embed_list(self, samples: list[str], pooling: tuple[str, ...], **names: Any) -> dict[str, np.ndarray]:
        if len(self.sizes) == self.dies_after:
            raise FailingEmbedder
        self.sizes.append(len(samples))
        return self.embedder.embed_list(samples, pooling, **names)


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_the_same_call_continues_after_the_complete_parts(ending: str, embedder: Embedder) -> None:
    """A part that was torn is made again; no more than a part's rows are embedded at once."""
    write_lines("data.txt", CORPUS[:30])
    embed_files(embedder, texts_of("data.txt"), f"whole{ending}")
    first = CountingEmbedder(embedder, dies_after=3)
    with pytest.raises(FailingEmbedder):
        embed_files(first, texts_of("data.txt"), f"out{ending}")
    assert not Path(f"out{ending}").exists()
    torn = Path(f"out{ending}.parts/part-000001{ending}")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    second = CountingEmbedder(embedder)
    embed_files(second, texts_of("data.txt"), f"out{ending}")
    assert (first.sizes, second.sizes) == ([7, 7, 7], [7, 7, 2])
    assert Path(f"out{ending}").read_bytes() == Path(f"whole{ending}").read_bytes()
    assert not Path(f"out{ending}.parts").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pooling": "cls"}, "with other pooling"),
        ({"settings": {"model": "another"}}, "with other model"),
        ({"files": "more.txt"}, "with other files"),
    ],
)
def test_parts_of_another_embedding_are_not_mixed_in(change: dict[str, Any], sentence: str, embedder: Embedder) -> None:
    if not Path("one.txt").exists():
        write_lines("one.txt", CORPUS[:30])
        write_lines("more.txt", CORPUS[:31])
    first = {"pooling": "mean", "settings": {"model": "one"}, "files": "one.txt"}
    with pytest.raises(FailingEmbedder):
        embed_files(CountingEmbedder(embedder, 2), texts_of("one.txt"), "half.npy", first["pooling"], first["settings"])
    before = sorted(Path("half.npy.parts").iterdir())
    then = {**first, **change}
    with pytest.raises(UsageError, match=rf"'half.npy.parts' holds parts of another embedding \({sentence}"):
        embed_files(embedder, texts_of(then["files"]), "half.npy", then["pooling"], then["settings"])
    assert sorted(Path("half.npy.parts").iterdir()) == before
    for path in before:  # the next case begins anew
        path.unlink()


@pytest.mark.parametrize("damaged", [4, 8])
def test_a_damaged_image_is_named_and_its_repair_is_read(damaged: int) -> None:
    """Without a finished part no folder of parts is left, so that the same call reads the repaired folder."""
    folder = Path(f"damaged{damaged}")
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{number}.png")
    content = (folder / f"{damaged}.png").read_bytes()
    (folder / f"{damaged}.png").write_bytes(b"no image")
    output, embedder = f"{folder}.npy", image_embedder()
    with pytest.raises(UsageError, match=rf"Sample \d \('{folder}/{damaged}.png'\) is an image that PIL cannot"):
        embed_files(embedder, open_source("images", DataArguments(train_file=str(folder))), output)
    assert Path(f"{output}.parts").exists() == (damaged > 7)
    if damaged < 7:
        (folder / f"{damaged}.png").write_bytes(content)
        embed_files(embedder, open_source("images", DataArguments(train_file=str(folder))), output)
        assert len(np.load(output)) == 9


def test_images_keep_their_paths() -> None:
    """And the names of their folders as labels."""
    Path("pictures/below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    names = [f"pictures/{'below/' if number > 4 else ''}{number}.png" for number in range(9)]
    for name, picture in zip(names, pixels, strict=True):
        Image.fromarray(picture).save(name)
    embedder = image_embedder()
    embed_files(embedder, open_source("images", DataArguments(train_file="pictures")), "pictures.parquet")
    table = pq.read_table("pictures.parquet")
    assert table["label"].to_pylist() == [Path(path).parent.name for path in table["path"].to_pylist()]
    order = [names.index(path) for path in table["path"].to_pylist()]
    assert sorted(order) == list(range(9))
    np.testing.assert_allclose(table["embedding"].to_pylist(), embedder.embed(list(pixels[order]))["mean"], atol=1e-5)


@pytest.mark.parametrize("kind", ["npy", "csv"])
@pytest.mark.parametrize("mode", ["patches", "time"])
def test_features_are_numbered(kind: str, mode: str) -> None:
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    name = f"features.{kind}"
    if mode == "time" and kind == "npy":
        np.save(name, values := values[:, None].repeat(4, axis=1))
    elif kind == "npy":
        np.save(name, values)
    elif mode == "patches":
        write_lines(name, ["a,b,c", *(",".join(map(repr, map(float, row))) for row in values)])
    else:
        name = write_rows(
            "features.jsonl", [{"x": [[float(v) for v in row]] * (1 + at % 4)} for at, row in enumerate(values)]
        )
        values = [np.tile(row, (1 + at % 4, 1)) for at, row in enumerate(values)]
    embedder = feature_embedder(mode)
    embed_files(embedder, open_source("features", DataArguments(train_file=name)), new("features.parquet"))
    table = pq.read_table("features.parquet")
    assert table["row"].to_pylist() == list(range(20))
    np.testing.assert_allclose(table["embedding"].to_pylist(), embedder.embed(list(values))["mean"], atol=1e-5)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "npz"])
def test_features_keep_their_other_columns(kind: str) -> None:
    """Labels, names and row numbers; the columns of the encoder are found by name, in files of other orders."""
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    others = {"name": [f"row {row}" for row in range(20)], "target": list(range(20))}
    if kind == "npz":
        np.savez("kept.npz", features=values, **others)
    else:
        columns = {name: values[:, at].tolist() for at, name in enumerate("abc")}
        first = {"c": columns["c"], **others, "b": columns["b"], "a": columns["a"]}
        for part, table in enumerate((first, {**columns, **others})):
            rows = [
                dict(zip(table, row, strict=True)) for row in list(zip(*table.values(), strict=True))[part * 12 :][:12]
            ]
            write_rows(f"kept{part}.{kind}", rows)
    embedder = feature_embedder("patches")
    names = None if kind == "npz" else list("abc")
    embedder.encoder.config.feature_column_names = names
    source = open_source("features", DataArguments(train_file=f"kept*.{kind}"), names)
    embed_files(embedder, source, new("other_columns.parquet"))
    table = pq.read_table("other_columns.parquet")
    assert table.column_names == ["row", "name", "target", "embedding"]
    assert table["name"].to_pylist() == others["name"]
    assert list(map(int, table["target"].to_pylist())) == others["target"]
    np.testing.assert_allclose(table["embedding"].to_pylist(), embedder.embed(values)["mean"], atol=1e-5)


def test_image_tables_keep_their_other_columns() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    files = [io.BytesIO() for _ in pixels]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file, "PNG")
    cells = [{"bytes": file.getvalue(), "path": f"{row}.png"} for row, file in enumerate(files)]
    pq.write_table(pa.table({"label": range(9), "img": cells, "note": ["x"] * 9}), "table.parquet")
    embedder = image_embedder()
    embed_files(embedder, open_source("images", DataArguments(train_file="table.parquet")), new("images.parquet"))
    table = pq.read_table("images.parquet")
    assert table.column_names == ["path", "label", "note", "embedding"]
    assert table["path"].to_pylist() == [f"{row}.png" for row in range(9)]
    assert table["label"].to_pylist() == list(range(9))
    np.testing.assert_allclose(table["embedding"].to_pylist(), embedder.embed(pixels)["mean"], atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 10, 99])
def test_only_the_first_rows_are_embedded(size: int, embedder: Embedder) -> None:
    write_lines("limited.txt", CORPUS[:20])
    source = open_source("text", DataArguments(train_file="limited.txt"), max_samples=size)
    assert source.count == min(size, 20)
    embed_files(embedder, source, new("limited.npy"))
    expected = embedder.embed(CORPUS[: min(size, 20)])["mean"]
    np.testing.assert_allclose(np.load("limited.npy"), expected, atol=1e-5)


def test_a_row_of_wrong_shape_is_reported_with_its_number() -> None:
    np.save("narrow.npy", np.ones((20, 2), dtype=np.float32))
    source = open_source("features", DataArguments(train_file="narrow.npy"))
    with pytest.raises(UsageError, match="In the rows from 1 on: Expected features of shape"):
        embed_files(feature_embedder("patches"), source, "narrow_out.npy")
