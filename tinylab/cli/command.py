"""From arguments to an exit code: find the verb, parse its options with tyro, print its answer or one message.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 nothing usable found, 130 and 143 stopped by a signal.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Annotated, Any, TextIO, cast, get_type_hints

import tinylab
from tinylab.cli.output import Answer, to_json
from tinylab.errors import EXIT_FAILED, EXIT_USAGE, TinylabError, did_you_mean

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("machine", "everything once on this machine, offline: from corpus to report"),
    "doctor": ("machine", "what works here, what does not, and the remedy"),
    "plan": ("machine", "memory, speed, days and cost of a run before it starts"),
    "bench": ("machine", "measure side by side with a named peer"),
    "prepare": ("data", "make tokenizer and token shards from corpora"),
    "batch": ("data", "the samples of a step, and the documents they come from"),
    "train": ("training", "start a run or resume it, by the same command"),
    "launch": ("launching", "the same on several ranks or under Slurm, outside of this terminal"),
    "attach": ("launching", "follow a run to its end"),
    "stop": ("launching", "end a run after a checkpoint"),
    "runs": ("launching", "list runs and their state"),
    "checkpoints": ("catalog", "own and published milestones; audit, fetch, remove"),
    "verify": ("checkpoints", "compare files with their manifests"),
    "convert": ("checkpoints", "write a model in another checkpoint format"),
    "generate": ("checkpoints", "write text with a model"),
    "evaluate": ("evaluation", "score models and keep every item"),
    "scores": ("evaluation", "tables of scores with intervals"),
    "compare": ("evaluation", "two models on the same items, pair by pair"),
    "run": ("notebooks", "execute a notebook with strict parameters"),
    "report": ("notebooks", "show runs in one offline HTML file"),
}
"""Each verb's module in tinylab/cli and one line of help. The function in the module is called `<verb>_verb`."""

_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}

COMMON = """options of every verb:
  --json     one JSON document on standard output; progress and messages stay on standard error
  --debug    with an error, show where it came from
  --help     the verb's own options"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of this process) and return its exit code; errors become one message."""
    # OpenMP reads this when torch is loaded. By default its threads spin so long while one of them waits for a core
    # that training beside one other busy process becomes several times slower (measured: notebooks/LOG.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = _take(arguments, "--debug"), _take(arguments, "--json")
    with _streams():
        return _run(arguments, debug, as_json)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Standard streams that take every character and, for messages, outlive their reader."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # standard error does so by itself
    with contextlib.redirect_stderr(cast(TextIO, _Messages(sys.stderr))):
        yield


class _Messages:
    """Standard error whose reader may leave (`2>&1 | head`, a closed terminal): messages are lost, work continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run(arguments: list[str], debug: bool, as_json: bool) -> int:
    try:
        return _show(_dispatch(arguments, as_json), as_json)
    except KeyboardInterrupt:
        return _fail("stopped by interrupt", 130, debug)
    except TinylabError as error:
        return _fail(str(error), error.exit_code, debug)
    except ModuleNotFoundError as error:
        return _fail(_missing_module(error), EXIT_FAILED, debug)
    except OSError as error:
        return _fail(_system_message(error), EXIT_FAILED, debug)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return _fail(f"{detail}\nThis is a defect of tinylab: repeat with --debug and report it", EXIT_FAILED, debug)


def _take(arguments: list[str], option: str) -> bool:
    """Whether `option` is among the arguments; it is removed from them."""
    present = option in arguments
    arguments[:] = [a for a in arguments if a != option]
    return present


def _dispatch(arguments: list[str], as_json: bool) -> Answer:
    verb = arguments[0] if arguments else "--help"
    if verb in ("--help", "-h", "help"):
        return Answer({"verbs": {name: line for name, (_, line) in VERBS.items()}}, usage())
    if verb in ("--version", "-V"):
        return Answer({"version": tinylab.__version__}, tinylab.__version__)
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS, "see tinylab --help")
        print(f"tinylab: the verb must be one of {', '.join(VERBS)}; found {verb!r}; {hint}", file=sys.stderr)
        return Answer(None, "", EXIT_USAGE)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars, those of libraries too, are for terminals
    import tyro

    parse = _bound(_verb_function(verb))
    try:
        call = tyro.cli(
            parse,
            prog=f"tinylab {verb}",
            args=arguments[1:],
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
    except SystemExit as stop:  # help was printed, or the error on standard error
        return Answer(None, "", int(stop.code or 0))
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return call()


def _verb_function(verb: str) -> Callable[..., Answer]:
    return getattr(importlib.import_module(f"tinylab.cli.{VERBS[verb][0]}"), f"{verb}_verb")


def _bound(function: Callable[..., Answer]) -> Callable[..., Callable[[], Answer]]:
    """The verb with the same options, but a call only binds them: tyro's errors are then wrong usage, all others not.

    The help leaves out empty defaults, and an option's text is one paragraph, however its docstring breaks.
    """
    from tyro.conf import arg

    @wraps(function)
    def bind(*args: object, **kwargs: object) -> Callable[[], Answer]:
        return partial(function, *args, **kwargs)

    del bind.__wrapped__  # tyro would look through it
    signature = inspect.signature(function)
    bind.__dict__["__signature__"] = signature
    bind.__doc__ = re.sub(r"\n {12,}(?=\S)", " ", function.__doc__ or "")
    bind.__annotations__ = get_type_hints(function, include_extras=True)
    for name, parameter in signature.parameters.items():
        if any(parameter.default is nothing for nothing in (None, False, (), parameter.empty)):
            bind.__annotations__[name] = Annotated[bind.__annotations__[name], arg(help_behavior_hint="")]
    return bind


def usage() -> str:
    """The help of the whole command, on one screen."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name.ljust(width)}  {line}" for name, (_, line) in VERBS.items())
    return (
        "usage: tinylab VERB [ARGUMENTS] [OPTIONS]     (also: tinylab --version)\n\n"
        f"verbs:\n{verbs}\n\n{COMMON}\n\n"
        "RUN is a path, or a name below runs/ in TINYLAB_HOME (default: the current folder).\n"
        "REF is a model: a folder, RUN, RUN@STEP, RUN@1.5M (tokens), RUN@STAGE, a published milestone\n"
        "(tinyllama-1.1b@1T; list: tinylab checkpoints --published), a Hub id, a lit-gpt .pth.\n"
        "First steps: tinylab demo, then: tinylab train mine --preset tiny --tokens 2M"
    )


def _missing_module(error: ModuleNotFoundError) -> str:
    name = (error.name or "").partition(".")[0]
    if name == "tinylab":
        return f"this installation of tinylab lacks {error.name}: install it again (make setup)"
    return f"the package {name} must be installed for this; found none. Run: pip install -e '.[notebook,evaluate]'"


def _system_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the free space on its disk"


def _fail(message: str, code: int, debug: bool) -> int:
    """Print one message on standard error (and with `debug` the traceback) and return the exit code."""
    if debug:
        traceback.print_exc()
    print(f"tinylab: {_visible(message, sys.stderr)}", file=sys.stderr, flush=True)
    return code


def _visible(text: str, stream: TextIO) -> str:
    """The text; for a terminal, control characters are spelled out, because models and documents may contain any."""
    return text.translate(_CONTROLS) if stream.isatty() else text


def _show(answer: Answer, as_json: bool) -> int:
    """Print the answer; returns its exit code, also where the reader has left (`| head`)."""
    text = to_json(answer.document) if as_json and answer.document is not None else answer.text
    try:
        if text:
            print(_visible(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return answer.exit_code
