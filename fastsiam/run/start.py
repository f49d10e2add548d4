"""Start of a run: everything that is decided and checked before anything is written."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from fastsiam.config import Config
from fastsiam.config.micro_batch import check_micro_batch
from fastsiam.run.folder import RunFolder
from fastsiam.run.metrics import Journal
from fastsiam.run.resume import find_run
from fastsiam.run.start_weights import StartWeights, check_encoder, start_weights
from fastsiam.run.training_data import TrainingData
from fastsiam.runtime.device import spinning_notice
from fastsiam.runtime.distributed import World
from fastsiam.runtime.energy import EnergyMeter
from fastsiam.runtime.rank_check import check_alike, facts_of_config
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.cost import CostMeter, heartbeat_seconds
from fastsiam.training.progress import Progress
from fastsiam.training.state import State


class Start(NamedTuple):
    """A run that has written nothing yet."""

    runtime: Runtime
    data: TrainingData
    progress: Progress
    folder: RunFolder
    saved: dict
    """The checkpoint to resume from; empty for a new run."""
    journal: Journal
    weights: StartWeights | None
    """Those of model.weights, for a new run."""


@contextlib.contextmanager
def started(config: Config, world: World, began: float | None = None) -> Iterator[Start]:
    """Decide and open what a run needs, in force inside the block; all ranks must enter.

    `began`: when this process began to spend, by `time.monotonic`; None: now. Raises `UserError` for what the user can
    put right.
    """
    check_alike(world, facts_of_config(config))
    journal = Journal(world)
    folder, saved = find_run(config, world, journal)
    with world.together():
        check_encoder(config)
        check_micro_batch(config.train.batch_size, config.train.micro_batch, world.size)
    weights = None if saved else start_weights(config, world)
    folder.weights = weights.record if weights else saved.get("encoder", {}).get("weights")
    with world.together():
        runtime = Runtime.of(config.train, world, saved.get("computation"))
    if (notice := spinning_notice(runtime.device)) is not None:
        journal.warn(notice)
    with runtime, EnergyMeter.of(runtime.device, journal.warn) as energy:
        cost = CostMeter(
            folder.path if world.is_first else None,
            energy,
            warn=journal.warn,
            collect=world.collect,
            began=began,
            every=heartbeat_seconds(config.to_spend),
        )
        with TrainingData.open(config, runtime, folder.path, saved, journal) as data:
            state = State(**saved["state"]) if saved else None
            with world.together():
                progress = Progress(config, data.steps_per_epoch, cost, world, state, saved.get("budget"))
            yield Start(runtime, data, progress, folder, saved, journal, weights)
