"""How a command answers Ctrl-C and a request to end, whatever library runs at that moment.

Python raises what a signal's handler raises wherever the main thread happens to be. Three things go wrong then:

- An import that is given up halfway leaves an extension module behind that is half there, and the process ends in a
  segmentation fault later. So nothing is raised while something is imported; the signal is asked for again behind it.
- A library catches everything and goes on, as with a bare `except:`. So the exception is watched: if it is gone and
  nobody here has seen it, the signal is asked for again, and no other answer than the interruption is believed.
- A library stays in native code, and no handler runs. So a thread waits beside, which Python tells of signals at once;
  after `GRACE` seconds, or at a second signal, it removes unfinished folders and ends the process.

Only the standard library is imported, as what comes before this is answered with a traceback.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import weakref
from _thread import interrupt_main

# Not from typing, see quartermap_deploy/__init__.py.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

__all__ = ["INTERRUPTED", "Interruptible", "Interruption"]

INTERRUPTED = 128 + signal.SIGINT
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that ask a command to end; Windows has no SIGHUP."""
GRACE = 10.0
"""Seconds that a command has for putting things in order."""
IMPATIENCE = 1.0
"""Seconds after which another signal is one more wish; what sends one may send it twice, to the group as well."""
AGAIN = 0.05
"""Seconds until a signal is asked for again."""
NOT_WITHIN = (
    "<frozen importlib._bootstrap>",
    "<frozen importlib._bootstrap_external>",
    "tempfile.py",
    "shutil.py",
)
"""Files of code that is not interrupted: imports, and what makes or removes a folder in more than one step."""


class Interruption(KeyboardInterrupt):
    """A signal that asks the command to end; libraries know it as Ctrl-C."""


class Interruptible:
    """While open, signals interrupt the command, as the docstring of this file says; a context manager.

    Attributes:
        number: of the signal that came; None while none did.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._raised: weakref.ref[Interruption] | None = None
        self._again = False
        self._closed = False
        self._asked = 0
        self._handlers: dict[int, Any] = {}
        self._frame: FrameType | None = None

    def __enter__(self) -> Interruptible:
        # Python runs handlers in the main thread alone, and lets no other one set them.
        if threading.current_thread() is not threading.main_thread():
            return self
        self._frame = sys._getframe(1)
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            # What is ignored, as by `nohup` or in a shell's background, stays so.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._handlers[number] = signal.signal(number, self._received)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._frame is None:
            return
        # What comes from here on comes too late. Only then do the others' handlers return, who asked for nothing.
        self._closed = True
        signal.set_wakeup_fd(self._wakeup)
        self._outbox.close()
        self._thread.join()
        self._inbox.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        self._frame = None

    @property
    def code(self) -> int:
        """The exit code of a command that was interrupted."""
        return INTERRUPTED if self.number is None else 128 + self.number

    @property
    def text(self) -> str:
        """What is said of it."""
        return _line(self.number)

    def _received(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal in the main thread."""
        if self._closed:
            return
        if self.number is None:
            self.number = number
        if self._raised is not None and self._raised() is not None:
            # It is on its way, and what it ends is put in order.
            return
        if self._is_within(frame):
            self._again = True
            return
        raised = Interruption()
        self._raised = weakref.ref(raised, self._lost)
        try:
            raise raised
        finally:
            # Its traceback has this frame; with it here, it would live until Python looks for such circles.
            del raised

    def _is_within(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._frame:
            if os.path.basename(frame.f_code.co_filename) in NOT_WITHIN:
                return True
            frame = frame.f_back
        return False

    def _lost(self, reference: object) -> None:
        self._again = True

    def _unraisable(self, problem: Any) -> None:
        """Keep quiet about an interruption that Python had to drop, as in a `__del__`: it comes again."""
        if not isinstance(problem.exc_value, Interruption):
            self._hook(problem)

    def _watch(self) -> None:
        """Wait for signals beside the main thread, which may be in native code."""
        first: float | None = None
        while True:
            ready, _, _ = select.select([self._inbox], [], [], None if first is None else AGAIN)
            numbers = self._inbox.recv(64) if ready else b""
            if ready and not numbers:
                return
            now = time.monotonic()
            for number in filter(self._counts, numbers):
                if first is None:
                    first = now
                elif now - first > IMPATIENCE:
                    _leave(number)
            if first is not None and now - first > GRACE:
                _leave(self.number or signal.SIGTERM)
            if self._again:
                self._again = False
                self._asked += 1
                interrupt_main(signal.Signals(self.number or signal.SIGINT))

    def _counts(self, number: int) -> bool:
        """Whether a signal is somebody's, and ours to answer; `interrupt_main` tells of its own like of any other."""
        if self._asked:
            self._asked -= 1
            return False
        return number in self._handlers and signal.getsignal(number) == self._received


def _line(number: int | None) -> str:
    return f"quartermap: error: {'interrupted' if number in (None, signal.SIGINT) else 'terminated'}"


def _leave(number: int) -> None:
    """End the process without the main thread, which does not come back."""
    # Without it there are none.
    drafts = sys.modules.get("quartermap_deploy.drafts")
    with contextlib.suppress(Exception):
        if drafts is not None:
            drafts.remove_drafts()
    with contextlib.suppress(OSError):
        # Not by Python's stream, which the main thread may hold.
        os.write(2, f"{_line(number)}\n".encode())
    os._exit(128 + number)
