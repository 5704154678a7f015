"""Claims about streams whose last batches are filled up."""

from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.batches import rows
from helpers.runs import trainer
from jepa_hf import JepaTrainingArguments, UsageError
from jepa_hf.training.data_loading import padded_stream
from jepa_hf.training.stream_padding import PADDING_ROW_KEY, FixedBatchSizeCollator, PadStreamToMultiple


def stream(count: int) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(lambda: ({"row": row} for row in range(count)))


@given(count=st.integers(0, 9), size=st.integers(1, 5))
def test_all_rows_come_once_and_padding_is_marked(count: int, size: int) -> None:
    """The length is the next multiple; a second pass is the first again."""
    rows = PadStreamToMultiple(stream(count), size)
    for actual in (list(rows), list(rows)):
        assert [row["row"] for row in actual if PADDING_ROW_KEY not in row] == list(range(count))
        assert len(actual) == -(-count // size) * size
        assert all(row == {"row": 0, PADDING_ROW_KEY: True} for row in actual[count:])


def test_each_worker_of_a_loader_fills_up_its_own_batches() -> None:
    """Two workers share the shards of a stream: together they give all rows once."""
    rows = datasets.Dataset.from_dict({"row": list(range(10))}).to_iterable_dataset(num_shards=2)
    loader = torch.utils.data.DataLoader(PadStreamToMultiple(rows, 4), batch_size=4, num_workers=2, collate_fn=list)
    batches = list(loader)
    assert all(len(batch) == 4 for batch in batches)
    assert sorted(row["row"] for batch in batches for row in batch if PADDING_ROW_KEY not in row) == list(range(10))


def test_a_new_epoch_reaches_the_stream() -> None:
    shuffled = stream(50).shuffle(seed=0, buffer_size=50)
    rows = PadStreamToMultiple(shuffled, 1)
    first = [row["row"] for row in rows]
    rows.set_epoch(1)
    assert [row["row"] for row in rows] != first


def test_rows_read_before_are_marked_and_the_collator_does_not_see_the_mark() -> None:
    def collate(features: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        assert all(set(feature) == {"row"} for feature in features)
        return {"row": torch.tensor([feature["row"] for feature in features])}

    batch = FixedBatchSizeCollator(collate, 3)([{"row": 3}, {"row": 0, PADDING_ROW_KEY: True}, {"row": 4}])
    assert batch["row"].tolist() == [3, 0, 4]
    assert batch[PADDING_ROW_KEY].tolist() == [False, True, False]


def test_a_smaller_batch_is_filled_up_with_rows_that_are_marked() -> None:
    """As where a rank's or a worker's shards of a stream end."""

    def collate(features: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        return {"row": torch.tensor([feature["row"] for feature in features])}

    undisturbed = FixedBatchSizeCollator(collate, 4)
    batch = undisturbed([{"row": 3}, {"row": 4}])
    assert batch["row"].tolist() == [3, 4, 3, 3]
    assert batch[PADDING_ROW_KEY].tolist() == [False, False, True, True]
    assert not undisturbed([{"row": row} for row in range(4)])[PADDING_ROW_KEY].any()


@pytest.mark.parametrize("setting", ["eval_strategy", "save_strategy", "logging_strategy"])
def test_work_at_the_end_of_a_pass_is_refused_where_ranks_have_shards_of_their_own(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their passes end at different times, and one would wait for the other forever; of one shard they end together."""
    monkeypatch.setattr(JepaTrainingArguments, "world_size", 2)
    for shards, refused in ((1, nullcontext()), (2, pytest.raises(UsageError, match=setting))):
        data = datasets.Dataset.from_list(rows("bert", 8)).to_iterable_dataset(num_shards=shards)
        run = trainer(tmp_path, data=data, eval_data=rows("bert", 4), **{setting: "epoch"})
        with refused, padded_stream(run):
            pass
