"""The command line: argv to Config and back; the only file that prints."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from onnx_lowrank import pipeline, runtime
from onnx_lowrank.cache import LIMIT, open_cache
from onnx_lowrank.config import Config
from onnx_lowrank.files import write_whole
from onnx_lowrank.graph.save import check_destination
from onnx_lowrank.options import FILES_WRITTEN, add_options, config_of
from onnx_lowrank.planning.plans import plan_to_dict
from onnx_lowrank.report.data import package_version
from onnx_lowrank.report.page import (
    Origin,
    inspection_page,
    require_jinja,
    result_page,
    verification_page,
    write_page,
)
from onnx_lowrank.report.text import render_inspection, render_report, render_verification
from onnx_lowrank.runtime.ort_format import SUFFIX as ORT
from onnx_lowrank.targets import TARGETS, find_target
from onnx_lowrank.types import LowRankError

MET, UNMET, BAD_INPUT = 0, 1, 2
STOPPED: dict[int, tuple[str, int]] = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
"""What a signal is called, and the exit code of a run that it ended."""

UNBROKEN = 100_000
"""Columns of what is piped: no line is broken for a program that reads it."""

GRACE_SECONDS = 10.0
"""Time to clean up after a signal. Files are whole at any moment; what is left in scratch folders goes with the next run."""


MODEL_HELP = "model to read (.onnx); it is never changed"
OUT_HELP = "model to write (.onnx, or .ort for mobile builds); what was not met goes to NAME.unmet.onnx"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: all that Ctrl-C stops and cleans up is stopped and cleaned up by it too."""


class _Parser(argparse.ArgumentParser):
    """argparse, with one line in the place of the usage text for a mistake."""

    def error(self, message: str) -> NoReturn:
        raise LowRankError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Told by the parser that met it: the one of a command knows its own options, and says which one is near."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            first = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(first, self._option_string_actions, n=1, cutoff=0.75)
            meant = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return known, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0: everything asked for was met, 1: not met, 2: bad input."""
    errors = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    arguments = None
    try:
        parser = _parser()
        arguments = parser.parse_args(argv)
        if arguments.name is None:
            parser.print_help()
            parser.error("COMMAND was not given")
        arguments.line = shlex.join(["onnx-lowrank", *(sys.argv[1:] if argv is None else argv)])
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        logging.getLogger("onnx_lowrank").setLevel(logging.DEBUG if arguments.verbose else logging.NOTSET)
        with _stoppable(arguments):
            return int(arguments.command(arguments))
    except LowRankError as error:
        errors.print("onnx-lowrank:", str(error), markup=False)
        return BAD_INPUT
    except KeyboardInterrupt as error:
        line, code = _stopped(signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT, arguments)
        errors.print(line, markup=False)
        return code


def _stopped(number: int, arguments: argparse.Namespace | None) -> tuple[str, int]:
    """What is said of a run that a signal ended, with what it left behind, and its exit code."""
    how, code = STOPPED[number]
    left = "each file is as it was or whole" if hasattr(arguments, "writing") else "nothing was written"
    return f"onnx-lowrank: {how}; {left}", code


@contextmanager
def _stoppable(arguments: argparse.Namespace) -> Iterator[None]:
    """SIGINT and SIGTERM raise an exception; where that does not end the run, or one comes again, the process ends at once.

    It may not: processes that are ended while they send something can leave the one that waits for it waiting for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def end(number: int) -> None:
        line, code = _stopped(number, arguments)
        os.write(2, f"{line}\n".encode())
        os._exit(code)

    def stop(number: int, frame: object) -> None:
        if timers:
            end(number)
        timers.append(threading.Timer(GRACE_SECONDS, end, [number]))
        timers[0].daemon = True
        timers[0].start()
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = [signal.SIGTERM]
    # a run in the background may be told to ignore it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="onnx-lowrank", description="Smaller, faster ONNX models by low-rank decomposition, after training."
    )
    parser.add_argument("--version", action="version", version=package_version())
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        sub.add_argument("--quiet", action="store_true", help="print nothing but errors")
        sub.add_argument(
            "--verbose",
            action="store_true",
            help="print what happens inside; without a terminal, each stage as it begins",
        )
        return sub

    sub = command("inspect", _inspect, "what is in a model, what each layer could become, why others are left alone")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_options(sub, "layers", "graph", "inputs", "target", "work", "reports", "page")

    sub = command("compress", _compress, "the main job: a smaller, faster model, checked")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT", help=OUT_HELP)
    add_options(
        sub,
        *("goal", "layers", "result", "graph", "data", "training", "inputs", "target", "provider", "latency", "work"),
        *("reports", "page"),
    )

    sub = command("apply", _apply, "a saved (and perhaps edited) plan, executed")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("plan_file", metavar="PLAN", help="plan to carry out: what --plan of compress wrote (.json)")
    sub.add_argument("out", metavar="OUT", help=OUT_HELP)
    add_options(
        sub,
        *("result", "graph", "data", "training", "inputs", "target", "provider", "latency", "work", "reports", "page"),
    )

    sub = command("verify", _verify, "accuracy, latency and placement of two models, side by side")
    sub.add_argument("model", metavar="ORIGINAL", help="model to compare with (.onnx)")
    sub.add_argument("other", metavar="OTHER", help="model to compare: a version of the same (.onnx)")
    add_options(sub, "data", "inputs", "target", "provider", "latency", "reports", "page")

    sub = command("bundle", _bundle, "models and a script that measure on a device what a plan for it needs")
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    sub.add_argument("out", metavar="OUT.zip", help="archive to write, for the device")
    add_options(sub, "layers", "inputs", "target", "latency", "work")

    sub = command(
        "providers", _providers, "the execution providers of this build of ONNX Runtime, and which of them work here"
    )
    add_options(sub, "provider", "reports")

    sub = command("cache", _cache, "what is kept of earlier runs, so that nothing is done twice")
    sub.add_argument("--clear", action="store_true", help="remove all of it")
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_files(arguments, config, *_written(arguments))
    with _progress(arguments) as progress:
        view = pipeline.inspect(arguments.model, config=config, progress=progress, details=bool(arguments.report))
    if arguments.json:
        _write_json(arguments.json, view.to_dict())
    if arguments.report:
        write_page(arguments.report, inspection_page(view, _origin(arguments)))
    _print(arguments, render_inspection(view))
    return MET


def _compress(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_format(arguments.out, config)
    _check_files(arguments, config, arguments.out, _unmet(arguments.out), *_written(arguments))
    with _progress(arguments) as progress:
        result = pipeline.compress(arguments.model, config=config, progress=progress, details=bool(arguments.report))
    return _write(arguments, result)


def _apply(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_format(arguments.out, config)
    _check_files(arguments, config, arguments.out, _unmet(arguments.out), *_written(arguments))
    with _progress(arguments) as progress:
        result = pipeline.apply(
            arguments.model, arguments.plan_file, config=config, progress=progress, details=bool(arguments.report)
        )
    return _write(arguments, result)


def _write(arguments: argparse.Namespace, result: pipeline.Result) -> int:
    out = arguments.out if result.met else _unmet(arguments.out)
    arguments.writing = True
    result.save(out)
    if getattr(arguments, "plan", None):
        _write_json(arguments.plan, plan_to_dict(result.plan))
    if arguments.json:
        _write_json(arguments.json, result.report.to_dict())
    if arguments.report:
        write_page(arguments.report, result_page(result, _origin(arguments, out)))
    _print(arguments, render_report(result.report))
    stale = not result.met and os.path.exists(arguments.out)
    older = f"; {arguments.out} is of an earlier run" if stale else ""
    _print(arguments, [Text(f"written: {out}{older}")], wrap=False)  # a path in two lines is no path
    return MET if result.met else UNMET


def _origin(arguments: argparse.Namespace, other: str = "") -> Origin:
    return Origin(arguments.model, arguments.line, other)


def _written(arguments: argparse.Namespace) -> list[str | None]:
    """The files asked for beside the model, each of which can be made."""
    if arguments.report:
        require_jinja()
    return [getattr(arguments, name, None) for name in FILES_WRITTEN]


def _unmet(out: str) -> str:
    """Where the best result found goes when it is not what was asked for: never under the name that was."""
    return os.path.splitext(out)[0] + ".unmet.onnx"


def _verify(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_files(arguments, config, *_written(arguments))
    with _progress(arguments) as progress:
        check = pipeline.verify(arguments.model, arguments.other, config=config, progress=progress)
    if arguments.json:
        _write_json(arguments.json, check.to_dict())
    if arguments.report:
        write_page(arguments.report, verification_page(check, _origin(arguments, arguments.other)))
    _print(arguments, render_verification(check))
    return MET if check.met else UNMET


def _bundle(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_files(arguments, config, arguments.out)
    with _progress(arguments) as progress:
        made = pipeline.bundle(arguments.model, arguments.out, config=config, progress=progress)
    size, later = made.size_bytes / 1e6, made.weights_bytes / 1e6
    said = (
        f"{made.models} models and the original, {size:.1f} MB; {later:.1f} MB of random weights are made on the device"
    )
    steps = "There: unpack it, then `python bench.py` (--help shows its options). Here again: --target results.json"
    _print(arguments, [Text(said), Text(steps)])
    _print(arguments, [Text(f"written: {made.path}")], wrap=False)
    return MET


def _cache(arguments: argparse.Namespace) -> int:
    found = open_cache()
    if found is None:
        _print(arguments, [Text("nothing is kept: ONNX_LOWRANK_CACHE is empty")])
        return MET
    if arguments.clear:
        found.clear()
    sizes = ", ".join(f"{count} {kind} ({size / 1e6:.1f} MB)" for kind, (count, size) in found.sizes().items())
    _print(arguments, [Text(f"{sizes}; results of layers take at most {found.bound / 1e6:.0f} MB ({LIMIT})")])
    _print(arguments, [Text(str(found.folder))], wrap=False)
    return MET


def _providers(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    _check_files(arguments, config, arguments.json)
    found = dict(pipeline.providers(config=config))
    if arguments.json:
        _write_json(arguments.json, {"onnxruntime": runtime.version(), "providers": found})
    lines = [f"{name}: {state}" for name, state in found.items()]
    checks = [f"--target {target.name}: {target.without}" for target in TARGETS.values() if target.without]
    others = "Any other comes with a build of ONNX Runtime, or as a library: --provider-library NAME=PATH"
    parts = [f"ONNX Runtime {runtime.version()}", *lines, others, "What can be checked without the devices:", *checks]
    _print(arguments, [Text(part) for part in parts])
    asked = runtime.named(config.provider, found) or config.provider
    return MET if found.get(asked, "").startswith("works") else UNMET


FILES_READ = ("other", "plan_file", "target", "config", "calibrate", "evaluate", "train", "preprocess")


def _check_format(out: str, config: Config) -> None:
    """See before the work that what was asked for can be had in the format of mobile builds, where that is written."""
    if Path(out).suffix != ORT:
        return
    if any(budget.metric == "size" for budget in config.budget):
        raise LowRankError(f"{out}: bytes of the .ort format are known once it is written: give a budget on params")
    if config.quantize != "none" and find_target(config.target).compiled:
        raise LowRankError(
            f"{out}: ONNX Runtime cannot bring models in eight bits into the .ort format for {config.target}: write .onnx"
        )


def _check_files(arguments: argparse.Namespace, config: Config, *files: str | None) -> None:
    """See before the work that everything can be written after it, and over nothing that is read."""
    options = {**vars(config), **vars(arguments)}
    read = [Path(file) for name in FILES_READ if isinstance(file := options.get(name), str)]
    results = [Path(file) for file in files if file is not None]
    model = Path(arguments.model) if hasattr(arguments, "model") else None
    for path in results:
        check_destination(path, model)
        if path.exists() and any(file.exists() and path.samefile(file) for file in read):
            raise LowRankError(f"{path} is a file that was given: choose another name for the result")
    if len({path.resolve() for path in results}) != len(results):
        raise LowRankError("one file was named for two results: a name for each was expected")


def _write_json(path: str, data: dict[str, Any]) -> None:
    write_whole(Path(path), [(json.dumps(data, indent=1) + "\n").encode()])


class _Console(Console):
    """Whoever reads may stop before the end (``| head``): what was done, and the exit code, stay."""

    def on_broken_pipe(self) -> None:
        """Print no more."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(arguments: argparse.Namespace, parts: Iterable[Any], *, wrap: bool = True) -> None:
    if not arguments.quiet:
        console = _Console(highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = UNBROKEN
        for part in parts:
            console.print(part, soft_wrap=not wrap)


@contextmanager
def _progress(arguments: argparse.Namespace) -> Any:
    """Bars on a terminal; when piped nothing, or with --verbose a line as each stage begins; nothing when quiet."""
    console = Console(stderr=True)
    told = arguments.verbose and not arguments.quiet and not console.is_terminal
    start = time.monotonic()
    # 80 characters, whatever the stages are called
    columns = (
        TextColumn("{task.description:>11}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(
        *columns, console=console, transient=True, disable=arguments.quiet or not console.is_terminal
    ) as bars:
        tasks: dict[str, tuple[Any, int]] = {}

        def report(stage: str, done: int, total: int) -> None:
            name, _, note = stage.partition(": ")  # what follows may change: how well it goes
            if not total:
                return
            if told and name not in tasks:
                console.print(f"{time.monotonic() - start:7.1f} s: {name}", markup=False, highlight=False)
            task, before = tasks.get(name) or (bars.add_task(name, total=total, note=""), 0)
            if done < before:  # the same again: how fast it went before says nothing
                bars.reset(task)
            tasks[name] = task, done
            bars.update(task, completed=done, total=total, note=note or ("" if done >= total else "left"))

        yield report
