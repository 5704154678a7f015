"""`jepa-hf masks`: a picture of the masks of a run that has not started."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from .console import CommandParser, quiet_libraries, report_error
from .quick_checks import check_train_command, peek_objective

_HELP = """\
usage: jepa-hf masks [CONFIG.yaml] [--flag value ...] [--picture masks.png]

Draw the first rows of the training data as a run with these flags would mask them in its first epoch. The flags are
those of train: `jepa-hf train --help_all` lists them. Nothing else is written.

  --picture PATH   PNG to write; default masks.png
"""


def main(argv: Sequence[str]) -> int:
    """Draw the masks; returns the exit code."""
    if "--help" in argv or "-h" in argv:
        print(_HELP)
        return 0
    try:
        picture, flags = _picture(argv)
        if peek_objective(flags) == "llm":
            raise UsageError("The objective llm has no masks. Use masks for texts, images and features.")
        check_train_command(flags)
        _draw(flags, picture)
    except UsageError as error:
        return report_error("jepa-hf masks", error)
    print(f"written to {picture}")
    return 0


def _draw(flags: Sequence[str], picture: Path) -> None:
    # These take seconds to import.
    from ..monitoring.mask_plots import write_masks
    from ..training.run_directory import RunPlan
    from .parsing import parse_command
    from .prepare import prepare
    from .train import finalize_arguments

    quiet_libraries()
    parsed = parse_command(flags)
    model_args, data_args, _, args = parsed
    finalize_arguments(model_args, data_args, args)
    prepared = prepare(parsed, RunPlan())
    write_masks(prepared.model, prepared.collator, prepared.train_dataset, picture, prepared.processing_class)


def _picture(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Separate the path of the picture, checked, from all other flags."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--picture", default="masks.png")
    options, flags = parser.parse_known_args(argv)
    picture = Path(options.picture)
    if picture.suffix.lower() != ".png":
        raise UsageError(f"picture {options.picture!r} does not end in .png. Name a PNG.")
    if not picture.parent.is_dir() or picture.is_dir():
        raise UsageError(
            f"picture {options.picture!r} is a folder, or its folder does not exist. Name a file in an existing folder."
        )
    if not os.access(picture.parent, os.W_OK):
        raise UsageError(f"picture {options.picture!r} is in a folder that is not writable. Name another path.")
    return picture, flags
