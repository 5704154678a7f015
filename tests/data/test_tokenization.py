"""Claims of jepa_hf/data/tokenization.py."""

import copy
import logging
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.cli import REPOSITORY, start_process
from helpers.tiny_models import CORPUS, FAMILIES, tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, UsageError
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.file_readers import log_once
from jepa_hf.data.text_datasets import load_text_datasets
from jepa_hf.data.tokenization import special_tokens, tokenize_dataset

LONG = max(CORPUS, key=len)


@pytest.fixture(params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(request.param)


def texts_of(*texts: str | None) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "other": list(range(len(texts)))})


def bare(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class TestLineByLine:
    def test_rows_are_what_the_tokenizer_gives_when_it_truncates(self, tokenizer):
        rows = tokenize_dataset(texts_of(*CORPUS[:40]), tokenizer, max_seq_length=16)
        assert rows.column_names == ["input_ids"]
        assert rows["input_ids"][:] == tokenizer(CORPUS[:40], truncation=True, max_length=16)["input_ids"]

    def test_blank_null_and_tokenless_texts_give_no_row(self, tokenizer):
        rows = tokenize_dataset(texts_of("", CORPUS[0], " \t\n\u3000", None, CORPUS[1]), tokenizer, max_seq_length=99)
        assert rows["input_ids"][:] == tokenizer(CORPUS[:2])["input_ids"]
        # BERT's normalizer removes control characters.
        rows = tokenize_dataset(texts_of("\x00\x01", CORPUS[0]), tiny_tokenizer("bert"), max_seq_length=99)
        assert len(rows) == 1

    def test_another_column_can_be_the_text(self, tokenizer):
        dataset = Dataset.from_dict({"body": [CORPUS[0]], "text": [CORPUS[1]]})
        rows = tokenize_dataset(dataset, tokenizer, text_column_name="body", max_seq_length=99)
        assert rows[0] == {"input_ids": tokenizer(CORPUS[0])["input_ids"]}

    def test_whole_batches_of_blank_rows_do_no_harm(self, tokenizer):
        rows = tokenize_dataset(texts_of(*[""] * 1500, *CORPUS[:3], *[""] * 1500), tokenizer, max_seq_length=16)
        assert len(rows) == 3

    def test_text_longer_than_the_tokenizer_expects_gives_no_warning(self, tokenizer, capfd):
        tokenize_dataset(texts_of(LONG * 10), tokenizer, max_seq_length=512)
        assert "sequence length" not in capfd.readouterr().err

    def test_slow_tokenizers_do_too(self, slow_tokenizer):
        rows = tokenize_dataset(texts_of("abc", "abcdefgh"), slow_tokenizer, max_seq_length=6)
        assert rows["input_ids"][:] == slow_tokenizer(["abc", "abcdefgh"], truncation=True, max_length=6)["input_ids"]


class TestStride:
    @pytest.mark.parametrize("stride", [0, 1, 5, 13])
    def test_windows_without_overlap_are_the_full_text(self, tokenizer, stride):
        rows = tokenize_dataset(texts_of(LONG), tokenizer, max_seq_length=16, stride=stride)["input_ids"][:]
        assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
        assert all(len(row) == 16 for row in rows[:-1])
        windows = [row[1:-1] for row in rows]
        for before, after in pairwise(windows):
            assert before[len(before) - stride :] == after[:stride]
            assert len(after) > stride
        assert windows[0] + [i for window in windows[1:] for i in window[stride:]] == bare(tokenizer, LONG)

    def test_windows_are_those_of_the_tokenizer(self, tokenizer):
        rows = tokenize_dataset(texts_of(*CORPUS[:40]), tokenizer, max_seq_length=16, stride=5)
        expected = tokenizer(CORPUS[:40], truncation=True, max_length=16, stride=5, return_overflowing_tokens=True)
        assert rows["input_ids"][:] == expected["input_ids"]

    def test_word_ids_overlap_with_the_tokens(self, tokenizer):
        rows = tokenize_dataset(texts_of(LONG), tokenizer, max_seq_length=16, stride=5, word_ids=True)
        words = [row[1:-1] for row in rows["word_ids"]]
        full = tokenizer(LONG, add_special_tokens=False).word_ids()
        assert words[0] + [word for window in words[1:] for word in window[5:]] == full


class TestConcat:
    def test_no_token_is_lost(self, tokenizer):
        rows = tokenize_dataset(texts_of(*CORPUS[:40]), tokenizer, max_seq_length=32, concat=True)["input_ids"][:]
        assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
        assert all(len(row) == 32 for row in rows[:-1])
        assert 4 <= len(rows[-1]) <= 32
        joined: list[int] = []
        for text in CORPUS[:40]:
            joined += [tokenizer.sep_token_id] * bool(joined) + bare(tokenizer, text)
        assert [i for row in rows for i in row[1:-1]] in (joined, joined[:-1])

    def test_each_batch_keeps_its_remainder(self):
        tokenizer = tiny_tokenizer("bert")
        rows = tokenize_dataset(texts_of(*["ab"] * 1001), tokenizer, max_seq_length=1000, concat=True)["input_ids"]
        room, per_text, remainder = 998, len(bare(tokenizer, "ab")), len(bare(tokenizer, "ab"))
        first_batch = 1000 * per_text + 999
        lengths = [len(row) - 2 for row in rows]
        assert lengths[: first_batch // room] == [room] * (first_batch // room)
        assert lengths[first_batch // room :] == [first_batch % room, remainder]

    def test_a_remainder_of_a_single_token_is_left_out(self):
        tokenizer = tiny_tokenizer("bert")
        for text, count in (("a", 0), ("a b", 1), ("a b c d e f", 1), ("a b c d e f g", 1), ("a b c d e f g h", 2)):
            rows = tokenize_dataset(texts_of(text, ""), tokenizer, max_seq_length=8, concat=True) if count else []
            assert len(rows) == count, text

    def test_word_ids_separate_the_words_of_all_texts(self, tokenizer):
        rows = tokenize_dataset(texts_of(*CORPUS[:9]), tokenizer, max_seq_length=999, concat=True, word_ids=True)
        ids, words = rows["input_ids"][0], rows["word_ids"][0]
        parts = [tokenizer(text, add_special_tokens=False) for text in CORPUS[:9]]
        assert len(set(words) - {-1}) == sum(len(set(part.word_ids())) for part in parts)
        assert [i for i, word in zip(ids, words, strict=True) if word == -1] == [
            tokenizer.cls_token_id,
            *[tokenizer.sep_token_id] * 9,
        ]
        start = 1
        for part in parts:
            first = words[start]
            assert words[start : start + len(part["input_ids"])] == [first + word for word in part.word_ids()]
            start += len(part["input_ids"]) + 1

    def test_eos_stands_in_for_a_missing_sep(self):
        tokenizer = plain_tokenizer(eos_token="[SEP]")
        rows = tokenize_dataset(texts_of("a b", "c d"), tokenizer, max_seq_length=9, concat=True)
        assert rows["input_ids"][:] == [tokenizer.convert_tokens_to_ids(["a", "b", "[SEP]", "c", "d"])]


class TestWordIds:
    def test_words_are_those_of_the_tokenizer_and_special_tokens_have_none(self, tokenizer):
        rows = tokenize_dataset(texts_of(*CORPUS[:40]), tokenizer, max_seq_length=16, word_ids=True)
        assert rows.column_names == ["input_ids", "word_ids"]
        encoded = tokenizer(CORPUS[:40], truncation=True, max_length=16)
        assert rows["input_ids"][:] == encoded["input_ids"]
        assert rows["word_ids"][:] == [
            [-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(CORPUS[:40]))
        ]

    def test_every_family_separates_words(self, tokenizer):
        """As many words as the pre-tokenizer sees, so that hiding whole words means something."""
        rows = tokenize_dataset(texts_of("gentle falcon drifts"), tokenizer, max_seq_length=99, word_ids=True)
        assert list(dict.fromkeys(rows["word_ids"][0])) == [-1, 0, 1, 2]

    def test_a_slow_tokenizer_is_refused(self, slow_tokenizer):
        with pytest.raises(UsageError, match=r"Word ids need a fast tokenizer, which .* is not"):
            tokenize_dataset(texts_of("a"), slow_tokenizer, max_seq_length=9, word_ids=True)


class TestStreaming:
    @pytest.mark.parametrize("modes", [{}, {"stride": 3}, {"concat": True}, {"word_ids": True}])
    def test_streams_give_the_rows_of_map_style_datasets(self, modes):
        dataset = texts_of(*CORPUS[:40], "", None)
        tokenizer = tiny_tokenizer("roberta")
        rows = tokenize_dataset(dataset.to_iterable_dataset(), tokenizer, max_seq_length=16, **modes)
        assert isinstance(rows, IterableDataset)
        assert list(rows) == list(tokenize_dataset(dataset, tokenizer, max_seq_length=16, **modes))
        assert rows.column_names == ["input_ids"] + ["word_ids"] * ("word_ids" in modes)

    def test_unknown_columns_vanish_too(self):
        stream = IterableDataset.from_generator(lambda: ({"text": text, "number": 1} for text in CORPUS))
        assert stream.column_names is None
        rows = tokenize_dataset(stream, tiny_tokenizer("bert"), max_seq_length=16)
        assert all(list(row) == ["input_ids"] for row in rows)


class TestCutsAreCounted:
    def test_one_line_says_how_much_was_cut(self, caplog):
        caplog.set_level(logging.INFO, "jepa_hf.data.tokenization")
        texts = ["a b c d e f g h"] + ["a b c d e f"] * 9 + [""]
        tokenize_dataset(texts_of(*texts), tiny_tokenizer("bert"), max_seq_length=8)
        assert caplog.record_tuples == [
            (
                "jepa_hf.data.tokenization",
                logging.INFO,
                "1 of 10 rows were longer than 8 tokens; 2 tokens (3.2 %) were cut",
            )
        ]

    def test_more_than_a_fifth_is_a_warning(self, caplog):
        tokenize_dataset(texts_of("a b c d e f g h"), tiny_tokenizer("bert"), max_seq_length=8)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert caplog.messages == ["1 of 1 rows were longer than 8 tokens; 2 tokens (25.0 %) were cut"]

    @pytest.mark.parametrize("modes", [{"max_seq_length": 10}, {"stride": 0}, {"concat": True}])
    def test_without_truncation_nothing_is_logged(self, caplog, modes):
        caplog.set_level(logging.INFO, "jepa_hf")
        tokenize_dataset(texts_of("a b c d e f g h"), tiny_tokenizer("bert"), **({"max_seq_length": 8} | modes))
        assert not caplog.records

    def test_the_count_survives_the_cache_and_several_processes(self, tmp_path, caplog):
        (tmp_path / "a.txt").write_text("\n".join(CORPUS))
        tokenizer = tiny_tokenizer("roberta")
        messages, files = [], []
        for cache, num_proc in (("one", None), ("one", None), ("two", 2)):
            # Truncation as a call before may have left it behind; it must not spoil the cache.
            tokenizer("a", truncation=True, max_length=len(files) + 3)
            args = DataArguments(train_file=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / cache))
            dataset, _ = load_text_datasets(args, seed=0, need_validation=False)
            caplog.clear()
            rows = tokenize_dataset(dataset, tokenizer, max_seq_length=16, num_proc=num_proc)
            assert rows.column_names == ["input_ids"]
            messages.append(caplog.messages)
            files.append({Path(file["filename"]).name for file in rows.cache_files})
        assert messages[0] == messages[1] == messages[2] != []
        assert files[0] == files[1]
        assert len(files[2]) == 2

    def test_a_selection_counts_only_its_rows(self, caplog):
        dataset = texts_of(*["a b c d e f g h"] * 3, "a").select([3, 0])
        tokenize_dataset(dataset, tiny_tokenizer("bert"), max_seq_length=8)
        assert caplog.messages == ["1 of 2 rows were longer than 8 tokens; 2 tokens (22.2 %) were cut"]


class TestDroppedTexts:
    @pytest.mark.parametrize("modes", [{}, {"packed": True}, {"concat": True}, {"stride": 1}])
    def test_texts_without_a_row_are_counted(self, caplog, modes):
        """By reason; of joined and split texts only those without characters."""
        caplog.set_level(logging.INFO, "jepa_hf.data.dropped_rows")
        texts = ["a b c", None, "", " ", "\x00", *CORPUS[:4]]
        tokenize_dataset(texts_of(*texts), tiny_tokenizer("bert"), max_seq_length=99, **modes)
        counted = not {"concat", "stride"} & modes.keys()
        assert caplog.messages == [
            f"left out {3 + counted} of 9 rows of the texts: 1 null, 2 blank" + ", 1 without tokens" * counted
        ]

    def test_of_streams(self, caplog):
        """The count so far, which starts anew with each pass and is said once."""
        caplog.set_level(logging.INFO, "jepa_hf.data.dropped_rows")
        log_once.cache_clear()
        stream = texts_of(*[None] * 10, *CORPUS[:20]).to_iterable_dataset()
        rows = tokenize_dataset(stream, tiny_tokenizer("bert"), max_seq_length=99)
        for _ in range(2):
            assert len(list(rows)) == 20
            assert [message.split(" rows")[0] for message in caplog.messages] == ["left out 10 of 10"]

    def test_single_tokens_are_counted(self, caplog):
        tokenize_dataset(texts_of("a", "b", "a b c d"), tiny_tokenizer("bert"), max_seq_length=99)
        assert caplog.messages == [
            "left out 2 of 3 rows of the texts: 2 with fewer than two tokens to mask; more than half, so check the "
            "file and --text_column_name"
        ]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    def test_texts_without_a_target_are_counted(self, streaming, packed, caplog):
        """They are those without a target for the collator: of complete words, or without characters that are known."""
        caplog.set_level(logging.INFO, "jepa_hf.data")
        log_once.cache_clear()
        tokenizer = tiny_tokenizer("bert")
        texts = texts_of(*["unbelievably", "\N{SNOWMAN} \N{SNOWMAN}", *CORPUS[:3]] * 50)
        texts = texts.to_iterable_dataset() if streaming else texts
        rows = list(tokenize_dataset(texts, tokenizer, max_seq_length=99, word_ids=True, packed=packed))
        so_far = " so far" * streaming
        (message,) = (text for text in caplog.messages if "left out" in text)
        assert message == f"left out 100 of 250 rows of the texts{so_far}: 100 with fewer than two words to mask"
        if not packed:
            batch = DataCollatorForSpanJEPA(tokenizer, whole_word=True, on_too_short="skip")(rows)
            assert (~batch["target_valid"].any(dim=(1, 2))).sum() == 100


class TestErrors:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(("values", "kind"), [([1, 2], "int"), ([["a"], ["b"]], "(list|List)")])
    def test_columns_of_other_types(self, values, kind, streaming):
        dataset = Dataset.from_dict({"text": values})
        if streaming:
            dataset = dataset.to_iterable_dataset()
        with pytest.raises(
            UsageError, match=f"olumn 'text'.* holds {kind}.*, not strings|Row 1 .* has {kind} .* in column 'text'"
        ):
            list(tokenize_dataset(dataset, tiny_tokenizer("bert"), max_seq_length=9))

    def test_missing_column(self):
        with pytest.raises(UsageError, match=r"no column 'body' to tokenize\. Its columns are: text, other"):
            tokenize_dataset(texts_of("a"), tiny_tokenizer("bert"), text_column_name="body", max_seq_length=9)

    def test_no_room_for_text(self):
        with pytest.raises(UsageError, match="max_seq_length 2 leaves no room for text after the tokenizer's 2"):
            tokenize_dataset(texts_of("a"), tiny_tokenizer("bert"), max_seq_length=2)

    @pytest.mark.parametrize("stride", [-1, 6, 7])
    def test_stride_out_of_range(self, stride):
        with pytest.raises(UsageError, match=f"stride {stride} is out of range. It must be from 0 to 5"):
            tokenize_dataset(texts_of("a"), tiny_tokenizer("bert"), max_seq_length=8, stride=stride)

    def test_stride_with_concat(self):
        with pytest.raises(UsageError, match="concat and stride exclude each other"):
            tokenize_dataset(texts_of("a"), tiny_tokenizer("bert"), max_seq_length=8, stride=1, concat=True)

    def test_concat_without_a_separator(self):
        with pytest.raises(UsageError, match="neither a sep nor an eos token"):
            tokenize_dataset(texts_of("a"), plain_tokenizer(), max_seq_length=8, concat=True)

    @pytest.mark.parametrize("modes", [{}, {"concat": True}])
    @pytest.mark.parametrize(
        ("texts", "reasons"),
        [
            ([], "no rows"),
            (["", "  ", None], "1 null, 2 blank"),
            (["\x00", "\x01", None], "1 null, 2 without tokens"),
        ],
    )
    def test_no_text_at_all(self, texts, reasons, modes):
        with pytest.raises(UsageError, match=rf"holds no text to tokenize \({reasons}\)"):
            tokenize_dataset(texts_of(*texts), tiny_tokenizer("bert"), max_seq_length=8, **modes)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_unicode_gives_the_tokens_of_the_tokenizer(family, texts):
    tokenizer = tiny_tokenizer(family)
    dataset = Dataset.from_dict({"text": [*texts, "anchor garden"]})
    rows = tokenize_dataset(dataset, tokenizer, max_seq_length=8, word_ids=True)
    solid = [text for text in [*texts, "anchor garden"] if text.strip() and bare(tokenizer, text)]
    assert rows["input_ids"][:] == tokenizer(solid, truncation=True, max_length=8)["input_ids"]
    assert [len(row) for row in rows["word_ids"]] == [len(row) for row in rows["input_ids"]]

    joined = tokenize_dataset(dataset, tokenizer, max_seq_length=99, concat=True)
    tokens = sum(len(bare(tokenizer, text)) + 1 for text in solid) - 1
    assert 0 <= tokens - sum(len(row) - 2 for row in joined["input_ids"]) <= 1


TEMPLATES = {
    "both": "[CLS] $0 [SEP]",
    "several": "[CLS] [MASK] $0 [SEP] [SEP]",
    "before": "[CLS] $0",
    "after": "$0 [SEP]",
    "an ordinary token": "a $0 b",
    "none": None,
}


def tokenizer_with(template: str | None, model: models.Model, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """A vocabulary with a template around texts."""
    backend = Tokenizer(model)
    if isinstance(model, models.BPE):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif isinstance(model, models.Unigram):
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    if template is not None:
        names = [name for name in template.split() if name != "$0"]
        tokens = [(name, backend.token_to_id(name)) for name in names]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", mask_token="[MASK]"
    )


SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "b"]
VOCABULARIES: dict[str, models.Model] = {
    "words": models.WordLevel(
        {token: i for i, token in enumerate([*SPECIAL, "a", "ไทย", "[CLS]x"])}, unk_token="[UNK]"
    ),
    "bytes without the letter a": models.BPE(
        {token: i for i, token in enumerate([*SPECIAL, "Ġ", "x", "y", "Ġx", "a-not"])} | {"a": 20}, [("Ġ", "x")]
    ),
    "pieces": models.Unigram([(token, -1.0) for token in [*SPECIAL, "a", "▁", "▁ไทย", "ไ"]], unk_id=0),
}


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("streaming", [True, False])
def test_special_tokens(template: str | None, vocabulary: str, lowercase: bool, streaming: bool) -> None:
    """In every mode, rows have the special tokens of `tokenizer(text)`, whatever template and vocabulary."""
    tokenizer = tokenizer_with(template, VOCABULARIES[vocabulary], lowercase)
    texts = ["x y ไทย b", "[CLS] x", "b", "x X x x y b x y b b", "[SEP] [MASK] y"]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    before, after = special_tokens(tokenizer)
    assert len(before) + len(after) == tokenizer.num_special_tokens_to_add()

    def rows(**settings) -> list[list[int]]:
        dataset = texts_of(*texts)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
        return [row["input_ids"] for row in tokenize_dataset(dataset, tokenizer, **settings)]

    assert rows(max_seq_length=99) == expected
    assert rows(max_seq_length=99, stride=1) == expected
    assert rows(max_seq_length=6) == tokenizer(texts, truncation=True, max_length=6)["input_ids"]
    (packed,) = rows(max_seq_length=99, packed=True)
    assert packed == [token for row in expected for token in row]
    (joined,) = rows(max_seq_length=99, concat=True)
    parts = [[*bare(tokenizer, text), tokenizer.sep_token_id] for text in texts]
    assert joined == [*before, *[token for part in parts for token in part][:-1], *after]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_side(side: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Long texts lose the end that the tokenizer truncates."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = side
    rows = tokenize_dataset(texts_of(*CORPUS[:9]), tokenizer, max_seq_length=7, word_ids=True)
    expected = tokenizer(CORPUS[:9], truncation=True, max_length=7)
    assert rows["input_ids"][:] == expected["input_ids"]
    assert rows["word_ids"][:] == [
        [-1 if word is None else word for word in expected.word_ids(row)] for row in range(9)
    ]


def plain_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """The vocabulary of tiny BERT without anything around a text."""
    backend = tiny_tokenizer("bert").backend_tokenizer
    backend = type(backend).from_str(backend.to_str())
    backend.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special_tokens)


@pytest.fixture
def slow_tokenizer():
    from transformers import CanineTokenizer

    return CanineTokenizer()


FORK = """
import multiprocessing, os
os.environ["TOKENIZERS_PARALLELISM"] = "true"
from helpers.tiny_models import CORPUS, tiny_tokenizer
import jepa_hf.data.tokenization
tokenizer = tiny_tokenizer("bert")
tokenizer(CORPUS)
child = multiprocessing.get_context("fork").Process(target=tokenizer, args=(CORPUS,), daemon=True)
child.start()
child.join(20)
print("tokenised" if child.exitcode == 0 else "hangs", flush=True)
child.kill()
os._exit(0)
"""


@pytest.mark.slow
def test_a_forked_process_tokenises_after_its_parent_did_so_in_parallel() -> None:
    """Otherwise a loader's worker of a streamed run, where the parent trained the tokenizer, waits forever."""
    output = start_process("-c", FORK, cwd=REPOSITORY, PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}").stdout
    assert output == "tokenised\n"
