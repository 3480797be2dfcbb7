"""`quartermap compile`: a model or a recipe goes in, a verified bundle comes out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from itertools import chain, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartermap_deploy.architectures.cards import load_card
from quartermap_deploy.cli.execution import add_execution_options, given_execution, tell_report
from quartermap_deploy.cli.messages import message
from quartermap_deploy.cli.module_options import (
    add_module_options,
    module_options_of,
    user_module,
)
from quartermap_deploy.cli.options import add_output_options, add_plugin_option, add_run_module_option
from quartermap_deploy.cli.overrides import add_labels_option, add_preprocessing_option, read_preprocessing
from quartermap_deploy.cli.parsing import add_command
from quartermap_deploy.cli.progress_display import make_progress
from quartermap_deploy.cli.rebuild import engine_facts, engine_warnings, engines_of
from quartermap_deploy.cli.results import bundle_json, print_json, results_only, show, signatures_dropped
from quartermap_deploy.cli.values import (
    at_least_one,
    file_or_folder,
    integer,
    numbers,
    numbers_or_none,
    words,
)
from quartermap_deploy.data.labels import label_sets
from quartermap_deploy.errors import PlanError, RecipeError
from quartermap_deploy.exporting.export import IO_TYPES, PRECISIONS
from quartermap_deploy.lowering.operator import OPSETS
from quartermap_deploy.pruning.plan import UPSAMPLE_MODES, QuarterMap
from quartermap_deploy.recipe import Recipe
from quartermap_deploy.tables.bundle import bundle_facts
from quartermap_deploy.tables.layout import facts
from quartermap_deploy.targets.tensorrt.options import SCANS, EngineOptions, Profile

if TYPE_CHECKING:
    from quartermap_deploy.bundle import Bundle
    from quartermap_deploy.cli.parsing import Subparsers

BUNDLES = Path("bundles")

SHARED = ("checkpoint", "targets", "execution", "images", "reference")
"""Fields of a recipe that an option may replace: where things lie on this machine, and what is built and checked."""

PLAN = ("every", "blocks", "exclude_stages", "stride", "keep", "upsample")
"""Options that are fields of a `QuarterMap`."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "compile",
        run,
        summary="compile a model, pruned or not, into a verified bundle",
        description="""
            Compile a model into a bundle: one portable ONNX file, the proof that it computes what the PyTorch model
            computes (at every block, on real images and on edge cases), and a manifest. Nothing is written unless the
            proof holds.

            What to compile is the name of a model (see `quartermap models`) with the options below; a module of your
            own, as package.module:factory or path/to/model.py:Net, with the shapes of its inputs (--example); or a
            recipe file, which holds the same settings. Public code that needs mamba-ssm or CUDA is taken as it is:
            neither has to be installed. Without --every or --blocks nothing is pruned.
            """,
        examples="""
            # the demo model, with every third block outside the first stage pruned
            quartermap compile vmamba_digits --every 3 --out bundles/digits_k3

            # a public checkpoint, unpruned, into bundles/vmamba_base_s2l15
            quartermap compile vmamba_base_s2l15 --checkpoint vssm_base_0229_ckpt_epoch_237.pth

            # chosen blocks, for images of 384x512
            quartermap compile vmamba_tiny_s1l8 --checkpoint F --blocks 3,6,9 --size 384 512

            # your own module: its class, its weights, the shape of its input
            quartermap compile my_package.models:VSSM --weights best.pth --example 1x3x224x224 --arg depths=[2,2,9,2]

            # two inputs by name, and how images become the first
            quartermap compile change.py:Net --example pre=1x3x256x256 --example post=1x3x256x256

            # an input of whole numbers
            quartermap compile tokens.py:Net --example ids=1x16:int64

            # proved by CUDA, too, in the form that its scans have there
            quartermap compile vmamba_digits --every 3 --device cuda

            # a recipe, replacing the bundle that it made before
            quartermap compile export/vmamba_digits_k3.toml --force
            """,
    )
    parser.add_argument(
        "source",
        metavar="MODEL|MODULE:FACTORY|RECIPE.toml",
        help="name of a model, what makes a module of your own, or a recipe file",
    )
    _add_model_options(parser)
    add_module_options(parser)
    add_run_module_option(parser)
    _add_plan_options(parser)
    _add_graph_options(parser)
    _add_engine_options(parser)
    group = parser.add_argument_group("the bundle")
    group.add_argument(
        "-o",
        "--out",
        type=file_or_folder,
        metavar="DIR",
        help=f"folder to write (default: {BUNDLES}/<recipe>, or {BUNDLES}/<model> with _k<every> or _blocks)",
    )
    group.add_argument(
        "--force", action="store_true", help="replace the bundle that --out holds (default: refuse)"
    )
    group.add_argument(
        "--target",
        dest="targets",
        type=words,
        metavar="NAMES",
        default=argparse.SUPPRESS,
        help=f"what to build for, with commas between (default: {','.join(Recipe.targets)}, or the recipe's)",
    )
    # As recipes call it.
    group.add_argument("--targets", type=words, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add_execution_options(group, argparse.SUPPRESS)
    group.add_argument(
        "--reference",
        type=file_or_folder,
        metavar="FILE.npz",
        default=argparse.SUPPRESS,
        help="inputs and outputs of a module of your own, by name, saved where it runs in its own environment "
        "(default: PyTorch on this machine alone)",
    )
    group.add_argument(
        "--images",
        type=file_or_folder,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder of images to prove parity with (default: the recipe's, or images that come with the package)",
    )
    add_output_options(parser)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model (with a recipe, --checkpoint alone)")
    group.add_argument(
        "--checkpoint",
        "--weights",
        type=file_or_folder,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="its weights, .pth or .safetensors (default: those that come with the package, or else new ones)",
    )
    group.add_argument(
        "--num-classes",
        type=at_least_one,
        metavar="N",
        default=argparse.SUPPRESS,
        help="size of the output (default: the checkpoint's, or else the card's)",
    )
    group.add_argument(
        "--in-chans",
        type=at_least_one,
        metavar="N",
        default=argparse.SUPPRESS,
        help="channels of the input (default: the checkpoint's, or else the card's)",
    )
    group.add_argument(
        "--features-only",
        action="store_true",
        default=argparse.SUPPRESS,
        help="compile the backbone, whose outputs are the maps of its stages (default: the classifier)",
    )
    add_labels_option(group, "the card's", argparse.SUPPRESS)
    add_preprocessing_option(
        group, "as the card says; a module of your own takes arrays alone", argparse.SUPPRESS
    )
    group.add_argument(
        "--seed",
        type=integer,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"seed of new weights, where there is no checkpoint (default: {Recipe.seed})",
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("QuarterMap (not with a recipe)")
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument(
        "--every",
        type=integer,
        metavar="K",
        default=argparse.SUPPRESS,
        help="prune every K-th block, counted from 1 over the whole network (default: prune nothing)",
    )
    chosen.add_argument(
        "--blocks",
        type=numbers,
        metavar="3,6,9",
        default=argparse.SUPPRESS,
        help="prune these blocks, whatever their stage (default: prune nothing)",
    )
    group.add_argument(
        "--exclude-stages",
        type=numbers_or_none,
        metavar="1,2",
        default=argparse.SUPPRESS,
        help="stages in which --every prunes nothing, or none for no such stage "
        f"(default: {','.join(map(str, QuarterMap.exclude_stages))})",
    )
    group.add_argument(
        "--stride",
        type=integer,
        metavar="S",
        default=argparse.SUPPRESS,
        help=f"rows and columns are kept out of every S (default: {QuarterMap.stride})",
    )
    group.add_argument(
        "--keep",
        type=integer,
        metavar="N",
        default=argparse.SUPPRESS,
        help=f"of every S rows and columns, keep the first N (default: {QuarterMap.keep})",
    )
    group.add_argument(
        "--upsample",
        choices=UPSAMPLE_MODES,
        default=argparse.SUPPRESS,
        help=f"how the full map is restored (default: {QuarterMap.upsample})",
    )


def _add_graph_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the graph (not with a recipe)")
    group.add_argument(
        "--size",
        dest="input_size",
        type=at_least_one,
        nargs=2,
        metavar=("H", "W"),
        default=argparse.SUPPRESS,
        help="height and width of the input, in pixels (default: the card's)",
    )
    group.add_argument(
        "--dynamic-size",
        action="store_true",
        default=argparse.SUPPRESS,
        help="leave height and width open; --size is then the size that is validated (default: fixed)",
    )
    group.add_argument(
        "--static-batch",
        dest="dynamic_batch",
        action="store_false",
        default=argparse.SUPPRESS,
        help="fix the batch size at 1 (default: open)",
    )
    group.add_argument(
        "--no-optimize",
        dest="optimize",
        action="store_false",
        default=argparse.SUPPRESS,
        help="keep the paper's canonical form of pruned blocks, Slice and Resize around the scan (default: run the "
        "passes that make them cheaper at the same output)",
    )
    group.add_argument(
        "--inline",
        action="store_true",
        default=argparse.SUPPRESS,
        help="write the scans out in standard operators, without functions and a domain of ours, for tools that know "
        "neither, such as OpenVINO; the native operator is then not used (default: one operator for each scan)",
    )
    group.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        metavar=f"{OPSETS[0]}-{OPSETS[-1]}",
        default=argparse.SUPPRESS,
        help="of ONNX's standard operators (default: 20, and 22 in bfloat16)",
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=argparse.SUPPRESS,
        help=f"element type of weights and activations (default: {Recipe.precision})",
    )
    group.add_argument(
        "--float32-blocks",
        dest="blocks_float32",
        type=numbers,
        metavar="2,5",
        default=argparse.SUPPRESS,
        help="in 16 bits, blocks that stay float32; `quartermap validate --localise` tells which must (default: none)",
    )
    group.add_argument(
        "--float32-names",
        dest="keep_float32",
        type=words,
        metavar="NAMES",
        default=argparse.SUPPRESS,
        help="in 16 bits, operators and values of the graph that stay float32 (default: those that come near the limit "
        "of float16 on the validation images)",
    )
    group.add_argument(
        "--io",
        choices=IO_TYPES,
        default=argparse.SUPPRESS,
        help=f"in 16 bits, the type of input and output: float32, or the same (default: {Recipe.io})",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "engines, for the targets tensorrt and tensorrt-rtx (with a recipe, --plugin alone)"
    )
    profile = EngineOptions().profiles[0].batch
    group.add_argument(
        "--batch",
        dest="engine_batch",
        type=numbers,
        metavar="MIN,OPT,MAX",
        default=argparse.SUPPRESS,
        help="batch sizes of an engine: smallest, tuned for, largest; give it again for another profile "
        f"(default: {','.join(map(str, profile))})",
        action="append",
    )
    group.add_argument(
        "--compute-capabilities",
        dest="engine_compute_capabilities",
        type=words,
        metavar="8.6,8.9",
        default=argparse.SUPPRESS,
        help=f"GPUs of a tensorrt-rtx engine (default: {','.join(EngineOptions().compute_capabilities)})",
    )
    group.add_argument(
        "--optimization-level",
        dest="engine_optimization_level",
        type=integer,
        choices=range(6),
        metavar="0-5",
        default=argparse.SUPPRESS,
        help="how long the builder searches (default: the builder's own)",
    )
    group.add_argument(
        "--scan",
        dest="engine_scan",
        type=scan_form,
        metavar="{auto,plugin,tree}",
        default=argparse.SUPPRESS,
        help="what scans become in a tensorrt-rtx engine: our plugin, which TensorRT for RTX takes from 1.7 on, or "
        "standard operators, the tree; for tensorrt it is the plugin in any case (default: auto, which is the tree "
        "until a GPU has run such an engine)",
    )
    add_plugin_option(group, "engine_plugin", argparse.SUPPRESS)


def scan_form(text: str) -> str:
    """Read what scans become in an engine.

    Raises:
        ArgumentTypeError: if it is none of them.
    """
    if text in SCANS:
        return text
    module = "; a scan of a module of your own is named with --scan-function" if "=" in text else ""
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SCANS)}{module}")


FLAGS = {
    "input_size": "--size",
    "module": "an option of a module of your own",
    "dynamic_batch": "--static-batch",
    "optimize": "--no-optimize",
    "blocks_float32": "--float32-blocks",
    "keep_float32": "--float32-names",
    "engine": "an option of engines",
}
"""Options that are not named after the field of the recipe that they set."""


def run(options: argparse.Namespace) -> None:
    """Compile and print a summary."""
    from quartermap_deploy.compiler import compile

    recipe, out = recipe_and_folder(options)
    with signatures_dropped(out), results_only():
        bundle = compile(recipe, out, force=options.force, progress=make_progress(options))
    # After the work: an error then is the only message, and a warning stands where it is seen.
    engines = engines_of(bundle)
    tell_report(bundle.report)
    for warning in (*warnings(bundle), *chain(*starmap(engine_warnings, engines.items()))):
        message("warning", warning)
    if options.json:
        print_json(bundle_json(bundle))
    elif not options.quiet:
        show(facts(f"compiled {bundle.manifest['model']['name']}", bundle_facts(bundle)))
        for name, entry in engines.items():
            show("", facts(name, engine_facts(entry)))


def recipe_and_folder(options: argparse.Namespace) -> tuple[Recipe, Path]:
    """Return what the options ask for, and where to.

    Raises:
        RecipeError: if the recipe file is wrong, or an option would change what it decides.
        PlanError: if options of a plan are given but no plan, or do not go together.
        UnknownNameError: if there is no such model.
    """
    source: str = options.source
    given = vars(options)
    # A recipe decides how engines are built, but never which library is loaded for that.
    plugin = given.pop("engine_plugin", None) if source.endswith(".toml") else None
    if (execution := given_execution(options)) is not None:
        given["execution"] = execution
    engine = engine_options(given)
    if engine is not None:
        given["engine"] = engine
    if "preprocessing" in given:
        given["preprocessing"] = read_preprocessing(given["preprocessing"])
    if isinstance(given.get("labels"), str) and given["labels"] not in label_sets():
        given["labels"] = Path(given["labels"])
    is_module = ":" in source and not source.endswith(".toml")
    if source.endswith(".py"):
        raise RecipeError(f"{source} names no factory; expected {source}:NAME, such as {source}:Net")
    if is_module or module_options_of(given):
        if not is_module:
            raise RecipeError(
                f"{module_options_of(given)[0]} is for a module of your own, and {source} is none; name what makes it, "
                "as package.module:factory or path/to/model.py:Net"
            )
        given["module"] = user_module(source, given)
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"model", "quartermap"}
    set_fields = {name: given[name] for name in fields if name in given}
    for name in ("input_size", "blocks_float32", "keep_float32"):
        if name in set_fields:
            set_fields[name] = tuple(set_fields[name])
    if source.endswith(".toml"):
        decided = [name for name in (*sorted(fields), *PLAN) if name in given and name not in SHARED]
        if decided:
            raise RecipeError(
                f"the recipe {source} decides what {_flags(decided)} would set; change the file, or leave the "
                "option out"
            )
        recipe = dataclasses.replace(Recipe.load(Path(source), run_module=options.run_module), **set_fields)
        if plugin is not None:
            recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, plugin=plugin))
        return recipe, options.out or BUNDLES / Path(source).stem
    if not is_module:
        load_card(source)
        if options.name is not None:
            raise RecipeError(f"--name is for a module of your own; {source} has its name already")
    name = source if not is_module else options.name or given["module"].name
    recipe = Recipe(model=name, quartermap=plan(given), **set_fields)
    return recipe, options.out or BUNDLES / _folder_name(recipe)


def engine_options(given: dict[str, Any]) -> EngineOptions | None:
    """Return the options of engines that were given, or None if none were.

    Raises:
        InputError: if one has a wrong value.
    """
    prefix = "engine_"
    settings = {name.removeprefix(prefix): given[name] for name in given if name.startswith(prefix)}
    if not settings:
        return None
    if "batch" in settings:
        settings["profiles"] = tuple(Profile(batch=tuple(sizes)) for sizes in settings.pop("batch"))
    if "compute_capabilities" in settings:
        settings["compute_capabilities"] = tuple(settings["compute_capabilities"])
    return EngineOptions(**settings)


def plan(given: dict[str, Any]) -> QuarterMap | None:
    """Return the plan that the options describe, or None if they ask for none.

    Raises:
        PlanError: as `recipe_and_folder` says.
    """
    settings = {name: given[name] for name in PLAN if name in given}
    if not settings:
        return None
    if "every" not in settings and "blocks" not in settings:
        raise PlanError(
            f"{_flags(settings)} would change a plan, but there is none; add --every K or --blocks"
        )
    if "blocks" in settings and "exclude_stages" in settings:
        raise PlanError("--exclude-stages belongs to --every; --blocks prunes exactly the blocks it names")
    return QuarterMap(**settings)


def warnings(bundle: Bundle) -> list[str]:
    """Return what the user should know before believing the bundle's outputs."""
    model, seed = bundle.manifest["model"], bundle.manifest["recipe"]["seed"]
    found = [f"of the weights of {model['name']}: {note}" for note in model["notes"]]
    if model["weights"] == "new":
        option = "--weights" if model["source"] == "module" else "--checkpoint"
        found.append(
            f"{model['name']} is compiled with newly initialised weights (seed {seed}): good for trying and "
            f"timing, its predictions mean nothing. Give the trained ones with {option}, or in the recipe"
        )
    elif model["head"] == "new":
        found.append(
            f"the weights of {model['name']} are for another number of classes than {model['num_classes']}, so its "
            f"last layer is newly initialised (seed {seed}) and its predictions mean nothing"
        )
    if model["source"] == "module" and bundle.report["given_reference"] is None:
        found.append(
            f"{model['name']} was compared with PyTorch on this machine, where its scans are this package's. To prove "
            "how they are read, give inputs and outputs that you saved where its own kernels run: --reference FILE.npz"
        )
    return found


def _folder_name(recipe: Recipe) -> str:
    name = recipe.model.replace(".", "_")
    if recipe.quartermap is not None:
        blocks = recipe.quartermap.blocks
        name += f"_k{recipe.quartermap.every}" if blocks is None else "_blocks"
    return name if recipe.precision == Recipe.precision else f"{name}_{recipe.precision}"


def _flags(names: Iterable[str]) -> str:
    return ", ".join(FLAGS.get(name, "--" + name.replace("_", "-")) for name in names)
