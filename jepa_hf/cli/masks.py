"""`jepa-hf masks`: a picture of the masks of a run that has not started."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..monitoring.mask_plots import write_masks
from ..training.run_directory import RunPlan
from .console import quiet_libraries, report_error
from .parsing import parse_command, peek_objective
from .prepare import prepare
from .train import finalize_arguments

_HELP = """\
usage: jepa-hf masks [CONFIG.yaml] [--flag value ...] [--picture masks.png]

Draw the first rows of the training data as a run with these flags would mask them in its first epoch. The flags are
those of train: `jepa-hf train --help` lists them. Nothing else is written.

  --picture PATH   PNG to write; default masks.png
"""


def main(argv: Sequence[str]) -> int:
    """Draw the masks; returns the exit code."""
    quiet_libraries()
    if "--help" in argv or "-h" in argv:
        print(_HELP)
        return 0
    try:
        picture, flags = _picture(argv)
        if peek_objective(flags) == "llm":
            raise UsageError("masks draws masks, and the objective llm has none; use train")
        parsed = parse_command(flags)
        model_args, data_args, _, args = parsed
        finalize_arguments(model_args, data_args, args)
        prepared = prepare(parsed, RunPlan())
        write_masks(prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class)
    except UsageError as error:
        return report_error("jepa-hf masks", error)
    print(f"written to {picture}")
    return 0


def _picture(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Separate the path of the picture, checked, from all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--picture", default="masks.png")
    try:
        options, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error).removeprefix("argument ")) from None
    picture = Path(options.picture)
    if picture.suffix.lower() != ".png":
        raise UsageError(f"picture {options.picture!r} does not end in .png; name a PNG")
    if not picture.parent.is_dir() or picture.is_dir():
        raise UsageError(
            f"picture {options.picture!r} is a folder, or its folder does not exist; name a file in an existing folder"
        )
    if not os.access(picture.parent, os.W_OK):
        raise UsageError(f"picture {options.picture!r} is in a folder that is not writable; name another path")
    return picture, flags
