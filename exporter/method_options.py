"""The options of `shoal plan` and `shoal export`: which belong to which method, and what they make.

Light to import: a method's own modules come with the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])

METHOD_NAMES = ("snn", "ddnn", "lcp", "nonn", "layerwise", "edgent", "single")
AUTO = "auto"
"""In place of a method: all of them, and the best is taken."""


_FIXED = "exporter.method_options.fixed"


def fixed_settings() -> dict[str, dict[str, Any]]:
    """By method, the options that the running command was given and that it reads."""
    found: dict[str, dict[str, Any]] = click.get_current_context().meta[_FIXED]
    return found


class MethodOption(click.Option):
    """An option that only some methods read.

    Attributes:
        methods: Their names.
    """

    def __init__(self, *arguments: Any, methods: tuple[str, ...], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.methods = methods


class MethodCommand(click.Command):
    """A command with a `--method`: its help goes by method, and options of others are refused."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run. Raises click.UsageError naming every option given that the method does not read."""
        method = ctx.params["method"]
        given = [
            option
            for option in self.params
            if isinstance(option, MethodOption)
            and option.name is not None
            and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        ]
        # With auto, an option holds for every method that reads it.
        ctx.meta[_FIXED] = {
            each: {
                option.name: ctx.params[option.name]
                for option in given
                if option.name
                if each in option.methods and option.name != "workers"
            }
            for each in METHOD_NAMES
        }
        wrong = [
            f"{option.opts[0]} belongs to {', '.join(option.methods)}"
            for option in given
            if method not in (AUTO, *option.methods)
        ]
        if wrong:
            raise click.UsageError(f"--method {method} does not read: {'; '.join(wrong)}", ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options that all methods read, then those of each set of methods."""
        sections: dict[tuple[str, ...], list[tuple[str, str]]] = {(): []}
        for option in self.get_params(ctx):
            if not isinstance(option, click.Option):
                continue
            record = option.get_help_record(ctx)
            if record is not None:
                methods = option.methods if isinstance(option, MethodOption) else ()
                sections.setdefault(methods, []).append(record)
        for methods, records in sections.items():
            with formatter.section(f"Options of {', '.join(methods)}" if methods else "Options"):
                formatter.write_dl(records)


def _of(methods: str, *names: str, **keywords: Any) -> Callable[[F], F]:
    """An option of these methods, their names separated by spaces."""
    return click.option(*names, cls=MethodOption, methods=tuple(methods.split()), **keywords)


_DATA_HELP = (
    "An .npz (x_train, y_train, x_val, y_val, x_test, y_test, or x and y; FILE.npz#NAME takes the "
    "index NAME that the file has of itself), a folder of images per class, or digits, mnist, "
    "fashion_mnist, cifar10, cifar100."
)


def method_inputs(default: str) -> Callable[[F], F]:
    """The arguments and options that planning and exporting share; `default`: the method."""

    def decorated(command: F) -> F:
        for option in reversed(_options(default)):
            command = option(command)
        return command

    return decorated


def _options(default: str) -> list[Callable[[F], F]]:
    fusions = click.Choice(["max", "mean", "concat"])
    return [
        click.argument(
            "model", required=False, type=click.Path(path_type=Path), metavar="[MODEL.keras]"
        ),
        click.option("--data", metavar="NPZ|FOLDER|NAME", help=_DATA_HELP),
        click.option(
            "--fleet",
            default="fleet.yaml",
            show_default=True,
            type=click.Path(path_type=Path),
            help="The fleet file.",
        ),
        click.option(
            "--method",
            default=default,
            show_default=True,
            type=click.Choice((*METHOD_NAMES, AUTO)),
            help="auto: all that suit, and the best is taken.",
        ),
        click.option(
            "--cache",
            default=".cache/shoal",
            show_default=True,
            type=click.Path(path_type=Path, file_okay=False),
            help="Where finished steps of a search are kept.",
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0)),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        _of(
            "snn",
            "--max-drop",
            default=0.5,
            show_default=True,
            type=click.FloatRange(0, 100),
            help="Accuracy that pruning may cost each piece, in points.",
        ),
        _of(
            "snn",
            "--keep",
            type=click.FloatRange(0.01, 1.0),
            help="Prune each piece down to this share of the base's parameters instead.",
        ),
        _of(
            "snn",
            "--criterion",
            default="influence",
            show_default=True,
            type=click.Choice(["influence", "energy", "capnn_w", "capnn_m", "capnn_b"]),
            help="What pruning goes by: damage to a piece's outcomes, or the paper's firing rates.",
        ),
        _of(
            "snn",
            "--quick",
            is_flag=True,
            help="Prune in larger steps: a third of the time, a little more damage.",
        ),
        _of(
            "snn",
            "--compensate",
            is_flag=True,
            help="Re-solve the next layer's weights in closed form after pruning.",
        ),
        _of(
            "snn",
            "--distill",
            default=0,
            show_default=True,
            metavar="EPOCHS",
            type=click.IntRange(0, 5),
            help="Then train each piece to agree with the base, without labels.",
        ),
        _of(
            "snn",
            "--outcomes",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "rest", "own"]),
            help="Entropy over a piece's own classes and the rest, or (as the paper) own alone.",
        ),
        _of(
            "snn",
            "--fusion",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "min_entropy", "max_confidence", "entropy_mlp", "mean"]),
            help="How the aggregator joins answers, or by mean the scores of all classes: the best "
            "on held-out data, or this.",
        ),
        _of(
            "snn",
            "--candidates",
            default=5,
            show_default=True,
            type=click.IntRange(min=1),
            help="Partitions of the classes that are pruned and evaluated for real.",
        ),
        _of(
            f"snn {AUTO}",
            "--workers",
            default=0,
            type=click.IntRange(0),
            help="Processes of the search; 0 = one a core.",
        ),
        _of("snn", "--dask", metavar="SCHEDULER", help="Spread the search over a Dask cluster."),
        _of(
            "ddnn",
            "--filters",
            "ddnn_filters",
            multiple=True,
            type=click.IntRange(1),
            help="Filters of a device's ConvP block; repeat for more blocks. Default: 4.",
        ),
        _of(
            "ddnn", "--raw", is_flag=True, help="Devices send their frames, the cloud does it all."
        ),
        _of(
            "ddnn",
            "--score-fusion",
            default="max",
            show_default=True,
            type=fusions,
            help="How devices' scores are joined.",
        ),
        _of(
            "ddnn",
            "--feature-fusion",
            default="concat",
            show_default=True,
            type=fusions,
            help="How devices' features are joined.",
        ),
        _of(
            "ddnn",
            "--cloud",
            default="float",
            show_default=True,
            type=click.Choice(["float", "binary"]),
            help="What the cloud's blocks calculate with before quantization.",
        ),
        _of(
            "ddnn",
            "--loss",
            default="authors",
            show_default=True,
            type=click.Choice(["authors", "paper"]),
            help="Train every device's own exit too, or fused exits alone.",
        ),
        _of(
            "ddnn lcp nonn edgent",
            "--epochs",
            type=click.IntRange(1),
            help="Passes over the training data. Default: 100, 30, 60, 20 in this order.",
        ),
        _of(
            "ddnn lcp nonn",
            "--device-dropout",
            type=click.FloatRange(0, 1, max_open=True),
            help="Chance that training does without a device, so that a loss is "
            "nothing new. Default: 0.2, 0, and for K students such that all are heard "
            "in a third of it (0.42 of two, 0.17 of six).",
        ),
        _of(
            "ddnn",
            "--exits",
            default="accuracy",
            show_default=True,
            type=click.Choice(["accuracy", "bytes", "latency"]),
            help="What exit thresholds are chosen for; the latter two lose at most half a "
            "point of the best accuracy.",
        ),
        _of(
            "ddnn",
            "--exit-threshold",
            "exit_thresholds",
            multiple=True,
            type=click.FloatRange(0, 1),
            metavar="T",
            help="Exit at this normalized entropy instead of choosing one (the paper: 0.8); "
            "once for each exit below the last.",
        ),
        _of(
            "ddnn",
            "--max-bytes",
            type=click.FloatRange(0),
            help="The most that one device may send per sample on average.",
        ),
        _of(
            "ddnn",
            "--max-latency",
            type=click.FloatRange(0),
            metavar="MS",
            help="The longest mean time on the links, estimated.",
        ),
        _of(
            "lcp",
            "--merge",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "sum", "concat"]),
            help="How branches' features are joined: as suits the network, or so.",
        ),
        _of(
            "lcp",
            "--fatten",
            type=click.FloatRange(0),
            metavar="PERCENT",
            help="How much wider branches are than fits are first found; by default wider and "
            "wider in steps of 10 until --task-error is met.",
        ),
        _of(
            "lcp",
            "--task-error",
            default=1.0,
            show_default=True,
            type=click.FloatRange(0),
            help="Accuracy that the split may cost on validation data, in points.",
        ),
        _of(
            "lcp",
            "--unequal",
            is_flag=True,
            help="Wider branches for devices that calculate faster.",
        ),
        _of(
            "lcp",
            "--division-factor",
            default=2.0,
            show_default=True,
            type=click.FloatRange(1, min_open=True),
            help="A branch that does not fit its device gets so many times narrower (Procedure 1).",
        ),
        _of(
            "lcp",
            "--min-width",
            default=1,
            show_default=True,
            metavar="CHANNELS",
            type=click.IntRange(1),
            help="The least channels or units of a branch's layer.",
        ),
        _of(
            "lcp", "--fresh", is_flag=True, help="Draw new weights instead of the base's channels'."
        ),
        _of(
            "lcp",
            "--teach",
            default=0.5,
            show_default=True,
            type=click.FloatRange(0, 1),
            help="Share of the loss that is the base's scores, the rest being labels.",
        ),
        _of(
            "lcp",
            "--prune",
            default=0.0,
            show_default=True,
            metavar="PERCENT",
            type=click.FloatRange(0, 100, max_open=True),
            help="Channels that trained branches lose before they are trained on.",
        ),
        _of("lcp", "--fixed-point", is_flag=True, help="Also measure 3.13 fixed point, emulated."),
        _of(
            "lcp nonn edgent",
            "--shift",
            default=0,
            show_default=True,
            metavar="PIXELS",
            type=click.IntRange(0),
            help="Shift training images by up to so many pixels.",
        ),
        _of("lcp nonn edgent", "--flip", is_flag=True, help="Mirror half of the training images."),
        _of(
            "lcp nonn edgent",
            "--batch",
            default=128,
            show_default=True,
            metavar="SAMPLES",
            type=click.IntRange(2),
            help="Samples of a training step; fewer take less memory.",
        ),
        _of(
            "lcp nonn edgent",
            "--rate",
            type=click.FloatRange(0, min_open=True),
            help="Peak learning rate. Default: 0.001, 0.002, 0.001 in this order.",
        ),
        _of(
            "nonn",
            "--students",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "wrn10", "wrn16", "wrn22", "dense"]),
            help="What students are: wide residual networks of so many layers, or dense "
            "ones; wrn16 for images.",
        ),
        _of(
            "nonn",
            "--ratio",
            default=10.0,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="The model has at least so many times the parameters of a student.",
        ),
        _of(
            "nonn",
            "--max-macs",
            type=click.FloatRange(0, min_open=True),
            help="The most multiply-accumulates of one student.",
        ),
        _of(
            "nonn",
            "--max-energy",
            type=click.FloatRange(0, min_open=True),
            metavar="MJ",
            help="The most energy of one student's inference, estimated.",
        ),
        _of(
            "nonn",
            "--beta",
            default=100.0,
            show_default=True,
            type=click.FloatRange(0),
            help="How much the model's activations count beside its answers (paper: 10000).",
        ),
        _of(
            "edgent",
            "--exit-after",
            "exit_layers",
            multiple=True,
            metavar="LAYER",
            help="An exit leaves behind this layer; repeat for more.",
        ),
        _of(
            "edgent",
            "--exit-share",
            "exit_shares",
            multiple=True,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="An exit leaves where this share of the multiply-accumulates is done; "
            "repeat for more. Default: 0.15, 0.35 and 0.6.",
        ),
        _of(
            "edgent",
            "--latency",
            "limit_ms",
            metavar="MS",
            type=click.FloatRange(0, min_open=True),
            help="The latency required. Default: the fleet's deadline.",
        ),
        _of(
            "edgent",
            "--strategies",
            default=8,
            show_default=True,
            type=click.IntRange(1),
            help="How many ways to cut and exit are exported at most.",
        ),
        _of(
            "edgent",
            "--keep-strategy",
            "kept_strategies",
            multiple=True,
            metavar="NAME",
            help="A way that is exported in any case, such as e5-device; repeat for more.",
        ),
        _of(
            "edgent",
            "--aim",
            default="accuracy",
            show_default=True,
            type=click.Choice(["accuracy", "reward"]),
            help="What a strategy is picked for: the most accurate one that is in time, or "
            "accuracy and throughput together.",
        ),
        _of(
            "edgent",
            "--entropy-exit",
            type=click.IntRange(1),
            metavar="N",
            help="Strategies too in which exit N answers only what it is sure of by entropy "
            "(BranchyNet).",
        ),
        _of(
            "edgent",
            "--normalized-entropy",
            is_flag=True,
            help="Choose that exit's threshold among shares of ln C, not among nats.",
        ),
        _of(
            "edgent",
            "--profiles",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Measured latencies of layers by kind of device, JSON; without them the "
            "paper's coefficients (a Pi 3 and a PC, Chainer) stand in.",
        ),
        _of(
            "single",
            "--device",
            metavar="ID",
            help="Who runs the network; by default the fastest of those that it fits.",
        ),
        _of(
            AUTO,
            "--goal",
            default="latency",
            show_default=True,
            type=click.Choice(["latency", "bytes", "energy", "memory"]),
            help="What the chosen plan has least of.",
        ),
        _of(
            AUTO,
            "--max-loss",
            default=1.0,
            show_default=True,
            metavar="POINTS",
            type=click.FloatRange(0, 100),
            help="Accuracy that the chosen plan may have less than the model.",
        ),
        _of(
            AUTO,
            "--max-loss-one-lost",
            metavar="POINTS",
            type=click.FloatRange(0, 100),
            help="The same with any one of its devices lost; by default that does not count.",
        ),
        _of(
            AUTO,
            "--minutes",
            default=20.0,
            show_default=True,
            type=click.FloatRange(0),
            help="Nothing new is trained after so long; what is trained is kept.",
        ),
        _of(
            AUTO,
            "--platform",
            "platforms",
            multiple=True,
            metavar="DEVICE=PLATFORM",
            help="What a device is reckoned as, where its kind does not say: a platform's name or "
            "a .yaml file.",
        ),
        _of(
            AUTO,
            "--all",
            "everything",
            is_flag=True,
            help="Also train plans that cannot be chosen any more, as far as the minutes reach.",
        ),
    ]


def default_choices() -> dict[str, Any]:
    """The parsed options of a command that was given none, by parameter name."""

    @click.command()
    @method_inputs(AUTO)
    def command(**_: Any) -> None:
        """Hold the options."""

    return dict(command.make_context("defaults", []).params)


def method_options(method: str, chosen: dict[str, Any]) -> Any:
    """What a method is designed with, from the parsed options of its command."""
    options = {
        "snn": _snn_options,
        "ddnn": _ddnn_options,
        "lcp": _lcp_options,
        "nonn": _nonn_options,
        "layerwise": _layerwise_options,
        "edgent": _edgent_options,
        "single": _single_options,
    }
    return options[method](chosen)


def _single_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.single.options import SingleOptions

    return SingleOptions(device=chosen["device"])


def _ddnn_options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.ddnn.exits import Bounds, Goal
    from exporter.methods.ddnn.options import DdnnOptions
    from exporter.methods.ddnn.train import AUTHORS_WEIGHTS, PAPER_WEIGHTS, TrainOptions

    return DdnnOptions(
        filters=() if chosen["raw"] else chosen["ddnn_filters"] or (4,),
        score_fusion=Fusion(chosen["score_fusion"]),
        feature_fusion=Fusion(chosen["feature_fusion"]),
        cloud=chosen["cloud"],
        training=TrainOptions(
            epochs=chosen["epochs"] or 100,
            weights=PAPER_WEIGHTS if chosen["loss"] == "paper" else AUTHORS_WEIGHTS,
            device_dropout=0.2 if chosen["device_dropout"] is None else chosen["device_dropout"],
            seed=chosen["seed"],
        ),
        exits=Bounds(
            goal=Goal(chosen["exits"]),
            max_bytes=chosen["max_bytes"],
            max_latency_ms=chosen["max_latency"],
            thresholds=chosen["exit_thresholds"] or None,
        ),
        seed=chosen["seed"],
    )


def _lcp_options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.lcp.options import LcpOptions
    from exporter.training import TrainOptions

    return LcpOptions(
        merge=None if chosen["merge"] == "auto" else Fusion(chosen["merge"]),
        factor=chosen["division_factor"],
        minimum_width=chosen["min_width"],
        unequal=chosen["unequal"],
        fatten=None if chosen["fatten"] is None else chosen["fatten"] / 100,
        task_error=chosen["task_error"],
        fresh=chosen["fresh"],
        teach=chosen["teach"],
        prune=chosen["prune"] / 100,
        fixed_point=chosen["fixed_point"],
        training=TrainOptions(
            epochs=chosen["epochs"] or 30,
            batch=chosen["batch"],
            rate=chosen["rate"] or 1e-3,
            decay=1e-4,
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            part_dropout=chosen["device_dropout"],
            seed=chosen["seed"],
        ),
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _nonn_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.nonn.communities import CommunityOptions
    from exporter.methods.nonn.loss import LossOptions
    from exporter.methods.nonn.options import NonnOptions
    from exporter.methods.nonn.students import Builder, dense_builder, wide_builder
    from exporter.training import TrainOptions

    kind = chosen["students"]
    if kind.startswith("wrn"):
        builder: Builder | None = wide_builder(int(kind.removeprefix("wrn")))
    else:
        builder = dense_builder if kind == "dense" else None
    return NonnOptions(
        communities=CommunityOptions(seed=chosen["seed"]),
        loss=LossOptions(beta=chosen["beta"]),
        training=TrainOptions(
            epochs=chosen["epochs"] or 60,
            batch=chosen["batch"],
            rate=chosen["rate"] or 2e-3,
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            part_dropout=chosen["device_dropout"],
            seed=chosen["seed"],
        ),
        builder=builder,
        ratio=chosen["ratio"],
        max_macs=chosen["max_macs"],
        max_energy_mj=chosen["max_energy"],
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _layerwise_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.layerwise.options import LayerwiseOptions

    return LayerwiseOptions()


def _edgent_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.edgent.options import EdgentOptions
    from exporter.methods.edgent.profile import load_profiles
    from exporter.training import TrainOptions

    given = chosen["exit_shares"]
    return EdgentOptions(
        exits=chosen["exit_layers"],
        shares=tuple(sorted(given)) if given else EdgentOptions().shares,
        training=TrainOptions(
            epochs=chosen["epochs"] or 20,
            batch=chosen["batch"],
            rate=chosen["rate"] or 1e-3,
            decay=1e-4,
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            seed=chosen["seed"],
        ),
        limit_ms=chosen["limit_ms"],
        strategies=chosen["strategies"],
        keep=chosen["kept_strategies"],
        aim=chosen["aim"],
        entropy_exit=chosen["entropy_exit"],
        entropy_normalized=chosen["normalized_entropy"],
        profiles=None if chosen["profiles"] is None else load_profiles(chosen["profiles"]),
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _snn_options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.snn.compensate import CompensateOptions
    from exporter.methods.snn.distill import DistillOptions
    from exporter.methods.snn.options import QUICK_SEARCH, SnnOptions
    from exporter.methods.snn.prune import Criterion

    epochs = chosen["distill"]

    return SnnOptions(
        max_drop=chosen["max_drop"],
        keep=chosen["keep"],
        criterion=Criterion(chosen["criterion"]),
        quick=chosen["quick"],
        compensate=CompensateOptions(seed=chosen["seed"]) if chosen["compensate"] else None,
        distill=DistillOptions(epochs=epochs, seed=chosen["seed"]) if epochs else None,
        outcomes=chosen["outcomes"],
        fusion=None if chosen["fusion"] == "auto" else Fusion(chosen["fusion"]),
        partition=replace(
            QUICK_SEARCH,
            evaluated_at_least=1,
            evaluated_at_most=chosen["candidates"],
            seed=chosen["seed"],
        ),
        workers=chosen["workers"],
        dask_scheduler=chosen["dask"],
        cache=chosen["cache"],
        seed=chosen["seed"],
    )
