"""`mlm COMMAND …`: finds the command's module, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done (or stopped on request with everything saved), 1 the work failed, 2 the command or its
configuration is wrong. `--traceback` shows where an error came from.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from traceback import print_exc

from mlm import __version__
from mlm.registry import UnknownName, nearest

# command -> (module below mlm.cli, one line of help). Modules are imported only when their command runs.
COMMANDS = {
    "train": ("train", "train a model from a gin file; resumes by itself"),
    "eval": ("evaluate", "score and decode tasks with a trained model"),
    "infer": ("infer", "decode a file of lines into JSON lines, resumable"),
    "generate": ("generate", "decode one text"),
    "fill": ("fill", "fill the blanks of a text, in any order"),
    "decode": ("decode", "list the ways to decode: methods, processors, proposers"),
    "decode-sweep": ("decode_sweep", "compare methods over grids of their options: best, default, spread, tokens/s"),
    "report": ("report", "write report.html, report.md and report.json of a run"),
    "tasks": ("tasks", "list registered tasks, or look at the examples of one"),
    "mixture": ("mixture", "show how often each language of a mixture is seen"),
    "vocab": ("vocab", "train a vocabulary on a mixture, or look at one"),
    "convert": ("convert", "published checkpoints to run directories, and back"),
    "experts": ("experts", "a sparse run from a dense one, fewer experts, and who uses which"),
    "model": ("model", "list the model presets, or look at one"),
}


class UsageError(ValueError):
    """The command line or the configuration is wrong; nothing has been started."""


class Failed(RuntimeError):
    """The command did its work and the result is a failure; the message says which."""


def quiet() -> None:
    """Keeps library chatter off the screen. Must run before TensorFlow or JAX are imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "3")


def console() -> int:
    """The process entry: `main`, on Linux in a process whose large arrays come in huge pages.

    XLA on a CPU allocates its temporary arrays anew at every step; with 4 kB pages a fifth of a small model's step goes
    into page faults. glibc reads the setting only when a process starts, so the command starts itself once more.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and sys.argv[1:2] in (["train"], ["report"]):
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    quiet()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="mlm",
        description="Multilingual encoder-decoder language models in JAX: train, evaluate, decode.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlm [--version] COMMAND … (mlm COMMAND --help says more)",
    )
    parser.add_argument("--version", action="version", version=f"mlm {__version__}")
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        parser.parse_args(arguments or ["--help"])
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"mlm: no command named {name!r}; {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    traceback = "--traceback" in rest
    rest = [argument for argument in rest if argument != "--traceback"]
    return guarded(name, rest, traceback)


def guarded(name: str, arguments: list[str], traceback: bool) -> int:
    """Runs the command; an expected error becomes one message and an exit code."""
    sys.path.append(os.getcwd())  # where a user's own task modules lie; last, so that they hide nothing
    try:
        command = importlib.import_module(f"mlm.cli.{COMMANDS[name][0]}")
        return command.run(arguments) or 0
    except KeyboardInterrupt:
        print("\nmlm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `mlm tasks list | head`
        return 0
    except Exception as error:
        if traceback:
            print_exc()
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        kind = "" if isinstance(error, (ValueError, KeyError, RuntimeError, OSError)) else f"{type(error).__name__}: "
        print(f"mlm {name}: {kind}{text or type(error).__name__}", file=sys.stderr)
        if kind and not traceback:
            print("This is unexpected; run again with --traceback to see where it comes from.", file=sys.stderr)
        return 2 if isinstance(error, UsageError | UnknownName) else 1


if __name__ == "__main__":
    sys.exit(console())
