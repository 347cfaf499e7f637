"""The command line. Heavy modules are imported inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["app"]

app = typer.Typer(
    name="ptq4arvg",
    help="Low-bit inference for autoregressive image generators.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: object) -> NoReturn:
    """Print one readable error and leave with exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def readable(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that a user can act on into a message without traceback; bugs keep theirs."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:  # CheckpointError and CalibrationError are ValueErrors
            fail(error)
        except RuntimeError as error:
            from ptq4arvg_kernels import BackendError

            if not isinstance(error, BackendError):
                raise
            fail(error)

    return wrapped


def bars() -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())


def class_list(text: str, limit: int) -> list[int]:
    """Classes from ``"3"``, ``"0,4,7"`` or ``"0-9"``.

    Raises:
        ValueError: not numbers, or a class the model does not have.
    """
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--classes {text!r}: {part.strip()!r} is not a class; write 3, 0,4,7 or 0-9")
        classes.extend(range(int(first), int(last or first) + 1))
    outside = [c for c in classes if c >= limit]
    if outside:
        raise ValueError(f"class {outside[0]} is out of range: this model has classes 0 … {limit - 1}")
    if not classes:
        raise ValueError(f"--classes {text!r} names no class; write 3, 0,4,7 or 0-9")
    return classes


@app.command("demo")
@readable
def demo_command(
    images: Annotated[int, typer.Option(help="Pictures per row of the table.")] = 500,
    out: Annotated[Path, typer.Option(help="Folder for report.json and images.png.")] = Path("out/demo"),
    jobs: Annotated[int | None, typer.Option(help="Rows worked on at once; default: one per core.")] = None,
) -> None:
    """Quantize the bundled model in several ways, let every result draw, and print one table."""
    from ptq4arvg.demo import demo
    from ptq4arvg.evaluation import Settings

    demo(out, Settings(images=images), jobs)


@app.command("quantize")
@readable
def quantize_command(
    model: Annotated[str, typer.Argument(help="bundled, stress, rar_b, rar_l, rar_xl or rar_xxl.")],
    output: Annotated[Path, typer.Argument(help="The quantized checkpoint to write (.safetensors).")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Published weights (.bin, .safetensors) of a rar_* model.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="w8a8, w6a8 or w6a6.")] = "w8a8",
    samples: Annotated[int, typer.Option(help="Calibration samples drawn from the model itself.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the calibration samples.")] = 0,
) -> None:
    """Calibrate a generator on its own samples and pack it into integers."""
    from ptq4arvg import checkpoint as files
    from ptq4arvg.pipeline import quantize
    from ptq4arvg.sources import open_original

    if output.suffix != ".safetensors":
        raise ValueError(
            f"{output}: quantized checkpoints are safetensors files; name it {output.with_suffix('.safetensors')}"
        )
    original = open_original(model, checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with bars() as progress:
        task = progress.add_task("quantize", total=1.0)
        quantized = quantize(
            original,
            recipe,
            samples=samples,
            seed=seed,
            progress=lambda fraction, what: progress.update(task, completed=fraction, description=what),
        )
    files.save(quantized, output)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {recipe}")


@app.command("generate")
@readable
def generate_command(
    model: Annotated[str, typer.Argument(help="bundled, stress, or a quantized or published checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The PNG to write: one row of pictures per class.")],
    classes: Annotated[str, typer.Option(help="Classes to draw, as in 3 or 0,4,7 or 0-9.")] = "0-9",
    per_class: Annotated[int, typer.Option(help="Pictures per class.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="MaskGIT-VQGAN weights, for published sizes.")] = None,
) -> None:
    """Draw pictures and save them as one PNG."""
    import time

    import torch

    from ptq4arvg.demo_picture import save_grid
    from ptq4arvg.sources import open_decoder, open_generator

    if per_class < 1:
        raise ValueError(f"--per-class must be at least 1, got {per_class}")
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: pictures are written as PNG; name it {output.with_suffix('.png')}")
    generator = open_generator(model)
    decode = open_decoder(generator, tokenizer)
    wanted = torch.tensor(class_list(classes, generator.conditioning.classes)).repeat_interleave(per_class)
    steps = generator.config.tokens
    started = time.perf_counter()
    with bars() as progress:
        task = progress.add_task("draw", total=steps)
        tokens = generator.generate(wanted, seed, progress=lambda step: progress.update(task, completed=step + 1))
    seconds = time.perf_counter() - started
    pictures = decode(tokens)
    save_grid(output, pictures, per_class, zoom=max(1, 112 // pictures.shape[-1]))
    print(f"{output}: {len(wanted)} pictures, {tokens.numel() / seconds:,.0f} tokens/s")


@app.command("info")
@readable
def info_command(
    file: Annotated[
        Path | None, typer.Argument(help="A checkpoint; without it, this installation is described.")
    ] = None,
) -> None:
    """Describe a checkpoint, or this installation."""
    if file is None:
        doctor()
        return
    from ptq4arvg.describe import describe

    lines = describe(file)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")


@app.command("doctor")
@readable
def doctor_command() -> None:
    """Say which versions and which backends are here, and why the others are not."""
    doctor()


def doctor() -> None:
    import platform

    import torch

    import ptq4arvg_kernels
    from ptq4arvg import __version__

    print(f"ptq4arvg  {__version__}")
    print(f"python    {platform.python_version()}, {platform.system()} {platform.machine()}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    print("backends, in order of preference:")
    for status in ptq4arvg_kernels.doctor():
        print(f"  {status.backend:10} {'yes' if status.available else 'no ':3}  {status.reason}")


if __name__ == "__main__":
    app()
