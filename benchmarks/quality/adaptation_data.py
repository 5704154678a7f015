"""Texts and tasks for `adaptation.py`, from public data sets.

    python benchmarks/quality/adaptation_data.py DATA OUT [--pieces]

DATA holds, as JSON lines (plain or .gz): imdb/{unsup,train,test}, 20newsgroups/{train,test} ("text", "label"),
stsb/{dev,test} ("sentence1", "sentence2", "score"), wiki_vital_summaries/{train,test} ("title", "text"),
wordnet_glosses/all ("definition", "lemmas") and wikisql/{dev,test} ("text", "code").

Written are OUT/texts/{reviews,newsgroups}.jsonl, on which encoders are trained, and the tasks in OUT/search, of
training and development files, and OUT/final, of test files. Texts are cut after 700 characters, or with --pieces at
spaces into pieces of at most 700, so that whole documents are read; tasks are always cut. For retrieval, a Wikipedia
text lacks the words of its title.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
CUT = 700


def read(folder: Path, name: str) -> Rows:
    path = next(path for path in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl") if path.exists())
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def pieces(text: str) -> list[str]:
    """Parts of at most 700 characters; those after the first have at least 100.

    >>> [len(piece) for piece in pieces("word " * 320)]
    [699, 699, 199]
    """
    parts = [part.group().strip() for part in re.finditer(rf".{{1,{CUT}}}(?:\s|$)", text, re.DOTALL)]
    return [part for place, part in enumerate(parts) if place == 0 or len(part) >= 100] or [text[:CUT]]


def without_title(row: dict[str, Any]) -> dict[str, str]:
    words = "|".join(map(re.escape, re.findall(r"\w+", row["title"])))
    text = re.sub(rf"\b({words})\b", "", row["text"], flags=re.IGNORECASE) if words else row["text"]
    return {"title": row["title"], "text": re.sub(r"\s+", " ", text)[:CUT]}


def main() -> None:
    """Write the texts and both sets of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pieces", action="store_true", help="whole documents, in pieces")
    options = parser.parse_args()
    order = random.Random(0)

    def shuffled(name: str) -> Rows:
        rows = read(options.data, name)
        order.shuffle(rows)
        return rows

    for name, rows in (
        ("reviews", read(options.data, "imdb/unsup")),
        ("newsgroups", read(options.data, "20newsgroups/train")),
    ):
        cut = pieces if options.pieces else lambda text: [text[:CUT]]
        write(options.out / "texts" / f"{name}.jsonl", ({"text": part} for row in rows for part in cut(row["text"])))

    def labelled(path: Path, splits: dict[str, Rows]) -> None:
        for split, rows in splits.items():
            columns = ({"text": row["text"][:CUT], "label": row.get("label_name", row["label"])} for row in rows)
            write(path / f"{split}.jsonl", columns)

    search, final = options.out / "search", options.out / "final"
    for name, source in (("reviews", "imdb"), ("newsgroups", "20newsgroups")):
        train, test = shuffled(f"{source}/train"), shuffled(f"{source}/test")
        labelled(search / name, {"train": train[:4000], "test": train[4000:10000]})
        labelled(final / name, {"train": train[:6000], "test": test[:10000]})
    glosses = shuffled("wordnet_glosses/all")
    for folder, split, part in ((search, "dev", glosses[:2000]), (final, "test", glosses[2000:5000])):
        pairs = [{name: row[name] for name in ("sentence1", "sentence2", "score")} for row in shuffled(f"stsb/{split}")]
        write(folder / "stsb" / "test.jsonl", pairs)
        titles = shuffled(f"wiki_vital_summaries/{'train' if split == 'dev' else 'test'}")
        write(folder / "titles" / "test.jsonl", map(without_title, titles[:2000]))
        lemmas = ({"query": row["definition"], "document": row["lemmas"][0].replace("_", " ")} for row in part)
        write(folder / "glosses" / "test.jsonl", lemmas)
        queries = shuffled(f"wikisql/{split}")[: len(part)]
        write(folder / "sql" / "test.jsonl", ({"question": row["text"], "answer": row["code"]} for row in queries))


if __name__ == "__main__":
    main()
