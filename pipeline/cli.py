"""The `dwindle` command: click, lazily loaded, one place where errors become exit codes.

`dwindle --help` imports this file and nothing heavy: the summaries stand in the table below, the command's own
module is imported when the command is used (and those import torch inside their functions).

Exit codes: 0 done; 1 a gate failed (quality, parity, budget); 2 bad input or usage, or no room left on the disk or in
memory; 130 interrupted (Ctrl-C or SIGTERM, which a cluster sends before it takes a machine back).
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from dwindle.errors import DwindleError

__all__ = ["cli", "main"]

COMMANDS = {
    "run": ("runs:run", "Run a recipe: every step, cached and resumable, into one folder with a report."),
    "data": ("data:data", "Build curated corpora with their cards, show them, let a model write text."),
    "demo": ("runs:demo", "Run the whole line on the embedded teacher, in a few minutes."),
    "fit": ("fit:fit", "Find the shape and bits that meet a device's targets, from a config alone."),
    "prune": ("models:prune", "Cut units out of a model by their importance; the result loads anywhere."),
    "distill": ("distill:distill", "Train a student to follow its teacher."),
    "quantize": ("quantize:quantize", "Turn weights into palettes or integers, to a size, packed."),
    "recover": ("adapters:recover", "Train an adapter that gives a quantized model back what it lost."),
    "adapt": ("adapt:adapt", "Train an adapter that teaches a model one task."),
    "adapters": ("adapters:adapters", "List, show, compare, merge and package adapters; let a teacher write traces."),
    "export": ("export:export", "Write ONNX, Core ML and Core AI, execute them, prove them equal to the model."),
    "evaluate": ("models:evaluate", "Measure a model or an exported artifact on a text."),
    "generate": ("generate:generate", "Ask a model or an exported artifact, with an adapter; keep the best of N."),
    "validate": ("targets:validate", "Hold a run to budgets on device profiles."),
    "bench": ("targets:bench", "Measure an exported artifact on a real target."),
    "devices": ("targets:devices", "List, show, check or add device profiles."),
    "report": ("runs:report", "Show the report of a run, or write its HTML again."),
    "reproduce": ("reproduce:reproduce", "Run a finished run's recipe again and compare every hash and number."),
    "compare": ("runs:compare", "Set two or more runs side by side; fail on a regression."),
    "doctor": ("targets:doctor", "Show versions, their known conflicts, and what can run here."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, not when their names are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table: the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, imported from its module."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"dwindle.pipeline.commands.{module}"), name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command for the first word; an unknown one is answered with the nearest."""
        if args and args[0] not in COMMANDS:
            from dwindle.errors import did_you_mean

            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


class _Lines(logging.Handler):
    """Writes log records as the lines that commands print themselves, to whatever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line: progress with a mark, anything worse with its word."""
        mark = "> " if record.levelno <= logging.INFO else f"{record.levelname.capitalize()}: "
        styled = click.style(mark, fg="cyan" if record.levelno <= logging.INFO else "yellow")
        click.echo(styled + _printable(record.getMessage()), err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dwindle", prog_name="dwindle")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-v", "--verbose", is_flag=True, help="Log more, on stderr.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, verbose: bool) -> None:
    """Make a language model small and fast enough for a phone, with proof.

    Start with `dwindle demo`; then write a recipe (recipes/) and `dwindle run` it.
    """
    ctx.obj = {"debug": debug}
    root = logging.getLogger()
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        root.addHandler(_Lines())
    logging.getLogger("dwindle").setLevel(logging.DEBUG if verbose else logging.INFO)
    for noisy in ("torchao", "torch.utils._pytree"):  # kernels for GPUs that are not there; nothing a user can act on
        logging.getLogger(noisy).setLevel(logging.ERROR)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_LONGEST_MESSAGE = 20_000


def _printable(text: str) -> str:
    """Return a message without characters that would steer a terminal: names in it may come from foreign files."""
    cut = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ... ({len(text):,} characters)"
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), cut)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _room_is_gone(error: Exception) -> str | None:
    """Return what to say if the disk or the memory is full, else None."""
    from dwindle.storage import disk_is_full

    if disk_is_full(error):
        return (
            f"no space left on the device ({error}). Free some space; finished steps are kept, run it again to go on."
        )
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return (f"not enough memory ({text or type(error).__name__}). Take a smaller batch or context, or a machine "
                "with more memory; finished steps are kept.")  # fmt: skip
    return None


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
             errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip


def _refused(error: Exception) -> str | None:
    """Return what to say if the system refuses a file or folder by name, else None."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _REFUSALS:
        return None
    return (
        f"{os.fsdecode(error.filename)}: {error.strerror}. Correct the path or its permissions (--debug tells where)."
    )


def _broken_package(error: Exception) -> str | None:
    """Return what to say if the import of an installed package failed, else None."""
    from dwindle.pipeline.imports import package_at_fault

    package = package_at_fault(error)
    if package is None:
        return None
    return (f"{package} is installed but cannot be imported ({type(error).__name__}: {error}). What needs it cannot "
            "run here; everything else can. Install it again, and see: dwindle doctor")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with the exit code of what happened."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = cli.main(args=words, prog_name="dwindle", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Finished steps are kept; run the same command again to go on.", err=True)
        sys.exit(130)
    except DwindleError as error:
        if debug:
            raise
        click.echo(f"Error: {_printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        told = _room_is_gone(error) or _broken_package(error) or _refused(error)
        if debug or told is None:
            raise
        click.echo(f"Error: {_printable(told)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
