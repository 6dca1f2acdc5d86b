"""Everything that a run needs, made in order from its settings: network, what is trained, optimizer, state."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwenfit.checkpoint.save import plain_entries, write_weights
from qwenfit.config import ModelConfig
from qwenfit.errors import QwenfitError, UsageError
from qwenfit.model.transformer import Transformer
from qwenfit.tune import checkpoint
from qwenfit.tune.adapters import LoRA, add_lora, freeze, train_rows, train_tables
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.fingerprint import FIELD, fingerprint
from qwenfit.tune.model_folder import write_model_files
from qwenfit.tune.offload import park_embedding
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.peft_format import read_adapter, restore, write_adapter
from qwenfit.tune.state import State, random_states, read_state, restore_optimizer, set_random_states, write_state
from qwenfit.tune.world import World


@dataclass
class Setup:
    """A run that is ready to train."""

    config: TuneConfig
    model: Transformer
    base: ModelConfig  # of the model on disk
    optimizer: AdamW
    state: State
    precision: str
    world: World
    data: str = ""  # digest of what is trained on
    base_weights: dict[str, Any] = field(default_factory=dict)  # the base's fingerprint, where adapters are trained

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.output) / "checkpoints"

    def save(self, state: State) -> None:
        """A checkpoint that `--resume` continues from; for adapters it is an adapter folder too."""

        optimizer = self.world.optimizer_states(self.optimizer)
        generators = self.world.gather(random_states(self.device))

        def write(folder: Path) -> None:
            write_result(folder, self)
            write_state(folder, state, optimizer, self.config, generators, self.data)

        with self.world.whole(self.model):
            if self.world.rank == 0:
                checkpoint.save(
                    self.checkpoints,
                    state.step,
                    write,
                    keep_last=self.config.keep_last,
                    protect=state.best_step,
                    versions={"torch": str(torch.__version__)},
                )


def prepare_folder(config: TuneConfig, say: Callable[[str], None]) -> Path | None:
    """Make or check the run's folder, before weights are read; the checkpoint to go on from, or None.

    Raises UsageError when a run is there and `resume` was not asked for, QwenfitError when nothing can be written.
    """
    output = Path(config.output)
    root = output / "checkpoints"
    if checkpoint.checkpoints(root) and not config.resume:
        raise UsageError(f"{output} holds a run already.", "Add --resume to go on with it, or name another --output.")
    result = output / ("model" if config.method == "full" else "adapter")
    if result.exists() and not checkpoint.checkpoints(root):
        raise UsageError(f"{result} is there already, and the run's result would replace it.", "Name another --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise QwenfitError(
            f"Nothing can be written to {output}: {error.strerror}.", "Name another folder: --output"
        ) from error
    if not config.resume:
        return None
    found, wrong = checkpoint.newest(root)
    for line in wrong:
        say(line)
    say(
        f"Resuming from {found.name}." if found is not None else "There is no checkpoint to resume from: starting anew."
    )
    return found


def set_up(
    config: TuneConfig,
    base: ModelConfig,
    precision: str,
    world: World,
    new_tokens: list[int],
    found: Path | None,
    data: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Setup:
    """Load the network, freeze or adapt it, make the optimizer, and take over checkpoint `found`.

    world: as `World.configured` gives it. data: the digest of what is trained on.
    """
    seed(config.seed)
    # Settings are compared before weights are read.
    state, table = read_state(found, config, world.size, data) if found is not None else (State(), {})
    source = found if found is not None and config.method == "full" else base
    adapter = read_adapter(found, base) if found is not None and config.method != "full" else None
    model = world.load(source, precision, {} if adapter is None else adapter.tables, progress)
    lora = lora_of(config)
    trained = world.adapter_dtype(config, precision)
    if config.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        freeze(model)
        add_lora(model, lora, trained)
        if config.method == "lora-emb":
            train_tables(model)
        if config.new_tokens:
            train_rows(model, new_tokens, trained)
        if adapter is not None:
            restore(model, adapter)
        if world.size == 1 and not world.sharded:
            park_embedding(model)
    world.prepare(model)
    optimizer = world.optimizer(model, config)
    if found is not None:
        restore_optimizer(found, table, optimizer, world.rank)
        set_random_states(table["random"][world.rank], world.device)
    elif world.rank:  # dropout differs between processes; what was drawn above did not
        seed(config.seed + 1_000_003 * world.rank)
    known = fingerprint(base) if config.method != "full" and world.rank == 0 else {}
    setup = Setup(config, model, base, optimizer, state, precision, world, data, known)
    _check_room(setup)
    return setup


def lora_of(config: TuneConfig) -> LoRA:
    return LoRA(config.lora_rank, config.lora_alpha, config.lora_dropout)


def seed(value: int) -> None:
    """Every generator that training draws from."""
    random.seed(value)
    torch.manual_seed(value)


def _check_room(setup: Setup) -> None:
    """Raises QwenfitError when the disk cannot take the checkpoints that a run keeps, and one being written."""
    each = sum(p.nbytes for p in setup.optimizer.parameters.values())
    if setup.config.method == "full":
        each = sum(p.nbytes for p in setup.model.parameters())
    parts = setup.world.size if setup.world.sharded else 1
    each += parts * sum(t.nbytes for t in setup.optimizer.state()[0].values())
    present = len(checkpoint.checkpoints(setup.checkpoints))
    needed = each * max(1, setup.config.keep_last + 1 - present)
    free = shutil.disk_usage(setup.config.output).free
    if needed > free:
        raise QwenfitError(
            f"Checkpoints take {each / 1e9:.2f} GB each, {needed / 1e9:.2f} GB more are needed for "
            f"{setup.config.keep_last} and one being written; {setup.config.output} has {free / 1e9:.2f} GB free.",
            "Make room, name another --output, or lower --keep-last.",
        )


def write_result(folder: Path, setup: Setup) -> None:
    """The trained adapter in PEFT's format, or the whole trained model, into an existing folder."""
    config = setup.config
    if config.method != "full":
        record: dict[str, Any] = {"precision": setup.precision, "settings": config.fingerprint()}
        record[FIELD] = setup.base_weights
        write_adapter(folder, setup.model, lora_of(config), config.model, record)
        return
    dtype = "float32" if setup.precision == "fp32" else "bfloat16"
    parameters = dict(setup.model.named_parameters())

    def read_rows(name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(parameters[name].detach()[start : start + out.shape[0]])

    layout = write_model_files(setup.base, dtype, folder)
    write_weights(folder, plain_entries(setup.base, dtype, read_rows, layout))
