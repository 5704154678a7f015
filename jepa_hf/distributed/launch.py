"""Start of the processes of an accelerate configuration."""

import logging
import os
import subprocess  # nosec B404
from collections.abc import Sequence

from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def launch(config: str, command: Sequence[str]) -> int:
    """Run a command as `accelerate launch --config_file config command` does, without tracebacks of the launcher.

    The processes print their own errors.

    Returns:
        The exit code: that of the process that failed first, or 128 plus the number of a signal.
    """
    # They would report what the processes have reported.
    for name in ("torch.distributed.run", "torch.distributed.elastic", "torch.distributed.elastic.multiprocessing.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if load_config_from_file(config).use_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate sets it for a single process only
    try:
        launch_command(launch_command_parser().parse_args(["--config_file", config, *command]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except subprocess.CalledProcessError as error:  # of a single process
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except KeyboardInterrupt:
        return 130
    return 0
