"""Answers in batches are those of one at a time, and each score says right exactly where it should."""

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
from jepa_hf.llm_jepa.answer_scoring import same_result, scorer, share_interval
from jepa_hf.llm_jepa.generation import generate_answers, judge


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_in_batches_are_those_of_one_at_a_time(side: str) -> None:
    """Prompts of differing lengths, in their order; the tokenizer's side of padding does not matter."""
    words = tokenizer(padding_side=side)
    made = model(len(words))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    made.train()
    prompts = [row["messages"][1]["content"] * (1 + number % 3) for number, row in enumerate(conversations(5))]
    alone = [generate_answers(made, words, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert generate_answers(made, words, prompts, max_new_tokens=5, batch_size=2) == alone
    assert len(set(alone)) > 1
    assert made.training


def test_an_answer_ends_at_its_stop_token() -> None:
    """Which is left out, with what comes after it."""
    words = tokenizer()
    made = model(len(words))
    with torch.no_grad():
        made.lm_head.weight.zero_()
        made.model.norm.weight.fill_(1.0)
        made.lm_head.weight[words.eos_token_id] = 1000.0 * made.model.embed_tokens.weight.mean(0)
    stop = made(torch.tensor([[5, 6]])).logits[0, -1]
    if stop[words.eos_token_id] <= 0:  # whichever way the states point, the stop token is to win
        with torch.no_grad():
            made.lm_head.weight[words.eos_token_id] *= -1
    assert generate_answers(made, words, ["class"], max_new_tokens=4) == [""]


def test_an_answer_ends_with_the_models_positions() -> None:
    """Learned ones, beyond which there is nothing to look up; a prompt that takes them all is refused."""
    words = tokenizer()
    torch.manual_seed(0)  # of other weights the answer may be half a character, which is other tokens when read again
    made = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=12))
    with torch.no_grad():
        made.lm_head.weight[words.eos_token_id] = 0.0
    (answer,) = generate_answers(made, words, ["class " * 9], max_new_tokens=50)
    assert len(words(answer, add_special_tokens=False)["input_ids"]) == 3
    with pytest.raises(UsageError, match="a prompt has 12 tokens, and the model 12 positions"):
        generate_answers(made, words, ["class", "class " * 12], max_new_tokens=50)


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (0.3, 10), (1.0, 2000), (0.5, 7)])
def test_a_shares_interval_is_wilsons(share: float, count: int) -> None:
    """As scipy computes it, where the share is a whole number of rows."""
    right = round(share * count)
    expected = binomtest(right, count).proportion_ci(method="wilson")
    found = share_interval(right / count, count)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)


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
def test_scores_of_texts(metric: str, answer: str, right: str, verdict: bool) -> None:
    assert scorer(metric)(answer, right, ROW) is verdict


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
def test_sql_is_judged_by_the_rows_it_gives(query: str, right: str, verdict: bool, database: Path) -> None:
    """In order where the right query asks for one; what fails, writes or does not end is wrong, nothing is changed."""
    before = database.read_bytes()
    assert same_result(query, right, database) is verdict
    assert database.read_bytes() == before


def test_a_right_query_that_fails_is_told(database: Path) -> None:
    with pytest.raises(UsageError, match="the right query fails"):
        same_result("select 1", "select nothing from nowhere", database)


@pytest.mark.parametrize(
    "row",
    [
        {"db_id": "shop"},
        {"messages": [{"role": "user", "content": "For db_id:[shop]\n\nWhich?"}]},
        {"text": "db_id:[shop] which?"},
    ],
)
def test_a_row_names_its_database(row: dict[str, Any], database: Path) -> None:
    judged = scorer("sql", database.parents[1])
    assert judged("select 1", "select 1", row)
    with pytest.raises(UsageError, match="holds no database"):
        judged("select 1", "select 1", {"db_id": "../databases/shop/shop"})


def test_metrics_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="metric must be one of exact_match"):
        scorer("bleu")
    with pytest.raises(UsageError, match="give --database"):
        scorer("sql")


def test_shares_and_verdicts_agree() -> None:
    words = tokenizer()
    shares, found = judge(model(len(words)), PairedViewTokenizer(words, num_predictor_tokens=0), conversations(3))
    assert [row["right"] for row in found] == [row["messages"][-1]["content"] for row in conversations(3)]
    assert shares == {metric: sum(row[metric] for row in found) / 3 for metric in ("exact_match", "prefix_match")}
