"""What a run trains, and where: its settings, strategy, data set, folder, and the checkpoint that it resumes from."""

import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

import keras
from hvdkit_models.recipe import Recipe

from hvdkit import collectives, reporting, strategies, world
from hvdkit.checkpoint import resuming
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.collectives.agreement import together
from hvdkit.data.sources import Source, open_source, survey_source
from hvdkit.errors import UsageError
from hvdkit.train import artifacts
from hvdkit.train import data as job_data
from hvdkit.train.build import ModelSource, check_kind, find_model
from hvdkit.train.settings import Config, Settings, resolve

_log = logging.getLogger("hvdkit.train")  # the job's logger


@dataclasses.dataclass(frozen=True)
class Job:
    """A run before its data is read.

    Attributes:
        config: the flags.
        settings: the flags and what the recipe and the checkpoint decide.
        strategy: the parallelism strategy.
        model_source: the function that builds the model.
        recipe: the model's defaults for this data set.
        source: the data set, with its folds or windows.
        workdir: the run's folder.
        found: the checkpoint to resume from; None to start from the beginning.
        identity: what must not change when the run resumes.
    """

    config: Config
    settings: Settings
    strategy: strategies.Strategy
    model_source: ModelSource
    recipe: Recipe
    source: Source
    workdir: Path
    found: Checkpoint | None
    identity: dict[str, Any]


def open_job(config: Config) -> Job:
    """Starts the ranks, resolves the flags, creates the run's folder and opens its checkpoint. A collective call.

    Raises:
        UsageError: an input of the user's is wrong; raised on all ranks.
    """
    # ---- Ranks and strategy ---------------------------------------------------------------------------------------
    if config.threads:
        os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(config.threads)
    with together():
        strategy = strategies.create(config.strategy, config.replicas, _division(config))

    # ---- Model, data set and settings -----------------------------------------------------------------------------
    with together():
        model_source = find_model(config.model, config.evaluator)
        dataset = config.dataset or model_source.recipes[0].dataset
        schema = job_data.schema_of(config)
        if config.download and strategy.world.local_rank == 0:  # one rank a host; the others wait at the block's end
            open_source(dataset, config.data_dir, download=True, image_size=config.image_size, schema=schema)
    with together():
        survey = survey_source(dataset, schema, world.rank(), world.size())
    surveys = [found for found in collectives.allgather_object(survey, name="surveys") if found]
    keras.utils.set_random_seed(config.seed)  # a function of --dataset may draw examples
    with together():
        source = open_source(
            dataset,
            config.data_dir,
            image_size=config.image_size,
            schema=schema,
            seed=config.seed,
            surveys=surveys or None,
        )
    job_data.check_equal_data(source)
    with together():
        check_kind(model_source, source.kind, dataset)
        recipe = model_source.recipe_for(source.name)
        settings = resolve(config, recipe, strategy.size)
        source = job_data.prepared(source, settings)
    source = job_data.with_long_tail(source, settings)
    keras.utils.set_random_seed(settings.seed)
    keras.config.set_dtype_policy(settings.precision)

    # ---- Workdir and checkpoint -----------------------------------------------------------------------------------
    workdir, found = _make_workdir(settings, model_source, source)
    artifacts.log_to(workdir, strategy.world, append=found is not None)
    identity = {"model": model_source.name, "dataset": source.name}
    if found:
        settings = _go_on(config, settings, recipe, found, identity)
    identity |= _identity(settings)
    return Job(config, settings, strategy, model_source, recipe, source, workdir, found, identity)


def _make_workdir(settings: Settings, model: ModelSource, source: Source) -> tuple[Path, Checkpoint | None]:
    """Creates the run's folder, and opens the checkpoint to resume from, if there is one."""
    name = f"{model.name}-{source.name.split(':')[0]}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = Path(collectives.broadcast_object(settings.workdir or f"runs/{name}", name="workdir")).expanduser()
    before = collectives.broadcast_object(reporting.read_json(workdir / "result.json"), name="finished")
    extends = bool(before) and not settings.overwrite and settings.resume == "auto" and _is_longer(settings, before)
    with together():
        artifacts.make_workdir(workdir, overwrite=settings.overwrite or extends, begin_anew=settings.resume == "never")
    resume = "never" if before and settings.resume == "auto" and not extends else settings.resume
    found = resuming.open_checkpoint(workdir / "checkpoints", resume)
    with together():
        if extends and not found:
            raise UsageError(
                f"The finished run in {workdir} left no checkpoint to go on from. Choose another --workdir=DIR, or "
                f"replace the run with --overwrite."
            )
    if world.rank() == 0:
        keep = ["tensorboard", "checkpoints"] if found else ["checkpoints"] if resume == "auto" else []
        artifacts.clear(workdir, keep=keep)
    return workdir, found


def _is_longer(settings: Settings, before: dict[str, Any]) -> bool:
    """Returns whether the run trains longer than the finished run of the same folder."""
    if settings.steps:
        return settings.steps > before["steps"]
    return settings.epochs > before["epochs"]


def _go_on(config: Config, settings: Settings, recipe: Recipe, found: Checkpoint, identity: dict[str, Any]) -> Settings:
    """The settings of the resumed run, for the current number of replicas.

    Raises:
        UsageError: the checkpoint has another model, data set or training setting.
    """
    if not isinstance(found.state["extra"], dict) or "stretches" not in found.state["extra"]:
        raise UsageError(
            f"The checkpoint {found.path} was written by a script, not by hvdkit.train: resume it with that script."
        )
    resuming.refuse_another_job(found, identity)
    before = found.state["job"]
    if config.local_batch and settings.global_batch != before["global_batch"]:
        _log.info("the global batch stays %d, so --local-batch is left out", before["global_batch"])
        kept = dataclasses.replace(config, local_batch=None, global_batch=before["global_batch"])
        settings = resolve(kept, recipe, settings.replicas)
    resuming.refuse_another_job(found, _identity(settings))
    return dataclasses.replace(settings, warmup_epochs=found.state["extra"]["warmup_epochs"])


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings that must not change when a run resumes, besides model and data."""
    # Whether and in how many fragments weights are under way between ranks is part of a checkpoint.
    columns = ("label_column", "text_column", "feature_columns", "encoding")
    data = (
        "task",
        *columns,
        "image_size",
        "fold",
        "validates",
        "validation_share",
        "sequence_length",
        "long_tail",
        "sampling",
        "class_weights",
        "effective_number",
        "focal",
        "augment",
    )
    training = (
        "seed",
        "global_batch",
        "optimizer",
        "learning_rate",
        "lr_schedule",
        "precision",
        "model_args",
        "fragments",
        "temperature",
        "student_loss_weight",
    )
    return {name: getattr(settings, name) for name in (*data, *training)}


def _division(config: Config) -> strategies.Division:
    patterns = tuple(config.branches.split(",")) if config.branches else None
    return strategies.Division(config.model_ranks, config.micro_batches, config.schedule, patterns)
