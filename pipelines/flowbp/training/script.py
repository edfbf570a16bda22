# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Scripts as programs: a command line, one-line errors, and exit codes."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from ..checks import RecordingError
from ..file_errors import message_of
from ..files import allow_any_character
from ..publishing.push import PushError
from ..publishing.run_info import one_line, redact_text
from ..verification import VerificationError
from .backbone import Backbone
from .distributed import exit_process
from .loop import train
from .signals import TrainingStopped
from .state import TrainingError
from .train_command_line import parse_training_config

# What a user can put right: `run_script` prints these in one line.
USER_ERRORS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    RecordingError,
    SafetensorError,
    TrainingError,
    PushError,
    VerificationError,
)


def train_from_command_line(
    backbone: type[Backbone], description: str, folder: Path, argv: list[str] | None = None
) -> None:
    """`main` of a training script.

    Args:
        backbone: of the script.
        description: its docstring, whose first line begins `--help`.
        folder: of the script; its `recipes` may be named by `--config` without a path.
        argv: the arguments; those of the process by default.
    """
    config = parse_training_config(backbone, description.partition("\n")[0], argv, folder / "recipes")
    train(config, backbone, command=sys.argv if argv is None else [sys.argv[0], *argv])


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` as a program.

    Ends the process with the exit code 1 after an error (in one line what a user can put right, else a traceback; no
    secrets in either), 2 after a bad command line, 128 + the signal's number after a checkpoint on a signal. Several
    processes end here also when all is done.
    """
    allow_any_character()
    code: int | str = 0
    try:
        main()
    except TrainingStopped as stopped:
        code = 128 + stopped.signal_number
    except USER_ERRORS as error:
        code = f"{Path(sys.argv[0]).name}: error: {one_line(message_of(error))}"
    except SystemExit as stop:
        code = 0 if stop.code is None else stop.code
    except Exception as error:
        code = redact_text(traceback.format_exc())
        if "does not have a deterministic implementation" in str(error):
            reason = str(error).partition(", but you set")[0]
            code = f"{Path(sys.argv[0]).name}: error: --deterministic: {reason}; leave it out."
    exit_process(code)
