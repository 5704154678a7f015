"""`jepa-hf embed`: one vector per row of files."""

import argparse
from pathlib import Path

from ..data.arguments import DataArguments
from ..evaluation.embed_files import check_output, embed_files
from ..evaluation.embedder import Embedder
from ..evaluation.row_sources import open_source
from ..utils.counts import counted

_COLUMNS = ("text_column_name", "image_column_name", "feature_column_names", "label_column_name")


def run(options: argparse.Namespace) -> None:
    """Check the output, load the encoder, embed."""
    check_output(Path(options.output))
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
    try:
        width = embed_files(embedder, source, options.output, options.pooling, settings, show_progress=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Run the same command again to continue after the finished parts.") from None
    print(f"written to {options.output}: {counted(source.count, 'embedding')} of width {width:,}")
