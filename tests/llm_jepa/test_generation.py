"""Batched generation equals single generation; each metric decides as documented."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.llm import conversations, model, tokenizer
from jepa_hf import UsageError
from jepa_hf.llm_jepa import PairedViewTokenizer
from jepa_hf.llm_jepa.answer_scoring import get_scorer, sql_results_match, wilson_interval
from jepa_hf.llm_jepa.generation import evaluate_generation, generate_answers


@pytest.mark.parametrize("side", ["right", "left"])
def test_batched_answers_equal_single_ones(side: str) -> None:
    """Batches of prompts of different lengths give the answers of single prompts, in order, for either padding side."""
    words = tokenizer(padding_side=side)
    llm = model(len(words))
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    llm.train()
    prompts = [row["messages"][1]["content"] * (1 + number % 3) for number, row in enumerate(conversations(5))]
    alone = [generate_answers(llm, words, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert generate_answers(llm, words, prompts, max_new_tokens=5, batch_size=2) == alone
    assert len(set(alone)) > 1
    assert llm.training


def test_an_error_leaves_the_model_in_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout would stay off for the rest of a training that survives the error."""
    words = tokenizer()
    llm = model(len(words)).train()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_answers(llm, words, ["class"])
    assert llm.training


def test_answer_ends_at_stop_token() -> None:
    """The stop token and everything after it are removed."""
    words = tokenizer()
    llm = model(len(words))
    with torch.no_grad():
        llm.lm_head.weight.zero_()
        llm.model.norm.weight.fill_(1.0)
        llm.lm_head.weight[words.eos_token_id] = 1000.0 * llm.model.embed_tokens.weight.mean(0)
    stop = llm(torch.tensor([[5, 6]])).logits[0, -1]
    if stop[words.eos_token_id] <= 0:  # whichever way the states point, the stop token is to win
        with torch.no_grad():
            llm.lm_head.weight[words.eos_token_id] *= -1
    assert generate_answers(llm, words, ["class"], max_new_tokens=4) == [""]


def test_answer_ends_with_positions() -> None:
    """Generation stops at the last learned position; a prompt without room for an answer is refused."""
    words = tokenizer()
    torch.manual_seed(0)  # of other weights the answer may be half a character, which is other tokens when read again
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=12))
    with torch.no_grad():
        llm.lm_head.weight[words.eos_token_id] = 0.0
    (answer,) = generate_answers(llm, words, ["class " * 9], max_new_tokens=50)
    assert len(words(answer, add_special_tokens=False)["input_ids"]) == 3
    with pytest.raises(UsageError, match="A prompt has 12 tokens, but the model has only 12 positions"):
        generate_answers(llm, words, ["class", "class " * 12], max_new_tokens=50)


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.3, 10), (1.0, 2000), (0.5, 7)])
def test_share_interval_is_wilson(share: float, count: int) -> None:
    """The interval equals scipy's Wilson interval."""
    right = round(share * count)
    expected = binomtest(right, count).proportion_ci(method="wilson")
    actual = wilson_interval(right / count, count)
    assert (actual["low"], actual["high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)


ROW: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("metric", "answer", "right", "verdict"),
    [
        ("exact_match", " .*dog ", ".*dog", True),
        ("exact_match", ".*dog.*", ".*dog", False),
        ("prefix_match", ".*dog.*", ".*dog", True),
        ("prefix_match", ".*do", ".*dog", False),
        ("gsm8k", "2 + 2\n#### 4", "so it is\n#### 4.0", True),
        ("gsm8k", "first #### 3 then #### $1,004", "#### 1004", True),
        ("gsm8k", "4", "#### 4", False),
        ("gsm8k", "#### -4", "#### 4", False),
        ("gsm8k", "", "#### 4", False),
    ],
)
def test_text_scores(metric: str, answer: str, right: str, verdict: bool) -> None:
    """Each text metric decides these cases."""
    assert get_scorer(metric)(answer, right, ROW) is verdict


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / "databases" / "shop"
    folder.mkdir(parents=True)
    path = folder / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table things (name text, price real)")
        connection.executemany("insert into things values (?, ?)", [("pen", 1), ("cup", 3), ("hat", 2), ("pen", 1)])
    connection.close()
    return path


@pytest.mark.parametrize(
    ("query", "right", "verdict"),
    [
        ("select name from things where price = 1", "SELECT name FROM things WHERE price < 2;", True),
        ("select name from things order by price", "select name from things", True),
        ("select name from things", "select name from things order by price", False),
        ("select distinct name from things", "select name from things", False),
        ("select nonsense", "select name from things where price > 9", False),
        ("", "select name from things where price > 9", False),
        ("delete from things", "select name from things where price > 9", False),
        ("select name from things; select 1", "select name from things", False),
        (
            "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n",
            "select name from things",
            False,
        ),
    ],
)
def test_sql_results_are_compared(query: str, right: str, verdict: bool, database: Path) -> None:
    """Rows are compared, in order if the reference has ORDER BY; queries that fail, write or do not end are wrong."""
    before = database.read_bytes()
    assert sql_results_match(query, right, database) is verdict
    assert database.read_bytes() == before


def test_failing_reference_query_raises(database: Path) -> None:
    """A reference query that fails is a usage error."""
    with pytest.raises(UsageError, match="The reference query fails"):
        sql_results_match("select 1", "select nothing from nowhere", database)


@pytest.mark.parametrize(
    "row",
    [
        {"db_id": "shop"},
        {"messages": [{"role": "user", "content": "For db_id:[shop]\n\nWhich?"}]},
        {"text": "db_id:[shop] which?"},
    ],
)
def test_row_names_its_database(row: dict[str, Any], database: Path) -> None:
    """`db_id`, or `db_id:[...]` in the question, selects the database; paths in the name are refused."""
    judged = get_scorer("sql", database.parents[1])
    assert judged("select 1", "select 1", row)
    with pytest.raises(UsageError, match="holds no database"):
        judged("select 1", "select 1", {"db_id": "../databases/shop/shop"})


def test_invalid_metrics_are_refused() -> None:
    """An unknown metric, and sql without a database, are usage errors."""
    with pytest.raises(UsageError, match="metric must be one of exact_match"):
        get_scorer("bleu")
    with pytest.raises(UsageError, match="give --database"):
        get_scorer("sql")


def test_shares_equal_row_results() -> None:
    """The proportions are the means of the rows' results."""
    words = tokenizer()
    shares, actual = evaluate_generation(
        model(len(words)), PairedViewTokenizer(words, num_predictor_tokens=0), conversations(3)
    )
    assert [row["right"] for row in actual] == [row["messages"][-1]["content"] for row in conversations(3)]
    assert shares == {metric: sum(row[metric] for row in actual) / 3 for metric in ("exact_match", "prefix_match")}
