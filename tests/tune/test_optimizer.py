"""AdamW against torch's, its smaller states against float32, and its schedule against transformers'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwenfit.tune import optimizer as module
from qwenfit.tune.optimizer import AdamW, Moment8, learning_rate_factor, round_stochastically


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 33), "b": (5,), "c": (64, 40), "d": (3, 3)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        value = torch.randn(p.shape, generator=generator).to(p.dtype)
        (p * value).sum().backward()


@pytest.mark.parametrize("group", [50, 1 << 24], ids=["cut into groups", "one group"])
def test_float32_updates_are_torchs(monkeypatch, group):
    monkeypatch.setattr(module, "GROUP_ELEMENTS", group)
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, moments=torch.float32, weight_decay=0.1)
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95))
    for step in range(10):
        for params in (ours, theirs):
            give_gradients(params, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        torch.testing.assert_close(mine.gradient_norm(), norm)
        mine.step(1e-2, min(1.0, 1.0 / (float(norm) + 1e-6)))
        reference.step()
        mine.zero()
        reference.zero_grad()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_gradients_of_16_bit_weights_add_up_in_float32():
    params = {"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))}
    optimizer = AdamW(params)
    for _ in range(300):  # in bfloat16 the sum of ones stops at 256
        params["w"].sum().backward()
    assert params["w"].grad is None
    assert (optimizer.gradient("w") == 300).all()


@pytest.mark.parametrize("regime", ["fp32", "bf16", "8bit"])
def test_narrow_regimes_travel_as_far_as_float32(regime):
    """Weights near 1 and steps of 1e-3, a quarter of bfloat16's spacing there: rounded to nearest, none would move."""
    dtype = torch.bfloat16
    exact, narrow = parameters(), parameters(dtype)
    for name in exact:
        exact[name].data.copy_(narrow[name].data)
    start = {name: p.detach().clone() for name, p in exact.items()}
    optimizers = AdamW(exact, moments=torch.float32), AdamW(narrow, regime)
    for step in range(200):
        for params, optimizer in zip((exact, narrow), optimizers, strict=True):
            give_gradients(params, step // 20)
            optimizer.step(1e-3)
            optimizer.zero()
    way, went = (torch.cat([(p[n] - start[n]).detach().flatten() for n in start]) for p in (exact, narrow))
    assert (went @ way / way.square().sum()).item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("signed", [True, False])
def test_an_8_bit_moment_keeps_small_values_beside_large_ones(signed):
    values = torch.logspace(-4, 0, 1000) * (torch.randn(1000).sign() if signed else 1)
    moment = Moment8(1000, signed, torch.device("cpu"))
    moment.store(values, torch.Generator().manual_seed(0))
    error = (moment.load() - values).abs() / values.abs()
    large = values.abs() > 0.01
    assert error[large].max() < 0.12
    assert moment.load().shape == values.shape
    if not signed:
        assert (moment.load() > 0).all()


def test_a_gradient_that_was_never_there_leaves_8_bit_moments_finite():
    params = {"w": nn.Parameter(torch.ones(2, 300))}
    optimizer = AdamW(params, "8bit", weight_decay=0.0)
    optimizer.step(1e-2)
    assert torch.equal(params["w"], torch.ones(2, 300))


def test_stochastic_rounding_is_right_on_average_and_the_same_again():
    value = torch.full((100_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    first, again, other = (round_stochastically(value, torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.tolist()) == {1.0, 1.0 + 2**-7}
    assert float(first.double().mean()) == pytest.approx(1.0 + 2**-10, abs=3e-5)


@pytest.mark.parametrize(
    ("regime", "dtype"),
    [("fp32", torch.float32), ("fp32", torch.bfloat16), ("8bit", torch.bfloat16), ("bf16", torch.bfloat16)],
)
def test_a_restored_optimizer_goes_on_exactly(regime, dtype):
    straight = parameters(dtype)
    optimizer = AdamW(straight, regime)
    for step in range(3):
        give_gradients(straight, step)
        optimizer.step(1e-2)
        optimizer.zero()
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    other = AdamW(resumed, regime)
    tensors, described = optimizer.state()
    other.restore({name: t.clone() for name, t in tensors.items()}, described)
    for params, adam in ((straight, optimizer), (resumed, other)):
        give_gradients(params, 9)
        adam.step(1e-2)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ValueError):
        AdamW({"a": resumed["a"]}, regime).restore(tensors, described)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedules_are_transformers(warmup):
    transformers = pytest.importorskip("transformers")
    for name, make in (
        ("cosine", lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, 20)),
        ("constant", lambda o: transformers.get_constant_schedule_with_warmup(o, warmup)),
    ):
        sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = make(sgd)
        for step in range(20):
            assert learning_rate_factor(step, 20, warmup, name) == pytest.approx(schedule.get_last_lr()[0])
            sgd.step()
            schedule.step()
