"""The `bpfx` command: train, compare, plan, draw."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bpfx import data, models
from bpfx._config import METHODS, Config, build, example_batch, prepare
from bpfx._ranks import is_rank_zero, launched_with_others
from bpfx.errors import BpfxError
from bpfx.plan import Plan

__all__ = ["main"]

_EXAMPLES = """examples:
  bpfx train                                             three ways on bundled images, about three minutes
  bpfx train --model resnet18 --data CIFAR10 --data-root DATA --iterations 2000
  bpfx train --model timm:vit_tiny_patch16_224 --data path/to/images --methods bp,offset
  bpfx train --resume runs/small-resnet-fashion-mnist-subset-20260131-120000
  bpfx compare --rows bp,micro,local,offset --seeds 0,1,2     equal iterations, equal time, and memory in one report
  bpfx plan --model resnet50 --image-size 224 --batch-size 32
  bpfx draw --model resnet50 --image-size 224 --batch-size 32 --blocks 8 --out resnet50.svg
"""
_INTERRUPTED = 130  # what shells expect after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 2 after an error that the user can put right, 130 after an interrupt.

    Example:
        >>> from bpfx.cli import main
        >>> main(["plan", "--model", "no-such-model"])
        2
    """
    try:
        arguments = vars(_parser().parse_args(argv))
    except BpfxError as error:
        return _fail(error)
    command = arguments.pop("command")
    try:
        return {"train": _train, "compare": _compare, "plan": _plan, "draw": _draw}[command](arguments)
    except BpfxError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _INTERRUPTED


def _fail(error: BpfxError) -> int:
    if is_rank_zero():
        print(f"bpfx: {error}", file=sys.stderr)
    return 2


def _train(arguments: dict[str, Any]) -> int:
    # Here, because training pulls in much that the other commands and --help do not need.
    from bpfx import train

    _single("train")
    console = _console()
    resumed, folder = arguments.pop("resume", None), arguments.pop("out", None)
    try:
        if resumed is not None:
            _alone(arguments, folder)  # of --tensorboard too: the folder shows whether there are events to go on with
            train.resume(Path(resumed), console)
        else:
            tensorboard = arguments.pop("tensorboard", False)
            config = Config(**arguments)
            train.start(config, Path(folder) if folder else _default_folder(config), console, tensorboard)
    except train.Interrupted as stopped:
        console.print(
            f"\nStopped. Continue with: bpfx train --resume {stopped.folder}", highlight=False, soft_wrap=True
        )
        return _INTERRUPTED
    return 0


def _compare(arguments: dict[str, Any]) -> int:
    from bpfx import compare
    from bpfx.train import Interrupted

    _single("compare")
    console = _console()
    resumed, folder = arguments.pop("resume", None), arguments.pop("out", None)
    try:
        if resumed is not None:
            _alone(arguments, folder)
            compare.resume(Path(resumed), console)
        else:
            own = {f.name for f in dataclasses.fields(compare.Settings)}
            given = {name: arguments.pop(name) for name in own if name in arguments}
            config = Config(**arguments)
            settings = compare.Settings(config, **given)
            compare.start(settings, Path(folder) if folder else _default_folder(config, "compare-"), console)
    except Interrupted as stopped:
        said = f"\nStopped. Continue with: bpfx compare --resume {stopped.folder}"
        console.print(said, highlight=False, soft_wrap=True)
        return _INTERRUPTED
    return 0


def _single(command: str) -> None:
    """Refuse several processes: each would train the whole run, in the same folder."""
    if launched_with_others():
        raise BpfxError(
            f"bpfx {command} runs in one process, and torchrun started several; start it without torchrun. "
            "docs/data-parallel.md has the loop for several processes"
        )


def _alone(given: dict[str, Any], folder: str | None) -> None:
    """Refuse settings beside --resume."""
    names = [*given, *(["out"] if folder else [])]
    if names:
        options = ", ".join("--" + name.replace("_", "-") for name in names)
        raise BpfxError(f"--resume takes every setting from the run's folder; leave out {options}.")


def _plan(arguments: dict[str, Any]) -> int:
    print(_make_plan(Config(**arguments)))
    return 0


def _draw(arguments: dict[str, Any]) -> int:
    from bpfx import draw

    out = Path(arguments.pop("out"))
    config = Config(**arguments)
    if not out.absolute().parent.is_dir():
        raise BpfxError(f"Cannot write {out}: there is no folder {out.parent}.")
    if out.is_dir():
        raise BpfxError(f"Cannot write {out}: it is a folder; name a file in it, such as {out / 'plan.svg'}.")
    plan = _make_plan(config)
    draw.write(plan, out, title=f"{config.model}, {len(plan.blocks)} blocks")
    print(f"wrote {out}")
    return 0


def _make_plan(config: Config) -> Plan:
    import torch.nn.functional as F

    import bpfx

    splits = prepare(config)
    return bpfx.plan(
        build(config, splits),
        F.cross_entropy,
        example_batch(config, splits),
        blocks=config.blocks_argument(),
        local_loss=config.local_losses(),
        horizon=config.horizon,
    )


def _console() -> Console:
    # Without markup: folders and hints such as 'bpfx[plot]' may hold brackets.
    console = Console(markup=False, highlight=False, quiet=not is_rank_zero())
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own, and 80 columns would break the table
    return console


def _default_folder(config: Config, kind: str = "") -> Path:
    moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{config.model}-{Path(config.data).name}".replace(":", "-").replace("/", "-")
    return Path("runs") / f"{kind}{name}-{moment}"


def _blocks(text: str) -> str | int | tuple[str, ...]:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        return tuple(name.strip() for name in text.split(",") if name.strip())


def _scale(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _period(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _methods(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(",") if seed.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers separated by commas, such as 0,1,2") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BpfxError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bpfx",
        description="Cut a model into blocks with local losses and train it in a fraction of the memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        # Without defaults here, what was not given falls to those of Config, and --resume can tell what was given.
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        _model_options(added, seed=name != "compare")
        return added

    train = command("train", "train three ways: BP, local losses alone, local losses corrected by the BP offset")
    _training_options(train)
    compare = command("compare", "train one model by BP, its cheap variants and every offset: one table, one report")
    _compare_options(compare)
    command("plan", "print the blocks, what crosses between them and the predicted memory; trains nothing")
    draw = command("draw", "draw the partitioned model as an SVG; trains nothing")
    draw.add_argument("--out", default="plan.svg", metavar="FILE", help="the SVG to write (default: %(default)s)")
    return parser


def _adder(group: Any, of: type[Any] = Config) -> Callable[..., None]:
    """Adds options that stand for fields of a dataclass, whose defaults their help shows."""
    defaults = {field.name: field.default for field in dataclasses.fields(of)}

    def add(flag: str, text: str, **options: Any) -> None:
        default = defaults[flag.strip("-").replace("-", "_")]
        group.add_argument(flag, help=text if default in (None, False) else f"{text} (default: {default})", **options)

    return add


def _model_options(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    add = _adder(parser.add_argument_group("model and data"))
    add("--model", f"{', '.join(models.names())}, torchvision:NAME or timm:NAME", metavar="NAME")
    add("--data", f"{data.BUNDLED}, a torchvision set such as CIFAR10, or a folder of images", metavar="NAME")
    add("--data-root", "folder of torchvision's sets", metavar="DIR")
    add("--download", "fetch a torchvision set into --data-root", action="store_true")
    add(
        "--image-size",
        "side of the images in pixels; default: what the model needs or the data have",
        type=int,
        metavar="PX",
    )
    add("--batch-size", "images per step", type=int, metavar="N")
    add("--blocks", "auto, a number, or module names: layer1,layer2.0", type=_blocks, metavar="WHICH")
    add("--local-loss", "a name, or one per region: layer1=predsim,*=dgl", metavar="NAME")
    add("--horizon", "blocks that a local loss sees; default: what the loss asks for", type=int, metavar="H")
    if seed:
        add("--seed", "of weights, data order and dropout", type=int, metavar="N")
    add("--device", "cpu or cuda", metavar="NAME")


def _training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = _adder(group)
    methods = f"comma-separated, of {', '.join(METHODS)}; default: all"
    group.add_argument("--methods", help=methods, type=_methods, metavar="LIST")
    add("--iterations", "optimizer steps per method", type=int, metavar="N")
    add("--lr", "highest learning rate of the one-cycle schedule", type=float, metavar="RATE")
    add("--weight-decay", "of AdamW", type=float, metavar="W")
    add("--period", "iterations between two refreshes of the offset, or auto", type=_period, metavar="K")
    add("--offset-batch", "images per refresh; default: the training batch", type=int, metavar="N")
    add("--micro-batches", "pieces in which a refresh goes through its images", type=int, metavar="N")
    add("--alpha", "scale of the local gradient, or auto with --form B", type=_scale, metavar="A")
    group.add_argument(
        "--lambda", dest="lam", help="scale of the offset, or auto (default: 1.0)", type=_scale, metavar="L"
    )
    add("--form", "A: the offset is g_BP - g_local; B: g_BP - alpha * g_local", choices=("A", "B"))
    add("--decay", "factor of the offset at every iteration after its refresh", type=float, metavar="D")
    add("--clip", "largest offset as a multiple of the local gradient; default: no limit", type=float, metavar="C")
    add("--match", "weight of the heads' gradient matching at refreshes", type=float, metavar="W")
    add("--compile", "how blocks are run", choices=("eager", "inductor"))
    add("--eval-every", "iterations between two tests; default: eight tests in all", type=int, metavar="N")
    add("--eval-images", "test on so many images only; default: all", type=int, metavar="N")
    group = parser.add_argument_group("the run")
    add = _adder(group)
    group.add_argument("--out", help="folder of the run; default: runs/MODEL-DATA-TIME", metavar="DIR")
    group.add_argument("--resume", help="continue the run in this folder from its last checkpoint", metavar="DIR")
    group.add_argument("--tensorboard", help="write events under the run's folder/tensorboard", action="store_true")
    add("--checkpoint-seconds", "seconds between two checkpoints", type=float, metavar="S")
    add("--checkpoint-every", "iterations between two checkpoints, in addition", type=int, metavar="N")


def _compare_options(parser: argparse.ArgumentParser) -> None:
    from bpfx import compare

    add = _adder(parser.add_argument_group("training"))
    add("--iterations", "optimizer steps of every row; with equal time, BP's", type=int, metavar="N")
    add("--lr", "highest learning rate of the one-cycle schedule", type=float, metavar="RATE")
    add("--weight-decay", "of AdamW", type=float, metavar="W")
    add("--eval-every", "iterations between two tests; default: eight tests in all", type=int, metavar="N")
    add("--eval-images", "test on so many images only; default: all", type=int, metavar="N")
    group = parser.add_argument_group("the comparison")
    add = _adder(group, compare.Settings)
    group.add_argument("--rows", help=f"of {', '.join(compare.ROWS)}; default: all", type=_methods, metavar="LIST")
    group.add_argument("--seeds", help="one run each (default: 0,1,2)", type=_seeds, metavar="LIST")
    add(
        "--period",
        "K: iterations between two refreshes, or BP steps, of the rows that have them",
        type=int,
        metavar="K",
    )
    add("--micro-batches", "pieces of a batch in the rows that split it", type=int, metavar="M")
    add("--budget", "iterations, time or both", metavar="WHICH")
    group.add_argument("--out", help="its folder; default: runs/compare-MODEL-DATA-TIME", metavar="DIR")
    group.add_argument("--resume", help="continue the comparison in this folder", metavar="DIR")
    _adder(group)("--checkpoint-seconds", "seconds between two checkpoints of a run", type=float, metavar="S")
