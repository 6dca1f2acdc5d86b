"""ZeRO-2 and ZeRO-3 by DeepSpeed, an optional extra, with the settings of the official finetuning scripts.

DeepSpeed shards and steps; loop, data, learning rate and checkpoints are the trainer's own. Its AdamW is torch's, so
that nothing is compiled, with float32 master weights and moments. Checkpoints hold what every run's hold: its files
are never written or read, since they are pickles.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenfit.checkpoint.load import FLOAT_PRECISIONS, Progress, load_model, open_weights
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError, missing_extra
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import head_weight, trained_parameters
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.group import Group, Root, put
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.watch import Watch
from qwenfit.tune.world import put_tables

SETTINGS = Path(__file__).with_name("deepspeed_settings.json")


def import_deepspeed(device: torch.device) -> Any:
    """The package. Raises NotFound, naming the extra, where it is not installed."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it looks for a GPU, and for tools that its kernels are built with
    try:
        import deepspeed  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise missing_extra("deepspeed", "deepspeed") from error
    # It calls collectives by names that torch gave others, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    # On the CPU it would compile an all-reduce over shared memory; gloo's does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settings_of(stage: int, model: ModelConfig, config: TuneConfig, precision: str, size: int) -> dict[str, Any]:
    """The official settings for a run: each "auto" filled as transformers does (integrations/deepspeed.py, v5.23).

    Left out: `optimizer` and `scheduler`, since AdamW and the learning rate come from `config` (their WarmupLR is
    `--schedule constant`); `fp16`, which is not trained here. Micro-batches are counted by the loop, not DeepSpeed.
    """
    settings: dict[str, Any] = json.loads(SETTINGS.read_text())[str(stage)]
    for name in ("optimizer", "scheduler", "fp16"):
        del settings[name]
    settings |= {
        "bf16": {"enabled": precision == "bf16"},
        "gradient_clipping": config.clip,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "train_batch_size": config.micro_batch * size,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, in a class of its own
    }
    zero = settings["zero_optimization"]
    filled = {
        "reduce_bucket_size": model.hidden_size**2,
        "stage3_param_persistence_threshold": 10 * model.hidden_size,
    }
    zero |= {name: value for name, value in filled.items() if zero.get(name) == "auto"}
    zero["memory_efficient_linear"] = False  # would replace torch's linear for the whole process
    return settings


class DeepSpeedShards(Group):
    """ZeRO-2: gradients and optimizer states are sharded; ZeRO-3: weights too."""

    sharded = True

    def __init__(self, device: torch.device, watch: Watch, config: TuneConfig, stage: int) -> None:
        super().__init__(device, watch)
        if config.optimizer != "fp32":
            raise UsageError(
                f"DeepSpeed keeps float32 master weights and moments, which the optimizer {config.optimizer} does not.",
                "--optimizer fp32, or leave --deepspeed out.",
            )
        self.stage, self.config = stage, config
        self.deepspeed = import_deepspeed(device)
        self.deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False)  # the group there is

    def load(
        self, source: Path | ModelConfig, precision: str, tables: dict[str, Tensor], progress: Progress | None
    ) -> Transformer:
        """ZeRO-3: each tensor is read by rank 0, sent to all and sharded before the next one is read."""
        model_config = resolve_model(source)
        self.settings = settings_of(self.stage, model_config, self.config, precision, self.size)
        if self.device.type == "cpu":
            self.settings["zero_optimization"]["overlap_comm"] = False  # there are no streams
        dtype = FLOAT_PRECISIONS[precision]
        if self.stage == 2:
            model, _ = load_model(source, precision=precision, device=self.device, progress=progress)
            put_tables(model, tables)
            return model
        weights = open_weights(model_config)
        weights.check_surplus()
        model = Transformer(model_config, dtype, "meta").eval()
        first: Any = None
        done = 0
        for parameter in weights.in_file_order():
            values = torch.empty(parameter.shape, dtype=dtype, device=self.device)
            if self.rank == 0 and parameter.module in tables:
                values.copy_(tables[parameter.module])
            elif self.rank == 0:
                weights.read_rows(parameter, 0, values)
            made: Any = nn.Parameter(values, requires_grad=False)
            if first is None:
                first = made
                self.deepspeed.zero.Init(
                    module=nn.ParameterList([made]), config_dict_or_path=self.settings, dtype=dtype
                )
            else:
                first.convert_to_zero_parameters(param_list=[made])
            put(model, parameter.name, made)
            done += weights.stored_size(parameter)
            if progress is not None:
                progress(done, weights.stored_bytes)
        return model

    def adapter_dtype(self, config: TuneConfig, precision: str) -> torch.dtype:
        """DeepSpeed's networks are of one type; the master weights are its own."""
        return FLOAT_PRECISIONS[precision]

    def prepare(self, model: Transformer) -> None:
        self.root = Root(model)
        if self.stage == 3:
            # The loss multiplies by the head's weight itself: its module is never called.
            self.deepspeed.zero.register_external_parameter(self.root, head_weight(model))

    def optimizer(self, model: Transformer, config: TuneConfig) -> AdamW:
        parameters = trained_parameters(model)
        matrices = [p for p in parameters.values() if len(getattr(p, "ds_shape", p.shape)) > 1]
        vectors = [p for p in parameters.values() if len(getattr(p, "ds_shape", p.shape)) == 1]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if group
        ]
        inner = _Guarded(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=self.device.type == "cuda",
        )
        logger = self.deepspeed.utils.logger
        level = logger.level
        logger.setLevel("ERROR")  # it warns of an optimizer class that it does not know: torch's AdamW, made to wait
        self.engine, *_ = self.deepspeed.initialize(model=self.root, optimizer=inner, config=self.settings)
        logger.setLevel(level)
        made = DeepSpeedAdamW(self.engine, inner, parameters, self.stage)
        made.assert_sharded(self.size)
        return made

    def describe(self, model: Transformer, optimizer: AdamW) -> str:
        assert isinstance(optimizer, DeepSpeedAdamW)
        total = sum(numel(p) for p in model.parameters())
        mine = sum(part(p) for p in model.parameters())
        states, trained = optimizer.held(), sum(numel(p) for p in optimizer.parameters.values())
        return (
            f"{self.size} processes with DeepSpeed's ZeRO-{self.stage}: {mine:,} of {total:,} parameters and the "
            f"optimizer's states of {states:,} of {trained:,} each."
        )

    def loss(self, model: Transformer, batch: TrainBatch, divisor: float, *, last: bool = True, **how: Any) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        # ZeRO-3 gathers weights when their modules are called, which fused blocks do not.
        loss: Tensor = self.engine(batch, divisor, how | {"fuse": self.stage != 3})
        if loss.requires_grad:
            # DeepSpeed takes the mean over processes; the loss is divided by the tokens of all of them already.
            loss.register_hook(lambda gradient: gradient * self.size)  # type: ignore[no-untyped-call]
        return loss

    def sum_gradients(self, optimizer: AdamW) -> None:
        """DeepSpeed did in the backward pass."""

    def gradient_norm(self, optimizer: AdamW) -> float:
        assert isinstance(optimizer, DeepSpeedAdamW)
        return optimizer.whole_gradient_norm()

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        """As in World; under ZeRO-2 the weights are whole everywhere."""
        sharded: dict[str, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters()) if self.stage == 3 else ():
            if parameter.requires_grad:
                with self.deepspeed.zero.GatheredParameters([parameter]):
                    full = parameter.detach().to("cpu", copy=True) if self.rank == 0 else None
                if full is not None:
                    sharded[name] = parameter
                    put(model, name, nn.Parameter(full))
        try:
            yield
        finally:
            for name, parameter in sharded.items():
                put(model, name, parameter)


class _Guarded(torch.optim.AdamW):
    """What DeepSpeed steps on its float32 partitions; `discard` lets it go through a step that changes nothing."""

    discard = False

    def step(self, closure: Any = None) -> Any:
        return None if self.discard else super().step(closure)


class DeepSpeedAdamW(AdamW):
    """DeepSpeed's optimizer as the loop sees one. Clipping is DeepSpeed's, by the same rule."""

    def __init__(self, engine: Any, inner: _Guarded, parameters: dict[str, nn.Parameter], stage: int) -> None:
        self.engine, self.inner, self.parameters, self.stage = engine, inner, parameters, stage
        self.buffers: dict[str, Tensor] = {}
        self.steps = 0
        self.fresh = True  # whether there are no gradients
        zero = engine.optimizer
        self.partitions: list[Tensor] = list(  # float32, flat: this process's part of each group
            zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        )
        for partition in self.partitions:
            step = torch.zeros((), device=partition.device if inner.defaults["fused"] else "cpu")
            inner.state[partition] = {
                "step": step,
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }

    def held(self) -> int:
        """Trained parameters whose states this process keeps, filling up to equal partitions included."""
        return sum(partition.numel() for partition in self.partitions)

    def assert_sharded(self, size: int) -> None:
        """Raises RuntimeError unless this process keeps 1 / size of weights (ZeRO-3) and states, rounded up."""
        for parameter in self.engine.module.parameters() if self.stage == 3 else ():
            if parameter.ds_tensor.ds_numel > math.ceil(parameter.ds_numel / size):
                raise RuntimeError(f"a process holds {parameter.ds_tensor.ds_numel} of {parameter.ds_numel} weights")
        trained = sum(numel(p) for p in self.parameters.values())
        spare = len(self.parameters) if self.stage == 3 else 4  # each parameter, or each of two groups, is filled up
        if self.held() > trained / size + spare:
            raise RuntimeError(f"a process holds the states of {self.held()} of {trained} parameters")

    def whole_gradient_norm(self) -> float:
        """Of the sums over all processes; infinite where any gradient is no finite number."""
        self.fresh = False
        zero = self.engine.optimizer
        if self.stage == 2:
            norms = [zero.scaled_global_norm()]
        else:
            gradients = zero.averaged_gradients
            norms = [zero.get_grad_norm_direct(gradients[i], group) for i, group in enumerate(zero.fp16_groups)]
        values = [float(norm) for norm in norms]  # -1 stands for what is no finite number
        return math.hypot(*values) if all(0 <= value < math.inf for value in values) else math.inf

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """One update; `gradient_scale` is what DeepSpeed finds itself."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.steps += 1
        self.fresh = True

    def zero(self) -> None:
        """Forget the gradients, of a step that was not taken too."""
        if not self.fresh:
            self.inner.discard = True
            self.engine.step()
            self.inner.discard = False
            self.fresh = True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for i, partition in enumerate(self.partitions):
            moments = self.inner.state[partition]
            tensors |= {f"{i}.master": partition.detach()}
            tensors |= {f"{i}.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
        layout = [partition.numel() for partition in self.partitions]
        return tensors, {"steps": self.steps, "regime": f"deepspeed ZeRO-{self.stage}", "layout": layout}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Take over a saved state. The weights were loaded already: they are the masters, rounded."""
        mine, described = self.state()
        if {**described, "steps": saved.get("steps")} != saved or mine.keys() != tensors.keys():
            raise ValueError("the optimizer's state is of other parameters or another regime")
        for name, tensor in mine.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"the optimizer's {name} has another shape or type")
            tensor.copy_(tensors[name])
        self.steps = int(saved["steps"])
        for partition in self.partitions:
            self.inner.state[partition]["step"].fill_(self.steps)


def numel(parameter: Any) -> int:
    """Elements of a parameter, which ZeRO-3 may have taken apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def part(parameter: Any) -> int:
    """Elements of a parameter that this process holds."""
    return int(parameter.ds_tensor.ds_numel if hasattr(parameter, "ds_tensor") else parameter.numel())
