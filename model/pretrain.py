"""Stage pretrain, as each of its processes runs it: join the others, open the stage, train, report what went wrong.

    mdeberta run -c conf.yaml pretrain             starts the processes of this machine itself (`model.launch`)
    torchrun --nproc-per-node 8 -m model.pretrain -c conf.yaml
    deepspeed --hostfile hosts --module model.pretrain -c conf.yaml
    srun --ntasks-per-node 8 python -m model.pretrain -c conf.yaml

All compare what they were started with. Rank 0 takes the stage's lock and writes what is written once; the others wait
for it. Where the stage is committed already, all end at once. What fails on one of them ends all, with one sentence
(`model.heartbeat`).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from model import agreement
from model.failure import failure_of
from model.heartbeat import Heartbeats
from model.launch import LOG_LEVEL, report_failure, started_by_launcher
from model.place import Place, settle
from model.training import Pretraining
from model.world import World, join, leave
from pipeline import configfile
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
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
    try:
        place = settle()
    except UserError as error:
        report_failure(str(error), error.exit_code)
        sys.exit(error.exit_code)
    _configure_logging(place)
    try:
        train(configfile.load(options.config, options.overrides), place)
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, PipelineError | KeyboardInterrupt):
            _log.exception("pretrain: %s failed", place.label)
        failure = failure_of(error, place)
        failure.report(place)
        # Not by way of destructors: those of a broken process group may wait for the others.
        os._exit(failure.code)


def train(config: Config, place: Place) -> None:
    """This process's part of the stage."""
    stall_seconds = 60 * config.pretrain.launcher.stall_minutes
    world = join(place, stall_seconds)
    with Heartbeats(world, place, stall_seconds) as watch:
        agreement.require(config, world)
        with opened(config, world, watch) as run:
            if not run.committed:
                with watch.shown_in(run.folder):
                    Pretraining(run, world, watch).execute()
            elif world.is_first:
                _log.info("pretrain: committed already, nothing to do")
    leave()


@contextlib.contextmanager
def opened(config: Config, world: World, watch: Heartbeats) -> Iterator[StageRun]:
    """The stage's run on every process; rank 0 goes first, and waits for the lock as long as another run holds it."""
    if not world.is_first:
        watch.wait_for_first()
    with open_run(STAGES["pretrain"], config, locked=world.is_first and not started_by_launcher()) as run:
        watch.release()
        yield run


def _configure_logging(place: Place) -> None:
    """Log like the `mdeberta` command; what all processes have to say, only rank 0 says."""
    level = int(os.environ.get(LOG_LEVEL, logging.INFO)) if place.rank == 0 else logging.ERROR
    logging.basicConfig(
        level=max(level, logging.WARNING), stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    for package in ("pipeline", "model"):
        logging.getLogger(package).setLevel(level)
    # About calls that DeepSpeed makes.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


if __name__ == "__main__":
    main()
