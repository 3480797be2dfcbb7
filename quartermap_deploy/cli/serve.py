"""`quartermap serve`: serve a bundle over HTTP and gRPC."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli.execution import add_execution_options, execution_of
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.options import (
    add_bundle_argument,
    add_like_option,
    add_signature_option,
    add_verbose_option,
    open_bundle,
)
from quartermap_deploy.cli.overrides import add_labels_option, add_preprocessing_option, preprocessing_of
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.results import print_json, show
from quartermap_deploy.cli.values import at_least_one, delay_ms, tolerance, whole
from quartermap_deploy.limits import LARGEST_BATCH, MOST_WORKERS
from quartermap_deploy.tables.layout import facts

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import Subparsers
    from quartermap_deploy.errors import ServeError
    from quartermap_deploy.serving.logs import EventLog

USER_ERROR = 2
"""Exit code of the program where there is something for the user to put right."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "serve",
        run,
        summary="serve a bundle over HTTP and gRPC",
        description="""
            Serve a bundle by the Open Inference Protocol (KServe v2) over HTTP and gRPC, so that Triton's clients can
            ask it: the model itself under its name, with all of its inputs and outputs, and, where one input takes
            images and the bundle says how, NAME_image, which takes JPEG and PNG files. POST /classify takes a file and
            gives classes; POST /picture gives a mask or an image, as the model does. / shows a page, /metrics is for
            Prometheus. Preprocessing and class names are the bundle's; --preprocessing and --labels replace them.

            The server is ready once its sessions have reproduced the bundle's golden outputs, and ends with exit code 2
            if they do not. SIGTERM and Ctrl-C stop it: readiness goes first, what was accepted is answered, and it ends
            with exit code 0. A second signal does not wait.

            With --like, a file is served that another tool made of that bundle's model.onnx. It has to reproduce the
            golden outputs, too; --tolerance says how far it may depart from them.

            The log goes to standard error, one line for each event. docs/serving.md says more.
            """,
        examples="""
            quartermap serve bundles/vmamba_digits_k3
            quartermap serve bundles/vmamba_digits_k3 --max-batch 16 --max-delay-ms 2 --workers 2
            quartermap serve bundles/vmamba_digits_k3 --device auto
            quartermap serve bundles/unet --preprocessing mean=0.5,0.5,0.5 std=0.5,0.5,0.5
            quartermap serve digits_float16.onnx --like bundles/vmamba_digits_k3 --tolerance 5e-3
            curl -F file=@digit.png localhost:8000/classify
            """,
    )
    add_bundle_argument(parser)
    add_like_option(parser)
    parser.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="SHARE",
        help="with --like, how far it may depart from the golden outputs, as a share of the largest (default: as far "
        "as the bundle itself: 1e-4, or 5e-3 in float16)",
    )
    parser.add_argument(
        "--target", metavar="NAME", help="target to run (default: onnxruntime, or the bundle's only one)"
    )
    add_execution_options(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="what clients call the model (default: the bundle's name for it)"
    )
    add_labels_option(parser)
    add_signature_option(parser)
    add_preprocessing_option(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at; 0.0.0.0 is every one of this machine (default: %(default)s, this machine alone)",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        dest="allow_hosts",
        help="name that clients may ask for, and whose pages may ask; can be repeated; * allows all, for use behind a "
        "proxy (default: addresses, localhost and what --host says)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help="port for HTTP; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--grpc-port",
        type=_port,
        default=8001,
        metavar="N",
        help="port for gRPC; 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, MOST_WORKERS),
        metavar="N",
        help="batches that run side by side, each with its share of the cores (default: with ONNX Runtime one for each "
        "core under load, while a batch that comes alone gets all cores if that is faster; with engines, or providers "
        "other than CPU, 1)",
    )
    parser.add_argument(
        "--max-batch",
        type=whole(1, LARGEST_BATCH),
        metavar="N",
        help="most images that are run at once (default: what the engine takes; without one 8)",
    )
    parser.add_argument(
        "--max-delay-ms",
        type=delay_ms,
        default=1.0,
        metavar="MS",
        help="how long an image may wait for others while a worker is free (default: %(default)g)",
    )
    parser.add_argument(
        "--queue",
        type=at_least_one,
        default=256,
        metavar="N",
        help="most images that may wait; more are refused with 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mb",
        type=at_least_one,
        default=64,
        metavar="N",
        help="largest request, in MiB (default: %(default)s)",
    )
    parser.add_argument(
        "--receive-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds that the body of a request may take to come (default: %(default)g)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds that accepted requests have to be answered in after SIGTERM (default: %(default)g)",
    )
    parser.add_argument(
        "--log",
        choices=("auto", "json", "text"),
        default="auto",
        help="form of the log; auto is text in a terminal and JSON elsewhere (default: %(default)s)",
    )
    add_verbose_option(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="once ready, print the addresses as JSON instead of a table (default: a table)",
    )
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="print no table; the log remains (default: print it)",
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal comes.

    Raises:
        QuartermapError: if the bundle cannot be served, or did not stop in time.
    """
    from quartermap_deploy.serving.logs import EventLog

    log = EventLog(options.log)
    try:
        with _ending_early(log):
            _serve(options, log)
    finally:
        log.close()


def _serve(options: argparse.Namespace, log: EventLog) -> None:
    from quartermap_deploy.serving.options import MIB, ServeOptions
    from quartermap_deploy.serving.server import check_dependencies, serve

    check_dependencies()
    settings = ServeOptions(
        target=options.target,
        tolerance=options.tolerance,
        execution=execution_of(options),
        name=options.name,
        labels=options.labels,
        preprocessing=preprocessing_of(options),
        host=options.host,
        allow_hosts=tuple(options.allow_hosts),
        port=options.port,
        grpc_port=options.grpc_port,
        workers=options.workers,
        max_batch=options.max_batch,
        max_delay=options.max_delay_ms / 1000,
        queue=options.queue,
        max_body=options.max_body_mb * MIB,
        receive_timeout=options.receive_timeout,
        shutdown_timeout=options.shutdown_timeout,
    )

    def started(addresses: dict[str, Any]) -> None:
        try:
            if options.json:
                print_json(addresses)
            elif not options.quiet:
                show(facts(None, {**addresses, "models": ", ".join(addresses["models"])}))
            # Whoever waits for it reads a pipe.
            sys.stdout.flush()
        except OSError:
            # Nobody reads it, as with `| true`; the log tells the addresses, too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def leave(error: ServeError | None) -> None:
        log.close()
        if error is not None:
            message("error", str(error))
        os._exit(0 if error is None else USER_ERROR)

    serve(open_bundle(options.bundle, options.like, options.signed_by), settings, log, started, leave)


@contextlib.contextmanager
def _ending_early(log: EventLog) -> Iterator[None]:
    """While open, SIGTERM and SIGINT end the process well, until the server takes them over."""

    def leave(number: int, frame: FrameType | None) -> None:
        log.info("stopping", open_requests=0)
        log.info("stopped", requests=0, answered=0, still_open=0)
        log.close()
        os._exit(0)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; expected 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, up to 86400")
    return value
