"""`jepa-hf embed`: one vector per row of files."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..data.arguments import DataArguments
from ..errors import UsageError
from ..evaluation.embed_files import check_output, embed_files
from ..evaluation.embedder import POOLINGS, Embedder
from ..evaluation.row_sources import open_source
from ..utils.counts import counted
from .console import CommandParser, run_command

_COLUMNS = ("text_column_name", "image_column_name", "feature_column_names", "label_column_name")


def main(argv: Sequence[str]) -> int:
    """Embed the rows of files; returns the exit code."""
    return run_command("jepa-hf embed", _parser(), _run, argv)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="jepa-hf embed",
        description="Embed the rows of files with a frozen encoder. Finished parts are kept in OUTPUT.parts until all "
        "are done; the same command continues after them.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hub name of an encoder, or of a JEPA")
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
        help="new .parquet (the rows' other columns, such as labels, and a column of lists, embedding) or .npy (an "
        "array [rows, width])",
    )
    parser.add_argument("--pooling", default="mean", choices=POOLINGS, help="default mean, as in sentence-transformers")
    parser.add_argument("--batch_size", type=int, default=64, help="rows per batch; default 64")
    parser.add_argument(
        "--max_seq_length",
        type=int,
        help="maximum tokens of a text; longer ones are cut (default: the model's maximum)",
    )
    parser.add_argument("--max_samples", type=int, help="number of rows to embed, from the start (default: all)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    help_texts = {item.name: item.metadata["help"] for item in fields(DataArguments)}
    for name in _COLUMNS:
        parser.add_argument(f"--{name}", help=help_texts[name])
    return parser


def _run(options: argparse.Namespace) -> None:
    """Check the output, load the encoder, embed."""
    check_output(Path(options.output))
    if options.max_samples is not None and options.max_samples < 1:
        raise UsageError(f"max_samples must be at least 1, not {options.max_samples}. Omit it to embed all rows.")
    embedder = Embedder.from_pretrained(
        options.model,
        batch_size=options.batch_size,
        max_seq_length=options.max_seq_length,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    columns = {name: getattr(options, name) for name in _COLUMNS}
    args = DataArguments(train_file=",".join(options.files), **columns)
    source = open_source(embedder.modality, args, embedder.feature_column_names, options.max_samples)
    weights = sorted(Path(options.model).glob("*.safetensors"))
    settings = {
        "model": options.model,
        "revision": options.revision,
        "max_seq_length": embedder.max_seq_length,
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
    }
    width = embed_files(embedder, source, options.output, options.pooling, settings, show_progress=True)
    print(f"written to {options.output}: {counted(source.count, 'embedding')} of width {width:,}")
