"""`qwenfit tune`: settings, plan, data, then weights, in that order, so that what is wrong is said early."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwenfit.checkpoint.load import with_files
from qwenfit.config import ModelConfig
from qwenfit.planning.planner import resolve
from qwenfit.planning.types import Plan
from qwenfit.run.planned import run_device, stderr_progress
from qwenfit.tune import checkpoint
from qwenfit.tune.base_model import choose_method
from qwenfit.tune.batch import BatchSource
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.interrupt import StopSignals
from qwenfit.tune.loop import NO_PROGRESS, STOPPED, Hooks, total_steps, train
from qwenfit.tune.planned import is_out_of_memory, out_of_memory, plan_tune
from qwenfit.tune.processes import launched
from qwenfit.tune.progress import Progress, require_reporters
from qwenfit.tune.setup import Setup, prepare_folder, set_up, write_result
from qwenfit.tune.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """What a run trains on. `chatml`: whether samples are conversations; `new_tokens`: ids of ChatML's tokens.

    `digest`: of the samples, which a resumed run must share; "" where there is none.
    """

    source: BatchSource
    evaluation: BatchSource | None = None
    chatml: bool = False
    new_tokens: tuple[int, ...] = ()
    digest: str = ""


def start(
    config: TuneConfig,
    load_data: Callable[[TuneConfig, ModelConfig], Data],
    say: Say,
    ended: Callable[[int], None] = lambda code: None,
) -> int:
    """`tune`, as the verb runs it: in this process or, under torchrun, in all of them together.

    ended: called with the exit code, by rank 0, when the run is over and everything is written.
    """

    def work(world: World | None) -> int:
        code = tune(config, load_data, say, world)
        if world is None or world.rank == 0:
            ended(code)
        return code

    if not launched():
        return work(None)
    from qwenfit.tune.distributed import together

    kind = "cpu" if run_device(config.device).kind == "cpu" else "cuda"
    return together(kind, work)


def tune(
    config: TuneConfig,
    load_data: Callable[[TuneConfig, ModelConfig], Data],
    say: Say,
    world: World | None = None,
) -> int:
    """Run a finetuning from settings to result; returns 0, or 143 or 130 after a signal, with everything saved.

    world: the processes that train together; None: this one alone. Rank 0 does the talking and the writing.
    Raises what each part does: UsageError and DoesNotFit before weights are read, Diverged, DoesNotFit out of memory.
    """
    require_reporters(config)
    base = with_files(resolve(config.model), config.model)
    data = load_data(config, base)
    config, explained = choose_method(config, base, data.chatml)
    made = plan_tune(config)
    if explained:
        say(explained)
    if world is None:
        world = World("cpu" if made.hardware.device.kind == "cpu" else "cuda")
    world = world.configured(config)
    if world.rank:
        say = _silent
    if config.zero and world.size == 1:
        say(f"There is one process: ZeRO-{config.zero} has nothing to shard over, and this one holds everything.")
    found = world.found(lambda: prepare_folder(config, say), Path(config.output) / "checkpoints")
    say(_planned_text(made))
    with StopSignals() as stop:
        step = [0]
        try:
            loading = stderr_progress("loading") if world.rank == 0 else None
            setup = set_up(config, base, made.precision, world, list(data.new_tokens), found, data.digest, loading)
            if described := world.describe(setup.model, setup.optimizer):
                say(described)
            return _train(setup, data, made, stop, step, say)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(error, made, config, step[0] + 1) from None
            if checkpoint.is_disk_error(error):
                raise checkpoint.not_written(error, Path(config.output)) from error
            raise


def _train(setup: Setup, data: Data, made: Plan, stop: StopSignals, step: list[int], say: Say) -> int:
    config, state = setup.config, setup.state
    world = setup.world
    total = total_steps(config, len(data.source), world.size)
    say(f"{total:,} steps of {config.grad_accum} micro-batches, {state.step:,} of them done.")
    progress = Progress(config, made, str(setup.device), state.step) if world.rank == 0 else None

    def report(row: dict[str, object]) -> None:
        step[0] = state.step
        if progress is not None:
            progress(row)

    hooks = Hooks(report=report, save=setup.save, should_stop=lambda: stop.signal is not None, world=world)
    try:
        how = train(setup.model, setup.optimizer, data.source, data.evaluation, config, state, hooks)
    finally:
        if progress is not None:
            progress.close()
    if how == STOPPED:
        say(f"Stopped after step {state.step}, which is saved. Go on: the same command with --resume.")
        codes: list[int] = world.gather(stop.exit_code)  # one process alone may have been asked to
        return next(code for code in codes if code)
    if how == NO_PROGRESS:
        say(f"No better evaluation in {config.patience}: stopped after step {state.step}.")
    with world.whole(setup.model):
        if world.rank == 0:
            say(finish(setup))
    return 0


def _silent(text: str) -> None:
    """What processes other than rank 0 say."""


def finish(setup: Setup) -> str:
    """Put the result into the run's folder: of the best evaluation where patience chose one, else of the last step."""
    config, state = setup.config, setup.state
    output = Path(config.output)
    kind = "model" if config.method == "full" else "adapter"
    target = output / kind
    aside = output / f".{kind}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    best = state.best_step if config.patience else None
    if best is not None and best != state.step:
        _copy_result(checkpoint.folder_of(setup.checkpoints, best), aside)
    else:
        best = state.step
        write_result(aside, setup)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    words = [target] if kind == "model" else [config.model, "--adapter", target]
    next_step = shlex.join(["qwenfit", "chat", *map(str, words)])
    return f"The {kind} of step {best} is in {target}. Try it: {next_step}"


def _copy_result(source: Path, target: Path) -> None:
    """A checkpoint's files, but for those that only a resumed run reads."""
    for path in source.iterdir():
        if path.name not in ("state.json", "optimizer.safetensors", checkpoint.MANIFEST):
            shutil.copyfile(path, target / path.name)


def _planned_text(made: Plan) -> str:
    speed = made.speed
    return (
        f"Plan: {made.task.name} of {made.model.name} in {made.precision} on {made.hardware.device.name}: "
        f"{made.memory.process / 1e9:.2f} of {made.capacity / 1e9:.2f} GB ({made.verdict}), "
        f"{speed.seconds_per_iter or 0:.2f} s per step."
    )
