"""Providers beside the CPU, each configuration in a process of its own: options that stick for a process, and a crash, end with it.

What a process is asked to do is a function and its arguments, pickled; sessions stay where they are, and a :class:`SessionApart`
stands for each of them here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnx_lowrank.runtime import timing
from onnx_lowrank.runtime.providers import CPU, named
from onnx_lowrank.runtime.session import Feeds, Placed, RunSettings, Session, probe
from onnx_lowrank.types import LowRankError
from onnx_lowrank.work.processes import end_with

SECONDS = 300
"""Longest time that a trial may take: simulators of devices compile slowly."""

READY = b"onnx-lowrank listens\n"
"""What a process says when it can be asked."""


class SessionApart(Placed):
    """What :class:`~onnx_lowrank.runtime.Session` is, of a model in another process."""

    def __init__(self, host: Host, number: int, provider: str, outputs: tuple[str, ...], placement: dict[str, int]):
        self.host, self.number = host, number
        self.provider, self.outputs, self._placement = provider, outputs, placement
        # collected at any moment, even while something is sent: the process is told with the next request
        weakref.finalize(self, host.forgotten.append, number)

    @property
    def placement(self) -> dict[str, int]:
        """As the session said when it was opened."""
        return self._placement

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Values of the outputs (all of them by default).

        Raises
        ------
        LowRankError
            Where the model fails on these feeds, or its process ends.
        """
        values: list[np.ndarray] = self.host.ask(Session.run, self, dict(feeds), outputs)
        return values


def python(code: str) -> list[str]:
    """Command that runs code in another Python, with libraries from where this one has them.

    By ``-m`` or a plain ``-c`` a file of the current folder could stand for one.
    """
    paths = list(map(str, sys.path))
    return [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}; {code}"]


AnySession = Session | SessionApart
"""A whole model on ONNX Runtime, here or in a process of its own."""


class Host:
    """The process of one configuration; it ends when nothing here has a session in it any more."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with the process
        self._process = start(self._said)
        assert self._process.stdin and self._process.stdout
        self._requests, self._answers = self._process.stdin, self._process.stdout
        for line in iter(self._answers.readline, b""):  # a library may print before anything here is asked
            if line.endswith(READY):
                break
        self._one_at_a_time = threading.Lock()
        self.forgotten: list[int] = []
        weakref.finalize(self, _end, self._process, self._said)

    @property
    def alive(self) -> bool:
        """Whether it can be asked for more."""
        return self._process.poll() is None

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None, **named: Any) -> Any:
        """What `function` returns in the process.

        Parameters
        ----------
        limit
            The process is ended after so many seconds.

        Raises
        ------
        LowRankError
            As `function` does; where the process ends meanwhile.
        """
        with self._one_at_a_time:
            failed, value = self._ask((function, arguments, named), limit)
        if failed:
            try:
                raise value
            finally:
                del value, self  # which the error would hold on to, and with it the process
        return value

    @property
    def _last_words(self) -> str:
        """The last line that the process wrote, for a message."""
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - 4096))
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({last[:200]})" if last else ""

    def _ask(self, asked: tuple[Any, ...], limit: float | None) -> tuple[bool, Any]:
        forgotten, self.forgotten[:] = list(self.forgotten), []
        watch = threading.Timer(limit or 0, self._process.kill)
        if limit:
            watch.start()
        try:
            _Sender(self._requests, self).dump((forgotten, *asked))
            self._requests.flush()
            answer: tuple[bool, Any] = _Receiver(self._answers, self).load()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            late = watch.finished.is_set()
            if not isinstance(error, (EOFError, OSError)):
                self._process.kill()
            why = f"gave no answer in {limit:.0f} seconds" if late else f"ended with code {self._process.wait()}"
            raise LowRankError(
                f"{self._provider} or its driver crashed: its process {why}{self._last_words}"
            ) from error
        except BaseException:  # half an answer is on its way
            self._process.kill()
            raise
        finally:
            watch.cancel()
        return answer


_hosts: weakref.WeakValueDictionary[object, Host] = weakref.WeakValueDictionary()
"""By configuration; held by the sessions in them."""


def open_session(model: str | Path | bytes, settings: RunSettings, *, folder: Path | None = None) -> AnySession:
    """Load `model`; what runs on anything but the CPU does so in a process of its own.

    Raises
    ------
    LowRankError
        As :class:`~onnx_lowrank.runtime.Session`; where the process ends meanwhile.
    """
    if named(settings.provider, [CPU]) and not settings.libraries:
        return Session(model, settings, folder=folder)
    key = settings.provider.lower(), settings.options, settings.libraries
    host = _hosts.get(key)
    if host is None or not host.alive:
        host = _hosts[key] = Host(settings.provider)
    session: SessionApart = host.ask(Session, model, settings, folder=folder)
    return session


def probe_apart(settings: RunSettings, model: bytes, feeds: Feeds) -> str:
    """As :func:`~onnx_lowrank.runtime.session.probe`, in a process of its own."""
    try:
        answer: str = Host(settings.provider).ask(probe, settings, model, dict(feeds), limit=SECONDS)
    except LowRankError as error:
        return f"does not work: {error}"
    return answer


def time_pair(first: timing.Runs, second: timing.Runs, feeds: Feeds, **limits: float) -> timing.Timing:
    """As :func:`~onnx_lowrank.runtime.timing.time_pair`, in the process that both sessions are in."""
    if isinstance(first, SessionApart) and isinstance(second, SessionApart):
        times: timing.Timing = first.host.ask(timing.time_pair, first, second, dict(feeds), **limits)
        return times
    return timing.time_pair(first, second, feeds, **limits)  # type: ignore[arg-type]


def profile_nodes(
    model: Path, reference: AnySession, feeds: Feeds, settings: RunSettings, folder: Path, **limits: float
) -> timing.Profile:
    """As :func:`~onnx_lowrank.runtime.timing.profile_nodes`, in the process that `reference` is in."""
    if isinstance(reference, SessionApart):
        ask = reference.host.ask
        profile: timing.Profile = ask(timing.profile_nodes, model, reference, dict(feeds), settings, folder, **limits)
        return profile
    return timing.profile_nodes(model, reference, feeds, settings, folder, **limits)  # type: ignore[arg-type]


# --- what goes from one process to the other --------------------------------------------------------------------------


class _Sender(pickle.Pickler):
    """Sends the number of a session in its place."""

    def __init__(self, stream: IO[bytes], host: Host) -> None:
        super().__init__(stream)
        self._host = host

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, SessionApart):
            return None
        if value.host is not self._host:
            raise ValueError("sessions of two processes cannot be used together")
        return value.number


class _Receiver(pickle.Unpickler):
    """Makes of a session's number and placement what stands for it."""

    def __init__(self, stream: IO[bytes], host: Host) -> None:
        super().__init__(stream)
        self._host = host

    def persistent_load(self, kept: Any) -> SessionApart:
        return SessionApart(self._host, *kept)


class _Kept(dict[int, Session]):
    """Sessions of the process, by the numbers that stand for them."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()

    def receive(self, stream: IO[bytes]) -> Any:
        """What was sent, with the sessions that it speaks of."""
        receiver = pickle.Unpickler(stream)
        receiver.persistent_load = self.__getitem__  # type: ignore[method-assign]
        return receiver.load()

    def send(self, stream: IO[bytes], value: object) -> None:
        """Send what stands for a session in its place."""
        sender = pickle.Pickler(stream)
        sender.persistent_id = self._number  # type: ignore[method-assign]
        sender.dump(value)
        stream.flush()

    def _number(self, value: object) -> object:
        if not isinstance(value, Session):
            return None
        number = next(self._numbers)
        self[number] = value
        return number, value.provider, value.outputs, value.placement


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Do what is asked until nobody can ask any more."""
    kept = _Kept()
    while True:
        try:
            forgotten, function, arguments, named = kept.receive(requests)
        except EOFError:
            return
        for number in forgotten:
            del kept[number]
        try:
            answer = False, function(*arguments, **named)
        except LowRankError as error:
            answer = True, LowRankError(str(error))
        except Exception:
            answer = True, RuntimeError(traceback.format_exc())
        kept.send(answers, answer)
        del answer, arguments


def start(said: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process that serves; what it or its libraries print goes to a file."""
    command = python(f"from {__name__} import main; main({os.getpid()})")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)


def _end(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    process.kill()
    process.wait()
    said.close()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was still to be sent
            pipe.close()  # type: ignore[union-attr]


def main(parent: int) -> None:
    """The process of a host: answers go where standard output was, and what is printed there goes to the file from now on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    end_with(parent)
    answers.write(READY)
    answers.flush()
    serve(sys.stdin.buffer, answers)
