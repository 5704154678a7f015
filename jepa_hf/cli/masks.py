"""`jepa-hf masks`: a picture of what a run would hide, before it is started."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..monitoring.mask_plots import write_masks
from ..training.run_directory import RunPlan
from .console import complain, quiet_libraries
from .parsing import objective_of, parse_command
from .prepare import prepare
from .train import complete

_HELP = """\
usage: jepa-hf masks [CONFIG.yaml] [--flag value ...] [--picture masks.png]

Draw the first rows of the training data as a run with these flags would mask them in its first epoch. The flags are
those of train: `jepa-hf train --help` lists them. Nothing else is written.

  --picture PATH   the PNG to write, default masks.png
"""


def main(argv: Sequence[str]) -> int:
    """Draw; returns the exit code."""
    quiet_libraries()
    if "--help" in argv or "-h" in argv:
        print(_HELP)
        return 0
    try:
        picture, flags = _picture(argv)
        if objective_of(flags) == "llm":
            raise UsageError("masks draws what is hidden, and the objective llm hides nothing: just train")
        parsed = parse_command(flags)
        model_args, data_args, _, args = parsed
        complete(model_args, data_args, args)
        prepared = prepare(parsed, RunPlan())
        write_masks(prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class)
    except UsageError as error:
        return complain("jepa-hf masks", error)
    print(f"written to {picture}")
    return 0


def _picture(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Where to draw to, which must be possible, and all other flags."""
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
        raise UsageError(f"picture {options.picture!r} is a folder, or lies in none; name a file in an existing folder")
    if not os.access(picture.parent, os.W_OK):
        raise UsageError(f"picture {options.picture!r} lies in a folder that cannot be written to; name another place")
    return picture, flags
