"""A signal ends a command: at every moment, whatever library runs, with one line and nothing left behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import toy_bundles
from command_line import call

from quartermap_deploy.cli.interruption import INTERRUPTED, Interruptible, Interruption

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


def heeding() -> None:
    """A shell without a terminal lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait() -> None:
    """Run Python for as long as a signal may take to come again."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.01)


def script(text: str, *arguments: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        preexec_fn=heeding,
    )


@pytest.mark.parametrize(("sent", "code", "text"), SIGNALS)
def test_a_signal_raises_and_is_told(sent: signal.Signals, code: int, text: str) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interruptible() as interruption, pytest.raises(Interruption):
            signal.raise_signal(sent)
        assert (interruption.number, interruption.code, interruption.text) == (
            sent,
            code,
            f"quartermap: error: {text}",
        )
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert {number: signal.getsignal(number) for number in before} == before


def test_nothing_came() -> None:
    with Interruptible() as interruption:
        pass
    assert (interruption.number, interruption.code) == (None, INTERRUPTED)


def test_what_is_swallowed_comes_again() -> None:
    """As polygraphy's bare `except:` around an import of torch swallowed it."""
    swallowed = 0
    with Interruptible(), pytest.raises(Interruption):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            swallowed += 1
        try:
            wait()
        except BaseException:
            swallowed += 1
        wait()
    assert swallowed == 2


def test_what_a_destructor_drops_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Raising:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with Interruptible(), pytest.raises(Interruption):
        Raising()
        wait()
    assert capsys.readouterr().err == ""


def test_an_import_is_not_given_up_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension module that is half there ends the process in a segmentation fault later."""
    (tmp_path / "slow_to_import.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.3)\nWHOLE = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Interruptible(), pytest.raises(Interruption):
        import slow_to_import  # type: ignore[import-not-found]

        assert slow_to_import.WHOLE
        wait()
    assert sys.modules.pop("slow_to_import").WHOLE


def test_what_a_library_makes_of_it_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("the compiler failed") from error

    monkeypatch.setattr("quartermap_deploy.cli.models.run", run)
    outcome = call("models")
    assert (outcome.code, outcome.out, outcome.err) == (143, "", "quartermap: error: terminated\n")


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruptible() as interruption:
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert interruption.number is None


NATIVE = """
    import hashlib, os, signal, sys, threading
    from pathlib import Path
    from quartermap_deploy.cli import interruption, main, models
    from quartermap_deploy.files import FolderKind
    from quartermap_deploy.errors import BundleError

    interruption.GRACE = float(sys.argv[2])
    interruption.IMPATIENCE = 0.2

    def run(options):
        with FolderKind("thing", "marker", BundleError).new(Path(sys.argv[1])) as draft:
            (draft / "half").write_text("")
            for delay in map(float, sys.argv[3:]):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 2)

    models.run = run
    sys.exit(main(["models"]))
"""


@pytest.mark.parametrize(
    ("grace", "sent"), [(0.5, [0.2]), (1000, [0.2, 1.5])], ids=["after a while", "at a second signal"]
)
def test_native_code_does_not_hold_it(tmp_path: Path, grace: float, sent: list[float]) -> None:
    done = script(NATIVE, tmp_path / "thing", grace, *sent)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "quartermap: error: terminated\n")
    assert list(tmp_path.iterdir()) == []


@functools.cache
def validated() -> str:
    """What the command prints that nobody stops."""
    command = [sys.executable, "-m", "quartermap_deploy", "validate", str(toy_bundles.classifier())]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("sent", "code", "text"), SIGNALS)
@pytest.mark.parametrize("behind", ["loading the model for onnxruntime", "comparing with the golden outputs"])
def test_a_real_command_ends_cleanly(sent: signal.Signals, code: int, text: str, behind: str) -> None:
    """Ctrl-C after the second of these lines ended in a segmentation fault."""
    command = [sys.executable, "-m", "quartermap_deploy", "validate", str(toy_bundles.classifier())]
    for _ in range(6):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
        )
        assert process.stderr is not None
        while behind not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.02)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
        # On a busy machine the command may be done before the signal arrives; then it is tried again.
        if process.returncode != 0:
            break
    assert process.returncode == code
    # So small a model may be compared before the signal arrives; what is printed until then is what always is.
    assert re.sub(r"\d", "0", validated()).startswith(re.sub(r"\d", "0", out))
    assert [line for line in err.splitlines() if not line.startswith("[")] == [f"quartermap: error: {text}"]
