"""`quartermap deploy`: a bundle for servers that others run, Triton and KServe, and for browsers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.cli import deploy_web
from quartermap_deploy.cli.options import add_bundle_argument, add_output_options, add_signature_option
from quartermap_deploy.cli.overrides import add_labels_option, add_preprocessing_option, preprocessing_of
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.results import print_json, results_only, show
from quartermap_deploy.cli.values import at_least_one, delay_ms, file_or_folder, whole
from quartermap_deploy.limits import LARGEST_BATCH, MOST_THREADS, MOST_WORKERS
from quartermap_deploy.tables.layout import facts, table

if TYPE_CHECKING:
    from quartermap_deploy.cli.parsing import CommandParser, Subparsers
    from quartermap_deploy.deploy.triton import Repository, TritonOptions


def add_parser(subparsers: Subparsers) -> None:
    """Add the command and its two subcommands."""
    parser = add_command(
        subparsers,
        "deploy",
        lambda options: parser.print_help(),
        summary="write a bundle for Triton, KServe or browsers",
        description="""
            Write what a server needs that others run: a model repository for NVIDIA's Triton Inference Server, or an
            InferenceService for KServe with the repository that it serves. Or a site whose visitors run the model in
            their own browsers. Nothing is sent anywhere, and none of these has to be installed. On one machine,
            `quartermap serve` needs none.
            """,
        examples="""
            quartermap deploy triton bundles/digits_k3 -o repository
            quartermap deploy kserve bundles/digits_k3 -o digits.yaml --storage-uri s3://models/digits
            quartermap deploy web bundles/digits_k3 -o site
            """,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="deploy_command")
    _add_triton(commands)
    _add_kserve(commands)
    deploy_web.add_parser(commands)


def _add_triton(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "triton",
        run_triton,
        summary="write a model repository for Triton",
        description="""
            Write a model repository for NVIDIA's Triton Inference Server, and print the line that starts Triton with
            it. It holds the model with all of its inputs and outputs, with dynamic batching where they have one batch,
            and with warm-up requests from the bundle's golden inputs; and, where its one input takes images, models
            that take JPEG or PNG files and give probabilities, or what the model gives.
            """,
        examples="""
            quartermap deploy triton bundles/digits_k3 -o repository
            quartermap deploy triton bundles/tiny_k3 -o repository --plugin libquartermap_plugin.so
            quartermap deploy triton bundles/tiny_a100 -o repository --engines-from bundles/tiny_l4 --mount /models
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "-o", "--out", type=file_or_folder, required=True, metavar="REPO", help="folder of the repository"
    )
    _add_model_options(parser)
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="leave out the models that take images, which need Pillow where Triton runs (default: write them)",
    )
    parser.add_argument(
        "--threads",
        type=whole(0, MOST_THREADS),
        default=0,
        metavar="N",
        help="threads of each instance on a CPU; 0 for all cores (default: 0)",
    )
    parser.add_argument(
        "--mount",
        metavar="PATH",
        help="where the repository will lie on the machine that serves it, as in a container (default: where it is "
        "written)",
    )
    parser.add_argument(
        "--triton-version",
        metavar="YY.MM",
        help="release of Triton that will serve it, so that one that is too old for the model is refused (default: the "
        "notes say which one it needs)",
    )
    add_output_options(parser)


def _add_kserve(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "kserve",
        run_kserve,
        summary="write an InferenceService for KServe",
        description="""
            Write an InferenceService with autoscaling for KServe, and the model repository that it serves, which you
            copy to the service's storage. The predictor is Triton, by KServe's runtime kserve-tritonserver. Models that
            take images are there only if you name a container image that has Pillow.
            """,
        examples="""
            quartermap deploy kserve bundles/digits_k3 -o digits.yaml --storage-uri s3://models/digits
            quartermap deploy kserve bundles/tiny_k3 -o tiny.yaml --min-replicas 0 --scale-metric concurrency
            quartermap deploy kserve bundles/tiny_k3 -o tiny.yaml --backend tensorrt --runtime-version 25.12-py3
            """,
    )
    add_bundle_argument(parser)
    parser.add_argument(
        "-o", "--out", type=file_or_folder, required=True, metavar="FILE.yaml", help="the InferenceService"
    )
    parser.add_argument(
        "--repository",
        type=file_or_folder,
        metavar="REPO",
        help="folder of the model repository (default: FILE-repository beside FILE.yaml)",
    )
    _add_model_options(parser)
    service = parser.add_argument_group("service")
    service.add_argument(
        "--service-name", metavar="NAME", help="name of the service (default: the model's, with - for _)"
    )
    service.add_argument(
        "--storage-uri",
        metavar="URI",
        help="where you will store the repository, such as s3://… or pvc://… (default: pvc://models/NAME)",
    )
    service.add_argument(
        "--runtime",
        metavar="NAME",
        help="serving runtime of KServe, one that runs Triton (default: kserve-tritonserver)",
    )
    service.add_argument(
        "--runtime-version",
        metavar="TAG",
        help="tag of the runtime's image; engines need one whose TensorRT is theirs, and one whose ONNX Runtime is too "
        "old for the model is refused (default: 26.01-py3 for onnxruntime, with ONNX Runtime 1.23)",
    )
    service.add_argument(
        "--container",
        metavar="IMAGE",
        help="image of Triton with Pillow, to serve images too (default: the runtime's, without them)",
    )
    scaling = parser.add_argument_group("scaling and resources")
    scaling.add_argument(
        "--min-replicas",
        type=whole(0),
        default=1,
        metavar="N",
        help="fewest replicas (default: 1)",
    )
    scaling.add_argument(
        "--max-replicas", type=at_least_one, default=3, metavar="N", help="most replicas (default: 3)"
    )
    scaling.add_argument(
        "--scale-metric",
        metavar="NAME",
        help="concurrency or rps, which need Knative, or cpu (default: cpu on CPUs, concurrency on GPUs)",
    )
    scaling.add_argument(
        "--scale-target",
        type=at_least_one,
        metavar="N",
        help="of each replica: requests at once, requests each second, or percent of its CPUs (default: the largest "
        "batch, or 80 %%)",
    )
    scaling.add_argument(
        "--cpus", type=whole(1, MOST_THREADS), default=2, metavar="N", help="of a replica (default: 2)"
    )
    scaling.add_argument("--memory", default="4Gi", metavar="AMOUNT", help="of a replica (default: 4Gi)")
    scaling.add_argument(
        "--gpus",
        type=whole(1, MOST_WORKERS),
        metavar="N",
        help="of a replica (default: 1 where the model runs on GPUs)",
    )
    add_output_options(parser)


def _add_model_options(parser: CommandParser) -> None:
    """Add what both say about how the model is served."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--backend",
        metavar="NAME",
        help="onnxruntime or tensorrt (default: tensorrt if the bundle has an engine for it)",
    )
    model.add_argument(
        "--device", metavar="NAME", help="cpu or cuda, for onnxruntime (default: cpu); engines run on GPUs"
    )
    model.add_argument("--name", metavar="NAME", help="name of the model (default: the bundle's name for it)")
    model.add_argument(
        "--model-version", type=at_least_one, default=1, metavar="N", help="version of the model (default: 1)"
    )
    add_labels_option(model)
    add_preprocessing_option(model)
    model.add_argument(
        "--max-batch",
        type=whole(1, LARGEST_BATCH),
        metavar="N",
        help="largest batch (default: what the engine takes; without one 8 on a CPU, 32 on a GPU)",
    )
    model.add_argument(
        "--max-delay-ms",
        type=delay_ms,
        default=1.0,
        metavar="MS",
        help="how long a request may wait for others to be batched with, in milliseconds (default: 1)",
    )
    model.add_argument(
        "--instances",
        type=whole(1, MOST_WORKERS),
        default=1,
        metavar="N",
        help="instances of the model, on the CPU or on each GPU (default: 1)",
    )
    model.add_argument(
        "--image-workers",
        type=whole(1, MOST_WORKERS),
        default=2,
        metavar="N",
        help="how many images are decoded at the same time (default: 2)",
    )
    model.add_argument(
        "--plugin",
        type=file_or_folder,
        metavar="FILE",
        help="plugin library of the engines (default: the environment variable QUARTERMAP_PLUGIN, or your own store, "
        "which `quartermap plugin build` fills)",
    )
    add_signature_option(model, "the bundle, and each of --engines-from,")
    model.add_argument(
        "--engines-from",
        type=file_or_folder,
        action="append",
        default=[],
        metavar="BUNDLE",
        help="one more bundle of the same model, with an engine for other GPUs; may be given several times",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace what is there, if it was written by this command"
    )


def _triton_options(options: argparse.Namespace, **more: Any) -> TritonOptions:
    from quartermap_deploy.deploy.triton import TritonOptions

    return TritonOptions(
        backend=options.backend,
        name=options.name,
        version=options.model_version,
        labels=options.labels,
        preprocessing=preprocessing_of(options),
        max_batch=options.max_batch,
        max_delay_us=round(options.max_delay_ms * 1000),
        device=options.device,
        instances=options.instances,
        image_workers=options.image_workers,
        plugin=options.plugin,
        engines_from=tuple(options.engines_from),
        signed_by=tuple(options.signed_by),
        **more,
    )


def run_triton(options: argparse.Namespace) -> None:
    """Write a model repository, then print what was written and the line that starts Triton.

    Raises:
        QuartermapError: if the bundle cannot be served so.
    """
    from quartermap_deploy.deploy.triton import deploy_triton

    chosen = _triton_options(
        options,
        threads=options.threads,
        images=not options.no_images,
        mounted_at=options.mount,
        release=options.triton_version,
    )
    with results_only():
        made = deploy_triton(
            options.bundle, options.out, chosen, force=options.force, progress=make_progress(options)
        )
    if options.json:
        print_json(made.to_dict())
    elif not options.quiet:
        _show_repository(made)
        show("", "start Triton with:", f"  {made.command}")


def run_kserve(options: argparse.Namespace) -> None:
    """Write an InferenceService and its repository, then print what was written and what is left to do.

    Raises:
        QuartermapError: if the bundle cannot be served so.
    """
    from quartermap_deploy.deploy.kserve import RUNTIME, KServeOptions, deploy_kserve

    chosen = KServeOptions(
        name=options.service_name,
        storage_uri=options.storage_uri,
        runtime=RUNTIME if options.runtime is None else options.runtime,
        runtime_version=options.runtime_version,
        container=options.container,
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        scale_metric=options.scale_metric,
        scale_target=options.scale_target,
        cpus=options.cpus,
        memory=options.memory,
        gpus=options.gpus,
    )
    with results_only():
        made = deploy_kserve(
            options.bundle,
            options.out,
            chosen,
            _triton_options(options),
            repository_folder=options.repository,
            force=options.force,
            progress=make_progress(options),
        )
    if options.json:
        print_json(made.to_dict())
    elif not options.quiet:
        _show_repository(made.repository)
        service = {
            "service": made.name,
            "file": made.path,
            "storage": made.storage_uri,
            "scaling": made.scaling,
        }
        show("", facts("InferenceService", service), "", "left to do:", *(f"  {step}" for step in made.steps))


def _show_repository(made: Repository) -> None:
    """Show a table of the models, and what is in the repository."""
    batch = f"up to {made.max_batch}" if made.max_batch else "one request at a time"
    size = sum((Path(made.path) / name).stat().st_size for name in made.files)
    summary: dict[str, object] = {
        "backend": f"{made.backend}, on the {'CPU' if made.device == 'cpu' else 'GPU'}",
        "batches": batch,
        "size": f"{size / 1e6:.1f} MB in {len(made.files)} files",
        "where": made.path,
    }
    for index, note in enumerate(made.notes):
        summary["" if index else "note"] = note
    show(
        facts("model repository", summary),
        "",
        table(None, ["model", "what it is"], list(made.models.items())),
    )
