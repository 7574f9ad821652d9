"""The command line `mdeberta`: parses arguments, sets up logging and turns errors into one sentence and an exit code.

Heavy packages are imported only inside the stages, so that help, plan and status answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline import configfile
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.storage import redact

app = typer.Typer(
    name="mdeberta",
    help="From raw multilingual text to a pretrained mDeBERTaV3 checkpoint with its XNLI score.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[str, typer.Option("-c", "--config", help="YAML file, or the name of a preset.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one key: --set corpus.shard_mb=64 (repeatable).")
]


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show debug messages and full tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for package in ("pipeline", "tokenizer", "model"):
        logging.getLogger(package).setLevel(level)


@app.command()
def run(
    config: ConfigOption,
    stages: Annotated[
        list[str] | None, typer.Argument(help="Stages to run (default: all); after -- come Beam's pipeline options.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Run the pipeline, or some stages of it. What is committed already is not done again."""
    from pipeline.execute import run_stages

    names, runner_args = _split_runner_args(stages or [])
    settings = configfile.load(config, overrides)
    notes = run_stages(settings, names, source=_source(config, overrides), runner_args=tuple(runner_args))
    typer.echo("; ".join([f"done: {', '.join(names) or 'all stages'} in {redact(settings.work_dir)}", *notes]))


@app.command()
def demo(
    work_dir: Annotated[str, typer.Option(help="Where the results go.")] = "runs/demo",
    overrides: SetOption = None,
) -> None:
    """Run the whole pipeline on the packaged text: CPU only, a few minutes, ends with the report's path."""
    from pipeline.execute import run_stages

    changes = [f"work_dir={json.dumps(work_dir)}", *(overrides or [])]
    settings = configfile.load("demo", changes)
    run_stages(settings, [], source=_source("demo", changes))
    path = _write_report(settings)
    typer.echo(f"model:  {_stage_path(settings, 'export')}")
    typer.echo(f"report: {path}")


@app.command()
def ablate(
    config: ConfigOption,
    overrides: SetOption = None,
    arms: Annotated[
        str, typer.Option("--arms", help="Which of them to train and compare, separated by commas.")
    ] = "mlm,es,nes,gdes",
) -> None:
    """Pretrain mlm, es, nes and gdes on the same rows, and compare them in a table and on a page."""
    from pipeline.ablation import ablate as train
    from pipeline.ablation import make_arms

    typer.echo("\n".join(train(make_arms(config, overrides or [], arms), _source(config, overrides))))


@app.command()
def plan(
    config: ConfigOption,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
) -> None:
    """Show each stage's fingerprint, place and state, and why it would run. Changes nothing."""
    from pipeline.plan import plan as make_plan

    rows = make_plan(configfile.load(config, overrides))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    for row in rows:
        parts = f"{row.parts_done}/{'?' if row.parts_total is None else row.parts_total} parts"
        typer.echo(f"{row.stage:9}{row.fingerprint or '-':14}{row.state:9}{parts:16}{row.reason or row.path}")


@app.command()
def status(config: ConfigOption, overrides: SetOption = None) -> None:
    """Show what is done, what runs at present and how far it is."""
    from pipeline.status import status_lines

    for line in status_lines(configfile.load(config, overrides)):
        typer.echo(line)


@app.command()
def verify(config: ConfigOption, overrides: SetOption = None) -> None:
    """Read every committed file again and name those that are missing, altered or unexpected."""
    from pipeline.plan import verify as check

    checked, problems = check(configfile.load(config, overrides))
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise PipelineError(
            f"{len(problems)} problems in {checked} files; delete the stage's directory and run it again"
        )
    typer.echo(f"{checked} files are as they were committed")


@app.command()
def report(config: ConfigOption, overrides: SetOption = None) -> None:
    """Write one self-contained HTML page over everything that exists."""
    typer.echo(_write_report(configfile.load(config, overrides)))


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Option("-c", "--config", help="YAML file, or the name of a preset.")] = None,
    overrides: SetOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the config with every default filled in.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of all keys.")] = False,
) -> None:
    """Check a config; print it with its defaults or the schema of all keys."""
    if schema:
        typer.echo(json.dumps(Config.model_json_schema(), indent=1))
        return
    if config is None:
        raise UserError(f"give -c FILE or a preset ({', '.join(configfile.presets())}), or --schema")
    settings = configfile.load(config, overrides)
    typer.echo(configfile.dump(settings) if resolved else f"{config}: valid", nl=not resolved)


def _write_report(settings: Config) -> str:
    from pipeline.report import write_report

    return redact(write_report(settings))


def _stage_path(settings: Config, name: str) -> str:
    from pipeline.stage import identities, stage_folder

    return redact(stage_folder(settings, identities(settings, name)[name]).url)


def _source(config: str, overrides: list[str] | None) -> tuple[str, ...]:
    source = str(Path(config).resolve()) if Path(config).is_file() else config
    return ("-c", source, *(argument for change in overrides or [] for argument in ("--set", change)))


def _split_runner_args(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate stage names from what followed `--`: the first argument that starts with a dash begins the latter."""
    first = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    return arguments[:first], arguments[first:]


def main() -> None:
    """Entry point of the `mdeberta` command."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=(["--debug"] if debug else []) + arguments, standalone_mode=True)
    except PipelineError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (run again with --debug for the traceback)", 1)


def _fail(sentence: str, code: int) -> None:
    print(f"mdeberta: {sentence}", file=sys.stderr)
    sys.exit(code)
