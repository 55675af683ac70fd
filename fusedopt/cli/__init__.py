"""The command line: `fusedopt demo`, `fusedopt plot`, `fusedopt plan`, `fusedopt info`.

Torch, and all that needs it, is imported inside `main`, where the environment is ready and Ctrl-C is caught.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import fusedopt
from fusedopt.cli.threads import share_the_cores
from fusedopt.out_of_memory import is_out_of_memory


class _Parser(argparse.ArgumentParser):
    """Prints one sentence for a mistake instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse ignores a full disk


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake is one sentence on stderr and exit code 2.

    Args:
        arguments: without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code: 0, 2, 130 after Ctrl-C, or 141 if the reader of the output has closed it.
    """
    _prepare_streams()
    if "torch" not in sys.modules:  # torch reads it when it is imported
        share_the_cores(os.environ)
    command = "fusedopt"
    try:
        try:
            options = _parser().parse_args(arguments)
            command += f" {options.command}"
            options.run(options)
        finally:
            sys.stdout.flush()
        return 0
    except BrokenPipeError:
        code, sentence = 141, ""
    except KeyboardInterrupt:
        code, sentence = 130, "interrupted"
    except (ValueError, OSError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        code, sentence = 2, _sentence(error)
        if not sentence:
            raise
    with suppress(OSError):
        if sentence:
            print(f"{command}: {sentence}", file=sys.stderr, flush=True)
    _leave_nothing_unwritten()
    return code


def _prepare_streams() -> None:
    """Makes streams write `\\xe9` for letters that they cannot encode, and replaces closed ones."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave_nothing_unwritten() -> None:
    """Flushes the streams, and discards what cannot be written: at its end, Python would complain again."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _sentence(error: Exception) -> str:
    """Returns a sentence for the user; empty for a defect, where the traceback says more."""
    if is_out_of_memory(error):
        return "there is not enough memory for this; take a smaller model or a smaller batch"
    if isinstance(error, RuntimeError):
        return ""
    if isinstance(error, ModuleNotFoundError):
        ours = (error.name or "fusedopt").startswith("fusedopt")
        return "" if ours else f"{error.name} is not installed; run: pip install {error.name}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename or 'the output'}: {error.strerror}"
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    from fusedopt.cli.demo import add_demo_command
    from fusedopt.cli.info import add_info_command
    from fusedopt.cli.plan import add_plan_command
    from fusedopt.cli.plot import add_plot_command

    parser = _Parser(
        prog="fusedopt",
        description="The optimizers and schedules of Hugging Face transformers for PyTorch, fused into a handful of "
        "Triton launches.",
    )
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="command", required=True, parser_class=_Parser
    )
    add_demo_command(commands)
    add_plot_command(commands)
    add_plan_command(commands)
    add_info_command(commands)
    return parser
