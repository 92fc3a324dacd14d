"""The command line. Every command imports what it needs when it runs, so that help comes at once.

Exit status: 0 on success; 2 on bad input, with one line on stderr; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from perpixel import __version__
from perpixel.errors import ConfigError, DataError, PerpixelError

if TYPE_CHECKING:
    from perpixel.predictor import Predictor

BAD_INPUT = 2  # exit status

app = typer.Typer(
    name="perpixel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check, show or make data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[str, typer.Option(help="auto (bf16 where the hardware has it), fp32 or bf16.")]
Scales = Annotated[str | None, typer.Option(help="Test-time augmentation: short sides in px, such as 600,800,1000.")]
Flip = Annotated[bool, typer.Option("--flip", help="Test-time augmentation: also look at the mirrored picture.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures that go through the network together.")]


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr, never a traceback."""
    try:
        app()
    except PerpixelError as error:
        _refuse(str(error))
    except OSError as error:  # full disks, missing rights, files that vanish
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))


def _refuse(message: str) -> NoReturn:
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(BAD_INPUT)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Find objects in pictures: train, evaluate and use per-pixel detectors."""
    if show:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see perpixel models), or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SECTION.KEY=VALUE…", help="data.root=DIR output=DIR, and changes such as train.minutes=10."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in output=DIR stopped.")] = False,
) -> None:
    """Train a detector on a folder of pictures with COCO labels.

    perpixel train fcos/lite0 data.root=my_coco_folder output=runs/a train.minutes=10
    """
    from perpixel.runs import train as run

    overrides = list(settings or [])
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word}: expected section.key=value, for example data.root={word} or output={word}")
    data = _take(overrides, "data.root")
    output = _take(overrides, "output") or f"runs/{Path(recipe).with_suffix('').as_posix().replace('/', '-')}"
    again = _take(overrides, "resume") in ("true", "1", "yes")
    result = run(recipe, data=data, output=output, overrides=overrides, resume=resume or again)
    if result.reason == "interrupted":
        print(f"stopped at step {result.step}; the same command with --resume goes on from there")


def _take(overrides: list[str], key: str) -> str | None:
    """Removes all `key=value` from the list; the last value."""
    values = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == key]
    overrides[:] = [word for word in overrides if word.partition("=")[0] != key]
    return values[-1] if values else None


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder, or a recipe with released weights.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]…", help="Changes to its recipe, such as data.test_short_side=600."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder with COCO labels; default: what it was trained on.")] = None,
    split: Annotated[str, typer.Option(help="val, test or train.")] = "val",
    out: Annotated[Path | None, typer.Option(help="Write detections here, as COCO results.")] = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = 1,
    scales: Scales = None,
    flip: Flip = False,
) -> None:
    """Score a detector: COCO's AP and AR, and a table by class."""
    from perpixel.metrics import report
    from perpixel.runs import evaluate as score

    result = score(
        run,
        data,
        split,
        changes or [],
        device=device,
        precision=precision,
        batch_size=batch_size,
        scales=_sides(scales),
        flip=flip,
        results_file=out,
    )
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun started
        print(report(result))


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="Run folder, or a recipe with released weights.")],
    source: Annotated[str, typer.Argument(help="Picture, folder, 'pattern', video, camera or camera:1.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and annotated copies.")],
    weights: Annotated[Path | None, typer.Option(help="Another file of weights.")] = None,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least score.")] = 0.3,
    batch_size: BatchSize = 4,
    scales: Scales = None,
    flip: Flip = False,
    pictures: Annotated[bool, typer.Option(help="Write annotated copies.")] = True,
    frames: Annotated[int | None, typer.Option(min=1, help="Stop a video or camera after so many frames.")] = None,
    color_by: Annotated[str, typer.Option(help="class or object.")] = "class",
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Find objects: annotated copies, and one COCO file with all detections."""
    from perpixel.annotate import Options, annotate

    predictor = _load(run, weights=weights, device=device, precision=precision, threshold=threshold)
    style = {"color_by": color_by}
    options = Options(
        batch_size=batch_size, scales=_sides(scales), flip=flip, pictures=pictures, frames=frames, style=style
    )
    found = annotate(predictor, source, out, options, report=print)
    print(f"{len(found.annotations)} objects in {len(found.images)} pictures: {out / 'predictions.json'}")


def _load(run: str, **options: Any) -> Predictor:
    from perpixel.predictor import load

    predictor = load(run, **options)
    weights = predictor.recipe.weights
    if weights is not None and not Path(run).exists():
        print(f"weights of {run}: {weights.license}", file=sys.stderr)
    return predictor


def _sides(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--scales {text}: expected short sides in px such as 600,800,1000") from error


@app.command()
def models() -> None:
    """List recipes, with published scores, and where their weights come from."""
    from perpixel.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        scores = ", ".join(f"{100 * value:.1f} {kind}" for kind, value in recipe.published.items())
        print(f"{name:24} {recipe.description}")
        print(f"    published: {scores or 'no score yet'}")
        weights = recipe.weights
        if weights is None:
            print("    weights:   none released; train it")
        else:
            print(f"    weights:   {weights.file} of {weights.hub} (Hugging Face Hub), trained by {weights.source}")
            print(f"    licence:   {weights.license}")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A .pth of the authors' release.")],
    recipe: Annotated[str, typer.Option(help="The recipe that it was trained by.")],
    out: Annotated[Path, typer.Option(help="Run folder to create.")],
) -> None:
    """Turn weights of the authors' release into a run folder."""
    from perpixel.hub import convert as run

    print(f"run: {run(file, recipe, out)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run and pictures.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 7.0,
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures to score on.")] = 300,
) -> None:
    """Train on a synthetic set, score it on held-out pictures, and draw what is found."""
    from perpixel.demo import demo as run

    run(out, minutes=minutes, pictures=pictures)


@data_app.command()
def check(
    root: Annotated[Path, typer.Argument(help="Folder of pictures with COCO labels.")],
    pictures: Annotated[bool, typer.Option(help="Also open every picture.")] = True,
) -> None:
    """List every defect with file, image and annotation id. Exit status 2 if there are any."""
    from perpixel.data.check import check as run

    defects = run(root, pictures=pictures)
    for defect in defects:
        print(defect)
    if defects:
        raise DataError(f"{root}: {len(defects)} defects; train with data.drop_degenerate=true or mend them")
    print(f"{root}: no defects")


@data_app.command()
def show(
    root: Annotated[Path, typer.Argument(help="Folder of pictures with COCO labels.")],
    out: Annotated[Path, typer.Option(help="The sheet to write: a .png or .jpg, or a folder.")] = Path("samples.png"),
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 12,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    transformed: Annotated[bool, typer.Option("--transformed", help="As training sees them.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other pictures.")] = 0,
) -> None:
    """Draw pictures with their labels, to see what a detector will learn from."""
    from perpixel.data.show import show as run

    if split not in ("train", "val", "test"):
        raise ConfigError(f"--split {split}: expected train, val or test")
    where: Any = split
    print(run(root, out, count, split=where, transformed=transformed, seed=seed))


@data_app.command()
def synthetic(
    root: Annotated[Path, typer.Argument(help="Folder to create.")],
    train: Annotated[int, typer.Option(min=1, help="Training pictures.")] = 600,
    val: Annotated[int, typer.Option(min=1, help="Held-out pictures.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other pictures.")] = 0,
) -> None:
    """Make a data set of textured shapes: no download, exact boxes and masks."""
    from perpixel.data.synthetic import write_synthetic

    print(write_synthetic(root, train=train, val=val, seed=seed))


if __name__ == "__main__":
    main()
