"""Where a run stands, and everything else that it needs to go on bit for bit: saved and restored without pickle."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.errors import BadFile, UsageError
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.optimizer import AdamW

STATE_NAME, OPTIMIZER_NAME = "state.json", "optimizer.safetensors"


@dataclass
class State:
    """Counts since the run began. The learning rate and the data's order follow from `step` and `position`."""

    step: int = 0  # optimizer steps
    position: int = 0  # micro-batches taken from the source, over all epochs
    tokens: int = 0  # trained tokens
    bad_steps: int = 0  # in a row, up to now
    best_loss: float | None = None  # of the evaluations
    best_step: int | None = None
    stale: int = 0  # evaluations since the best one


def write_state(
    folder: Path,
    state: State,
    optimizer: tuple[dict[str, Tensor], list[dict[str, Any]]],
    config: TuneConfig,
    random_states: list[dict[str, Any]],
    data: str = "",
) -> None:
    """state.json and optimizer.safetensors into an existing folder; optimizer as `World.optimizer_states` gives it.

    random_states: of every process. data: digest of what is trained on.
    """
    tensors, described = optimizer
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / OPTIMIZER_NAME)
    table = {
        "state": asdict(state),
        "optimizer": described,
        "settings": config.fingerprint(),
        "random": random_states,
        "data": data,
    }
    (folder / STATE_NAME).write_text(json.dumps(table) + "\n")


def read_state(folder: Path, config: TuneConfig, size: int = 1, data: str = "") -> tuple[State, dict[str, Any]]:
    """(where the run of `size` processes stood, the whole table).

    Raises UsageError when the run had other settings, other data or another number of processes, BadFile.
    """
    table = read_json_object(folder / STATE_NAME, limit=1 << 26, max_values=10**7)
    settings, mine = table.get("settings"), config.fingerprint()
    if not isinstance(settings, dict):
        raise BadFile(f"{folder / STATE_NAME} is no state of a run.")
    for name, value in mine.items():
        if settings.get(name) != value:
            raise UsageError(
                f"The run in {folder.parent} had {name} = {settings.get(name)!r}, and now it is {value!r}.",
                "Resume with the settings it had, or start anew in another --output.",
            )
    if table.get("data", "") != data:
        raise UsageError(
            f"The data has changed since the run in {folder.parent} began: its samples are not the same.",
            "Resume with the data it had, or start anew in another --output.",
        )
    try:
        if len(table["random"]) != size:
            raise UsageError(
                f"The run in {folder.parent} was one of {len(table['random'])} processes, and now there are {size}.",
                f"torchrun --nproc-per-node {len(table['random'])} -m qwenfit tune ... --resume",
            )
        return State(**table["state"]), table
    except (KeyError, TypeError) as error:
        raise BadFile(f"{folder / STATE_NAME} is no state of a run.") from error


def restore_optimizer(folder: Path, table: dict[str, Any], optimizer: AdamW, rank: int = 0) -> None:
    """Take over the state of process `rank`, or of all processes when they are copies."""
    try:
        rank = min(rank, len(table["optimizer"]) - 1)
        with safe_open(folder / OPTIMIZER_NAME, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{rank}.")]  # noqa: SIM118
            tensors = {name.partition(".")[2]: file.get_tensor(name) for name in names}
        optimizer.restore(tensors, table["optimizer"][rank])
    except (KeyError, ValueError) as error:
        raise BadFile(f"{folder / OPTIMIZER_NAME} cannot be used: {error}.") from error


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training draws from, as JSON values."""
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": _text(torch.get_rng_state())}
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
