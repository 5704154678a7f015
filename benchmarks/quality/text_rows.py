"""The rows of token ids that `text_quality.py run --rows` trains on, and their tokenizer.

    python benchmarks/quality/text_rows.py imdb.jsonl.gz books.jsonl.gz --output_dir rows

Reads the column `text` of JSON-lines files in the order given, trains a WordPiece tokenizer on the first texts, joins
all texts and divides them into rows of one length, shuffled. Writes `rows.npy` (uint16, `[N, L]`) and `tokenizer/`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import load_dataset
from transformers import BertTokenizer

from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer


def joined_rows(texts: list[str], tokenizer: BertTokenizer, length: int, seed: int = 0) -> np.ndarray:
    """Divide the joined texts into rows `[N, length]` of [CLS], tokens and [SEP], in a random order."""
    inner = length - 2
    ids = np.fromiter(_token_ids(texts, tokenizer), dtype=np.uint16)
    ids = ids[: len(ids) // inner * inner].reshape(-1, inner)
    rows = np.pad(ids, ((0, 0), (1, 1)))
    rows[:, 0], rows[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    return np.random.default_rng(seed).permutation(rows)


def _token_ids(texts: list[str], tokenizer: BertTokenizer, batch: int = 1000) -> Iterator[int]:
    for start in range(0, len(texts), batch):
        for ids in tokenizer(texts[start : start + batch], add_special_tokens=False)["input_ids"]:
            yield from ids


def main() -> None:
    """Write the rows and the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--tokenizer_texts", type=int, default=60000, help="texts that the tokenizer is trained on")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row, special tokens included")
    options = parser.parse_args()
    texts: list[str] = []
    for file in options.files:
        texts += load_dataset("json", data_files=file, split="train")["text"]
    tokenizer = train_wordpiece_tokenizer(texts[: options.tokenizer_texts], options.vocab_size, options.length)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.output_dir / "tokenizer")
    rows = joined_rows(texts, tokenizer, options.length)
    np.save(options.output_dir / "rows.npy", rows)
    print(f"{len(texts)} texts, {rows.size} tokens in {len(rows)} rows")


if __name__ == "__main__":
    main()
