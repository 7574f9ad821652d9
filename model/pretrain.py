"""Stage pretrain, as each of its processes runs it: join the others, open the stage, train, report what went wrong.

    mdeberta run -c conf.yaml pretrain             starts the processes of this machine itself (`model.launch`)
    torchrun --nproc-per-node 8 -m model.pretrain -c conf.yaml
    deepspeed --hostfile hosts --module model.pretrain -c conf.yaml

Rank 0 takes the stage's lock and writes what is written once; the others wait for it. Where the stage is committed
already, all end at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from model.launch import LOG_LEVEL, report_failure, started_by_launcher
from model.training import Pretraining
from model.world import World, join, leave
from pipeline import configfile
from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.stage import StageRun, open_run
from pipeline.stages import STAGES

_log = logging.getLogger("model.pretrain")  # this module runs as __main__


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of every training process."""
    parser = argparse.ArgumentParser(prog="model.pretrain", description="Run the stage pretrain under a launcher.")
    parser.add_argument("-c", "--config", required=True, help="YAML file, or the name of a preset")
    parser.add_argument("--set", action="append", dest="overrides", metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by some launchers; LOCAL_RANK counts")
    options = parser.parse_args(arguments)
    _configure_logging()
    try:
        train(configfile.load(options.config, options.overrides))
    except PipelineError as error:
        report_failure(str(error), error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _log.exception("pretrain: process %s failed", os.environ.get("RANK", "0"))
        report_failure(f"{type(error).__name__}: {error}", PipelineError.exit_code)
        sys.exit(PipelineError.exit_code)


def train(config: Config) -> None:
    """This process's part of the stage."""
    world = join()
    with opened(config, world) as run:
        if not run.committed:
            Pretraining(run, world).execute()
        elif world.is_first:
            _log.info("pretrain: committed already, nothing to do")
    leave()


@contextlib.contextmanager
def opened(config: Config, world: World) -> Iterator[StageRun]:
    """The stage's run on every process; rank 0 goes first and holds the lock.

    Raises:
        SystemExit: rank 0 could not open it and says why.
    """
    spec = STAGES["pretrain"]
    with contextlib.ExitStack() as stack:
        if world.is_first:
            try:
                run = stack.enter_context(open_run(spec, config, locked=not started_by_launcher()))
            except BaseException:
                world.share(False)
                raise
            world.share(True)
        elif not world.share(False):
            raise SystemExit(PipelineError.exit_code)
        else:
            run = stack.enter_context(open_run(spec, config, locked=False))
        yield run


def _configure_logging() -> None:
    """Log like the `mdeberta` command; what all processes have to say, only rank 0 says."""
    level = int(os.environ.get(LOG_LEVEL, logging.INFO)) if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(
        level=max(level, logging.WARNING), stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    for package in ("pipeline", "model"):
        logging.getLogger(package).setLevel(level)
    # About calls that DeepSpeed makes.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    main()
