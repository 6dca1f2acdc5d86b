from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, random

pytest.importorskip("triton")
from qwenfit.engine.sampler import draw_sorted
from qwenfit.kernels.triton.top_k import draw_top_k, draw_top_k_reference

MOST = 64
WIDTH, VOCAB = 5000, 4990  # three parts, of which the last is not full; some rows of the head are no tokens


def knobs(*rows: tuple[float, float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE).T.contiguous()


def logits(rows: int, spread: float = 4.0) -> torch.Tensor:
    x = random(rows, WIDTH) * spread
    x[:, VOCAB:] = 1e3  # never chosen, whatever stands there
    return x


@pytest.mark.parametrize(
    "knob",
    [(1, 20, 0.8, 0), (0.7, 64, 0.95, 0), (1.5, 5, 1, 0.1), (1, 1, 1, 0), (2, 33, 0.5, 0.02), (0.1, 2, 0.999, 0)],
)
def test_every_part_of_the_distribution_is_drawn_as_by_sorting(knob: tuple[float, float, float, float]) -> None:
    numbers = [0.0, 0.1, 0.37, 0.5, 0.81, 0.93, 1 - 2.0**-52]
    x = logits(1).expand(len(numbers), -1).contiguous()
    given = knobs(*((*knob, u) for u in numbers))
    got = draw_top_k(x, VOCAB, given, int(knob[1]))
    assert got.tolist() == draw_top_k_reference(x, VOCAB, given).tolist()
    scaled = (x[:, :VOCAB] - x[:, :VOCAB].amax(-1, keepdim=True)) / knob[0]
    temperature, top_k, top_p, min_p, u = given
    del temperature
    assert got.tolist() == draw_sorted(scaled, u, top_k.float(), top_p.float(), min_p.float()).tolist()


def test_rows_have_knobs_of_their_own() -> None:
    x = logits(5)
    given = knobs(
        (1, 1, 1, 0, 0.9), (1, 50, 1, 0, 0.99), (0.5, 7, 0.3, 0, 0.5), (3, 20, 0.9, 0.3, 0.7), (1, 2, 1, 0, 0.6)
    )
    got = draw_top_k(x, VOCAB, given, 50)
    assert got.tolist() == draw_top_k_reference(x, VOCAB, given).tolist()
    assert got[0] == x[0, :VOCAB].argmax()


def test_of_equals_the_first_comes_first() -> None:
    x = torch.zeros(3, WIDTH, device=DEVICE)
    given = knobs((1, MOST, 1, 0, 0.0), (1, MOST, 1, 0, 0.5), (1, MOST, 1, 0, 0.999))
    assert draw_top_k(x, VOCAB, given, MOST).tolist() == [0, 32, 63]


def test_the_two_zeros_are_equal() -> None:
    x = torch.full((1, WIDTH), -3.0, device=DEVICE)
    x[0, 20], x[0, 10] = 0.0, -0.0
    assert draw_top_k(x, VOCAB, knobs((1, 1, 1, 0, 0.0)), 1).tolist() == [10]


def test_banned_tokens_and_broken_rows() -> None:
    x = logits(4)
    best = x[0, :VOCAB].argmax()
    banned = torch.zeros(VOCAB, dtype=torch.uint8, device=DEVICE)
    banned[best] = 1
    x[1, 3], x[2, 4000] = torch.nan, torch.inf
    x[3, VOCAB:] = torch.nan  # beyond the vocabulary
    given = knobs(*[(1.0, 1.0, 1.0, 0.0, 0.0)] * 4)
    got = draw_top_k(x, VOCAB, given, 1, banned)
    assert got.tolist() == draw_top_k_reference(x, VOCAB, given, banned).tolist()
    assert got[0] != best and got[1] == got[2] == -1 and got[3] >= 0


def test_negative_and_huge_logits_keep_their_order() -> None:
    x = -logits(1).abs() - 1e30
    x[0, 17], x[0, 18], x[0, 19] = 3e37, 2e37, -3e37
    given = knobs((1e36, 3, 1, 0, 0.0), (1e36, 3, 1, 0, 0.99995), (1e38, 3, 1, 0, 0.9))
    rows = x.expand(3, -1).contiguous()
    assert draw_top_k(rows, VOCAB, given, 3).tolist() == draw_top_k_reference(rows, VOCAB, given).tolist()
