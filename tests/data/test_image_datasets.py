"""Claims of jepa_hf/data/image_datasets.py."""

import io
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.image_datasets import load_image_datasets
from jepa_hf.errors import UsageError

ENDINGS = ("png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff", "ppm")
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a directory of its own, with its own cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(shade: int, ending: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(file, Image.registered_extensions()[f".{ending}"])
    return file.getvalue()


def write(*names: str) -> None:
    """Write images, each in the format of its ending and in a shade of its own."""
    for shade, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(encoded(shade, name.rpartition(".")[2].lower()))


def write_parquet(name: str, **columns: Any) -> str:
    """Write columns of images (as pairs of values and type) and others (as lists)."""
    arrays = {
        column: pa.array(*values) if isinstance(values, tuple) else pa.array(values)
        for column, values in columns.items()
    }
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays), name)
    return name


def cells(shades: range, path: str | None = None) -> tuple[list[dict[str, Any]], pa.DataType]:
    return [{"bytes": encoded(shade), "path": path} for shade in shades], STRUCT


def load(train_file: str | None = None, **arguments: Any) -> Dataset:
    train, validation = load_image_datasets(
        DataArguments(train_file=train_file, **arguments), seed=0, need_validation=False
    )
    assert validation is None
    return train


def both(train_file: str | None = None, seed: int = 0, **arguments: Any) -> tuple[Dataset, Dataset]:
    train, validation = load_image_datasets(
        DataArguments(train_file=train_file, **arguments), seed=seed, need_validation=True
    )
    assert validation is not None
    return train, validation


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    """The rows, after a look at their form."""
    assert dataset.features == datasets.Features({"image": datasets.Image(decode=False)})
    return dataset["image"][:]


def paths_of(dataset: Dataset) -> list[str]:
    rows = rows_of(dataset)
    assert all(row["bytes"] is None for row in rows)
    return [row["path"] for row in rows]


def shades_of(dataset: Dataset) -> list[int]:
    return [Image.open(io.BytesIO(row["bytes"])).getpixel((0, 0))[0] for row in rows_of(dataset)]


def test_a_folder_gives_all_its_images_sorted() -> None:
    """Of every known ending in any case, at any depth, under odd folder names; other and hidden files are left out."""
    names = [f"im [1]ages/{ending}/deep er/é.{ending}" for ending in ENDINGS]
    names += ["im [1]ages/A.PNG", "im [1]ages/b.JPeG"]
    write(*names)
    write("im [1]ages/.hidden.png", "im [1]ages/.cache/a.png", "im [1]ages/._A.PNG", "elsewhere/a.png")
    Path("im [1]ages/labels.csv").write_text("a,b")
    Path("im [1]ages/folder.png").mkdir()
    assert paths_of(load("im [1]ages")) == sorted(names)
    assert len(names) == len(ENDINGS) + 2


def test_links_repeat_no_folder(caplog: pytest.LogCaptureFixture) -> None:
    """A link to a folder outside is followed; one to a folder that is read already, or above, is counted instead."""
    write("images/a/1.png", "images/b/2.JPG", "elsewhere/3.png")
    for link, folder in (("a/loop", "images"), ("again", "images/b"), ("other", "elsewhere")):
        Path("images", link).symlink_to(Path(folder).absolute())
    Path("images/a/none.png").symlink_to("nothing.png")
    (Path("images") / "._1.png").write_bytes(b"a Mac's notes")
    Path("images/empty").mkdir()
    assert paths_of(load("images")) == ["images/a/1.png", "images/b/2.JPG", "images/other/3.png"]
    (message,) = caplog.messages
    assert message.startswith("'images': left out 3 of 6 images: ")
    assert all(f"1 {reason}" in message for reason in ("hidden", "links to nothing", "in a folder that a link repeats"))


@pytest.mark.parametrize("ending", ["jp2", "avif", "TGA", "pgm", "jfif", "dds", "ico", "qoi"])
def test_every_suffix_that_pil_decodes_is_found(ending: str) -> None:
    Path("images").mkdir()
    Path(f"images/a.{ending}").touch()
    Path("images/b.eps").touch()  # PIL would run another program
    Path("images/c.h5").touch()  # PIL knows the suffix, but decodes none
    assert paths_of(load("images")) == [f"images/a.{ending}"]


def test_folders_files_and_globs_can_be_joined() -> None:
    """Separated by commas, in this order, each file once."""
    write("b/2.png", "b/1.jpg", "a.png", "c/1.bmp", "c/2.bmp")
    assert paths_of(load("b, a.png, c/*.bmp, c/1.bmp")) == ["b/1.jpg", "b/2.png", "a.png", "c/1.bmp", "c/2.bmp"]


def test_nothing_is_decoded() -> None:
    """Files that are not images load like any other, from a folder and from parquet."""
    Path("images").mkdir()
    Path("images/a.png").write_bytes(b"no image")
    assert paths_of(load("images")) == ["images/a.png"]
    write_parquet("a.parquet", image=([{"bytes": b"no image", "path": "x.png"}], STRUCT))
    assert rows_of(load("a.parquet")) == [{"bytes": b"no image", "path": "x.png"}]


@pytest.mark.parametrize(
    "kind",
    [
        STRUCT,
        pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()}),
        pa.struct({"bytes": pa.binary(), "path": pa.string(), "width": pa.int64()}),
        pa.struct({"bytes": pa.binary()}),
        pa.binary(),
        pa.large_binary(),
    ],
    ids=str,
)
def test_parquet_columns_of_every_type_give_the_same_rows(kind: pa.DataType) -> None:
    """Structs with bytes and plain bytes, with further columns; nulls stay nulls."""
    data = [encoded(1), encoded(2)]
    values = [{"bytes": value} for value in data] if pa.types.is_struct(kind) else data
    write_parquet("a.parquet", image=([*values, None], kind), label=[1, 2, 3], note=["a", "b", "c"])
    expected = [{"bytes": value, "path": None} for value in data]
    actual = rows_of(load("a.parquet"))
    assert actual[:2] == expected
    assert actual[2] is None


def test_parquet_files_of_different_types_are_joined_in_order() -> None:
    """One with a struct and the features that datasets writes, one with bytes."""
    rows = Dataset.from_dict({"image": cells(range(3))[0]}).cast_column("image", datasets.Image())
    Path("data").mkdir()
    rows.to_parquet("data/a.parquet")
    write_parquet("data/b.parquet", image=([encoded(3), encoded(4)], pa.binary()), label=[0, 1])
    assert shades_of(load("data/*.parquet")) == [0, 1, 2, 3, 4]


def test_parquet_is_not_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of the file becomes a Python object."""
    write_parquet("a.parquet", img=cells(range(3)))

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a row went through Python")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Image, "encode_example", refuse)
        patch.setattr(datasets.Image, "decode_example", refuse)
        patch.setattr(datasets.arrow_writer.ArrowWriter, "write", refuse)
        patch.setattr("jepa_hf.data.file_readers._read_parquet", refuse)
        dataset = load("a.parquet")
    assert shades_of(dataset) == [0, 1, 2]


def test_a_changed_file_is_read_anew() -> None:
    """The cache tells two versions of a file apart."""
    write_parquet("a.parquet", image=cells(range(3)))
    assert shades_of(load("a.parquet")) == [0, 1, 2]
    write_parquet("a.parquet", image=cells(range(5, 8)))
    os.utime("a.parquet", (1, 1))
    assert shades_of(load("a.parquet")) == [5, 6, 7]


def test_the_column_is_image_then_img_then_the_only_one() -> None:
    """A name that is given comes before all of them."""
    one, two, three = cells(range(1)), cells(range(1, 2)), cells(range(2, 3))
    write_parquet("all.parquet", thumbnail=one, img=two, image=three)
    assert shades_of(load("all.parquet")) == [2]
    assert shades_of(load("all.parquet", image_column_name="thumbnail")) == [0]
    write_parquet("img.parquet", thumbnail=one, img=two)
    assert shades_of(load("img.parquet")) == [1]
    write_parquet("only.parquet", thumbnail=one, image=["a path"], label=[3])
    assert shades_of(load("only.parquet")) == [0]


def test_a_dataset_by_name_gives_its_splits() -> None:
    """A local dataset of images: train and validation split, or the split that is named; the cell is not decoded."""
    write_parquet("set/train-0.parquet", img=cells(range(4), "x.png"), label=list(range(4)))
    write_parquet("set/validation-0.parquet", img=cells(range(4, 6)), label=[0, 1])
    write_parquet("set/test-0.parquet", img=cells(range(6, 9)), label=[0, 1, 2])
    train, validation = both(dataset_name="./set")
    assert shades_of(train) == [0, 1, 2, 3]
    assert rows_of(train)[0]["path"] == "x.png"
    assert shades_of(validation) == [4, 5]
    train, validation = both(dataset_name="./set", dataset_train_split="test", dataset_validation_split="train")
    assert shades_of(train) == [6, 7, 8]
    assert shades_of(validation) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match=r"no split 'dev'.*train.*validation.*test"):
        load(dataset_name="./set", dataset_train_split="dev")


def test_a_folder_of_classes_is_a_dataset_by_name_too() -> None:
    """`datasets` reads such a folder with an Image feature and labels; the labels are left out."""
    write("set/train/cat/1.png", "set/train/dog/2.png")
    assert [os.path.basename(row["path"]) for row in rows_of(load(dataset_name="./set"))] == ["1.png", "2.png"]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 60), percentage=st.integers(1, 99), seed=st.integers(0, 2**32))
def test_held_out_images_are_a_share_chosen_by_the_seed(
    tmp_path_factory: pytest.TempPathFactory, size: int, percentage: int, seed: int
) -> None:
    """The parts are disjoint, none is empty, together they are all, each in the old order, the same on every call."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(size):
        (folder / f"{number:03}.png").touch()
    parts = [both(str(folder), seed, validation_split_percentage=percentage) for _ in range(2)]
    train, validation = map(paths_of, parts[0])
    assert (train, validation) == tuple(map(paths_of, parts[1]))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert sorted(train + validation) == [str(folder / f"{number:03}.png") for number in range(size)]
    assert len(validation) == min(max(round(size * percentage / 100), 1), size - 1)


def test_another_seed_holds_other_images_out() -> None:
    write(*(f"images/{number:02}.png" for number in range(40)))
    assert paths_of(both("images", seed=0)[1]) != paths_of(both("images", seed=1)[1])


def test_validation_files_come_before_all_else() -> None:
    """Then training keeps all its images."""
    write("a/1.png", "a/2.png", "b/3.png")
    train, validation = both("a", validation_file="b")
    assert (paths_of(train), paths_of(validation)) == (["a/1.png", "a/2.png"], ["b/3.png"])


def test_sample_limits_take_the_first() -> None:
    """Each limit cuts its own part; one that is larger than the part does nothing."""
    write(*(f"a/{number}.png" for number in range(5)), *(f"b/{number}.png" for number in range(5)))
    train, validation = both("a", validation_file="b", max_train_samples=3, max_eval_samples=2)
    assert (paths_of(train), paths_of(validation)) == ([f"a/{n}.png" for n in range(3)], ["b/0.png", "b/1.png"])
    assert len(load("a", max_train_samples=9)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"no training data.*--train_file.*--dataset_name"),
        ({"train_file": "images", "streaming": True}, r"streamed.*Omit --streaming"),
        ({"train_file": "images", "dataset_name": "x"}, "exclude each other"),
        ({"train_file": "nowhere"}, r"train_file 'nowhere' does not exist"),
        ({"train_file": "images, nowhere/*.png"}, r"'nowhere/\*\.png' matches no file"),
        ({"train_file": "texts"}, r"train_file 'texts' is a folder without images.*parquet"),
        ({"train_file": "texts/a.txt"}, r"'texts/a.txt' is not an image. Use .png, .jpg or another suffix"),
        ({"train_file": "images,good.parquet"}, r"mixes image and parquet files"),
        ({"train_file": "empty.parquet"}, r"'empty.parquet' is not a valid Parquet file.*0 bytes"),
        ({"train_file": "damaged.parquet"}, r"damaged.parquet' cannot be read: .+ Write"),
        ({"train_file": "norows.parquet"}, r"'norows.parquet' has no rows"),
        ({"train_file": "text.parquet"}, r"Not exactly one column .* in 'text.parquet'.*_column_name.*text, label"),
        ({"train_file": "two.parquet"}, r"Not exactly one column .*out of: left, right\.$"),
        ({"train_file": "good.parquet", "image_column_name": "pic"}, r"No column 'pic' .*out of: image\.$"),
        ({"train_file": "text.parquet", "image_column_name": "text"}, r"No column 'text' of encoded images"),
        ({"train_file": "good.parquet,other.parquet"}, r"columns of different names \(image, img\)"),
        ({"dataset_name": "./texts"}, r"Not exactly one column .* in dataset './texts'"),
        ({"dataset_name": "./nowhere"}, r"dataset_name './nowhere' cannot be loaded"),
    ],
)
def test_bad_input_is_named_with_its_remedy(arguments: dict[str, Any], message: str) -> None:
    """One UsageError of one line for everything that the user can get wrong."""
    write("images/a.png")
    write_parquet("good.parquet", image=cells(range(2)))
    write_parquet("other.parquet", img=cells(range(2)))
    write_parquet("norows.parquet", image=([], STRUCT))
    write_parquet("text.parquet", text=["a"], label=[1])
    write_parquet("two.parquet", left=cells(range(1)), right=cells(range(1)))
    Path("empty.parquet").touch()
    damaged = bytearray(Path("good.parquet").read_bytes())
    damaged[4:60] = bytes(56)
    Path("damaged.parquet").write_bytes(damaged)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("A text.")
    assert len(load("good.parquet")) == 2
    with pytest.raises(UsageError, match=message) as raised:
        load(**arguments)
    assert "\n" not in str(raised.value)


def test_a_single_image_cannot_be_held_out() -> None:
    write("images/a.png")
    with pytest.raises(UsageError, match="--validation_file"):
        both("images")
