"""Claims about two and four real processes on the CPU, which communicate through gloo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from helpers.processes import run_ranks

from .workers import train_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SCRIPT = Path(__file__).resolve().parent / "workers" / "train_ranks.py"
Results = dict[str, dict[str, Any]]
TRAINED = [
    "drop",
    "mask_token",
    "contrastive",
    "compiled",
    "packed",
    "accumulated",
    "streaming",
    "one rank without targets",
]
# Older versions of transformers look for a device named cpu:0 when ranks on CPUs resume.
CAN_RESUME = Version(transformers.__version__) >= Version("5.20")
ON_TWO_RANKS = [name for name in train_ranks.RUNS if CAN_RESUME or not name.startswith("resumed")]
EVALUATED = [name for name in train_ranks.RUNS if "evaluation" in name]
ON_FOUR_RANKS = [
    "drop",
    "contrastive",
    "streaming",
    "shards",
    "uneven evaluation",
    "incomplete",
    "incomplete stream",
]


def launch(processes: int, folder: Path, names: Sequence[str]) -> list[Results]:
    """What each rank ended with."""
    run_ranks(SCRIPT, str(processes), folder, *names, processes=processes, cwd=folder)
    files = sorted(folder.glob("rank-*.pt"))
    assert len(files) == processes
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two ranks ended with."""
    return launch(2, tmp_path_factory.mktemp("two"), ON_TWO_RANKS)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of four ranks ended with."""
    return launch(4, tmp_path_factory.mktemp("four"), ON_FOUR_RANKS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one process ends with, its batches as large as those of all ranks."""
    return train_ranks.run_all(tmp_path_factory.mktemp("one"), 1, list(train_ranks.RUNS))


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("name", TRAINED)
def test_both_ranks_end_with_the_same_bits(name: str, ranks: list[Results]) -> None:
    """Targets above all, which no gradient synchronises; although the ranks began with other weights."""
    zero, one = (rank[name]["weights"] for rank in ranks)
    assert any(key.startswith("target_encoder.") for key in zero)
    for key in zero:
        assert torch.equal(zero[key], one[key]), key


@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_equal_one_process_with_the_doubled_batch(name: str, ranks: list[Results], alone: Results) -> None:
    """All weights to 1e-5, with uneven numbers of targets; the log and the tokens too."""
    two = ranks[0][name]
    assert largest_difference(two["weights"], alone[name]["weights"]) < 1e-5
    counts = [rank[name]["targets"] for rank in ranks]
    assert counts[0] != counts[1]
    assert sum(counts[0]) + sum(counts[1]) == sum(alone[name]["targets"])
    assert two["tokens"] == alone[name]["tokens"]
    assert two["steps"] == alone[name]["steps"] == 5
    for log, expected in zip(two["logs"], alone[name]["logs"], strict=True):
        for key in ("loss", "prediction_loss", "mlm_loss", "cosine", "masked_fraction", "rows_without_targets"):
            assert log[key] == pytest.approx(expected[key], abs=1e-5), key
        for key in ("contrastive_loss", "sigreg_loss"):
            assert log.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), abs=1e-5, rel=1e-5), key


@pytest.mark.parametrize("name", ON_FOUR_RANKS[:3])
def test_four_ranks_equal_one_process_with_the_fourfold_batch(
    name: str, four_ranks: list[Results], alone: Results
) -> None:
    """All weights to 1e-5, on every rank the same bits; every log."""
    first, *others = (rank[name]["weights"] for rank in four_ranks)
    assert largest_difference(first, alone[name]["weights"]) < 1e-5
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    for log, expected in zip(four_ranks[0][name]["logs"], alone[name]["logs"], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["drop", "streaming", "shards"])
def test_no_rank_reads_what_another_read(
    name: str, ranks: list[Results], four_ranks: list[Results], alone: Results
) -> None:
    """Of one epoch every sample is read once, by one of them; also of a stream."""
    expected = sorted(alone[name]["rows"])
    assert len(set(expected)) == len(expected) == 40
    for group in (ranks, four_ranks):
        assert sorted(row for rank in group for row in rank[name]["rows"]) == expected


@pytest.mark.parametrize("name", ["incomplete", "incomplete stream"])
def test_rows_that_fill_up_an_epochs_last_batches_are_not_learnt_from(
    name: str, ranks: list[Results], four_ranks: list[Results], alone: Results
) -> None:
    """Nor compared with: all weights to 1e-5, with the contrastive term and SIGReg. Five rows were left for the last
    step, and the ranks read eight."""
    assert len(alone[name]["rows"]) == 37
    for group in (ranks, four_ranks):
        assert sum(len(rank[name]["rows"]) for rank in group) == 40
        assert largest_difference(group[0][name]["weights"], alone[name]["weights"]) < 1e-5


def test_shards_that_end_at_different_times_make_batches_of_one_size(ranks: list[Results]) -> None:
    """The contrastive term compares samples across ranks in all five steps; each rank's rows come in their order."""
    for rank in ranks:
        actual = rank["uneven shards"]
        assert actual["steps"] == 5
        assert len(actual["rows"]) == 5 * 4
    targets = [[count > 0 for count in rank["uneven shards"]["targets"]] for rank in ranks]
    assert targets == [[True] * 5] * 2
    first = next(rank["uneven shards"]["rows"] for rank in ranks if len(set(rank["uneven shards"]["rows"])) == 9)
    assert first[8] == first[9] == first[10] == first[11]


@pytest.mark.skipif(not CAN_RESUME, reason="ranks on CPUs cannot resume with this transformers")
def test_streams_resume_exactly_where_each_rank_was(ranks: list[Results]) -> None:
    """Bit for bit in the first pass and later ones, also where one rank's shards end earlier than the other's."""
    for rank in ranks:
        for name in ("resumed", "resumed shards"):
            assert rank[name]["differences"] == [0.0] * 3
    together, apart = (ranks[0][name]["passes"] for name in ("resumed", "resumed shards"))
    assert together[0] == together[1]
    assert apart[0] != apart[1]


def test_the_comparison_sees_ranks_that_count_for_themselves(ranks: list[Results], alone: Results) -> None:
    """Were each rank's loss divided by its own targets, the weights would differ by far more than 1e-5."""
    assert largest_difference(ranks[0]["wrong"]["weights"], alone["drop"]["weights"]) > 1e-4


def test_samples_of_other_ranks_do_not_break_the_compiled_graph(ranks: list[Results], alone: Results) -> None:
    """With the contrastive term one graph, as in one process; without compiling none."""
    assert alone["drop"]["graphs"] == 0
    assert ranks[0]["compiled"]["graphs"] == alone["compiled"]["graphs"] == 1


def test_streamed_batches_had_differing_lengths(ranks: list[Results]) -> None:
    """Dynamic padding: the two ranks' batches of the same step are not of one length."""
    assert any(zero != one for zero, one in zip(*(rank["streaming"]["lengths"] for rank in ranks), strict=True))


def test_packed_batches_held_differing_numbers_of_documents(ranks: list[Results]) -> None:
    """The two ranks' rows of the same step do not have room for the same number of samples."""
    zero, one = (rank["packed"]["documents"] for rank in ranks)
    assert any(ours != theirs for ours, theirs in zip(zero, one, strict=True))


def test_a_rank_may_have_no_targets_at_all(ranks: list[Results]) -> None:
    """It did not, in any batch; the other had some."""
    assert sum(ranks[1]["one rank without targets"]["targets"]) == 0
    assert min(ranks[0]["one rank without targets"]["targets"]) > 0


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_agrees_with_one_process(
    name: str, ranks: list[Results], four_ranks: list[Results], alone: Results
) -> None:
    """Every mean over targets; also where the last batches are filled up with repeated rows, or a rank has nothing.

    So do the measures of health, which one row does not have.
    """
    expected = alone[name]["metrics"]
    means = [
        key
        for key in expected
        if not key.endswith(("runtime", "per_second", "preparation_time", "rank", "cosine", "std"))
    ]
    assert {"eval_loss", "eval_prediction_loss", "eval_mlm_loss", "eval_masked_fraction"} <= set(means)
    if name != "evaluation of one row":
        assert {"eval_sample_baseline_loss", "eval_top1_accuracy", "eval_top1_accuracy_in_sample_chance"} <= set(means)
    for rank in [*ranks, *(rank for rank in four_ranks if name in rank)]:
        metrics = rank[name]["metrics"]
        assert metrics.keys() - {"eval_model_preparation_time"} == expected.keys() - {"eval_model_preparation_time"}
        for key in [*means, "eval_cosine"]:
            assert metrics[key] == pytest.approx(expected[key], abs=1e-5), key
