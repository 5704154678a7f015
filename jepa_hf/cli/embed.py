"""`jepa-hf embed`: one vector per row of files, in a file."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..data.arguments import DataArguments
from ..errors import UsageError
from ..evaluation.embed_files import check_output, embed_files, open_source
from ..evaluation.embedder import POOLINGS, Embedder
from .console import complain, quiet_libraries
from .parsing import CommandParser

_COLUMNS = ("text_column_name", "image_column_name", "feature_column_names", "label_column_name")


def main(argv: Sequence[str]) -> int:
    """Embed; returns the exit code."""
    quiet_libraries()
    try:
        count, width, output = _run(_parser().parse_args(argv))
    except UsageError as error:
        return complain("jepa-hf embed", error)
    print(f"written to {output}: {count:,} embeddings of width {width:,}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf embed",
        description="Embed the rows of files with a frozen encoder, as many as there are: finished parts lie in "
        "OUTPUT.parts until all are there, and the same command goes on after them.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of an encoder, or of a JEPA of ours")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help="texts: txt, md, json, jsonl, csv, tsv or parquet, also with .gz; images: folders, files or parquet; "
        "features: csv, tsv, json, jsonl, parquet, npy or npz; globs in quotes",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="new .parquet (the rows' columns and a column of lists, embedding) or .npy (an array [rows, width])",
    )
    parser.add_argument("--pooling", default="mean", choices=POOLINGS, help="default mean, as sentence-transformers")
    parser.add_argument("--batch_size", type=int, default=64, help="rows at once; default 64")
    parser.add_argument("--max_seq_length", type=int, help="cut texts to so many tokens; default what the model takes")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings")
    helps = {item.name: item.metadata["help"] for item in fields(DataArguments)}
    for name in _COLUMNS:
        parser.add_argument(f"--{name}", help=helps[name])
    return parser


def _run(options: argparse.Namespace) -> tuple[int, int, str]:
    """Number and width of the embeddings, and where they are."""
    check_output(Path(options.output))
    embedder = Embedder.from_pretrained(
        options.model,
        batch_size=options.batch_size,
        max_seq_length=options.max_seq_length,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    columns = {name: getattr(options, name) for name in _COLUMNS}
    source = open_source(embedder.modality, DataArguments(train_file=",".join(options.files), **columns))
    settings = {"model": options.model, "revision": options.revision, "max_seq_length": embedder.max_seq_length}
    settings["weights"] = [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(Path(options.model).glob("*.safetensors"))
    ]
    width = embed_files(embedder, source, options.output, options.pooling, settings, sys.stderr.isatty())
    return source.count, width, options.output
