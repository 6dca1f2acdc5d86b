"""Slots of the host's memory: taken as they are needed, by threads where it is pinned for a GPU (a stand-in)."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from qwenfit.engine import host_memory
from qwenfit.engine.host_memory import HostMemory

MIB = 1 << 20


class Driver:
    """Pins `most` pieces at most, one at a time."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.pinned, self.busy = most, {}, False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert not self.busy and address % 4096 == 0
        self.busy = True
        time.sleep(0.001)
        self.busy = False
        if len(self.pinned) == self.most:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.pinned[address]


def memory(monkeypatch, driver: Driver, slots: int, slot: int = 8 * MIB) -> HostMemory:
    monkeypatch.setattr(host_memory, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return HostMemory([(torch.Size([slot]), torch.uint8)], slots * slot, torch.device("cuda"))


def wait(made: HostMemory) -> None:
    for thread in made._threads:
        thread.join()


def test_threads_pin_what_is_wanted_and_no_more(monkeypatch):
    driver = Driver()
    made = memory(monkeypatch, driver, slots=41)
    made.keep_free(9)
    wait(made)
    assert sorted(made.free) == list(range(10)) and len(driver.pinned) == 5  # two to a piece of 16 MiB
    slots = made.take(10)
    assert made.take(1) is None
    made.keep_free(1000)
    wait(made)
    assert made.size == made.most == 41 and sorted([*slots, *made.free]) == list(range(41))
    assert set(driver.pinned.values()) == {16 * MIB} and len(driver.pinned) == 21
    addresses = {part.data_ptr() for slot in range(41) for part in made.at(slot)}
    assert len(addresses) == 41
    made.close()
    assert not driver.pinned and made.most == 0
    made.keep_free(5)
    assert not driver.pinned


def test_it_makes_do_with_what_the_driver_pins(monkeypatch):
    driver = Driver(most=3)
    made = memory(monkeypatch, driver, slots=40)
    made.keep_free(40)
    wait(made)
    assert made.size == made.most == len(made.free) == 6
    made.keep_free(40)
    wait(made)
    assert made.size == 6


def test_no_more_than_some_are_free_ahead(monkeypatch):
    monkeypatch.setattr(host_memory, "_AHEAD", 64 * MIB)
    made = memory(monkeypatch, Driver(), slots=100)
    made.keep_free(100)
    wait(made)
    assert made.size == 8
    made.take(5)
    made.keep_free(100)
    wait(made)
    assert made.size == 14


def test_a_thread_that_cannot_start_costs_nothing_else(monkeypatch):
    made = memory(monkeypatch, Driver(), slots=10)

    def start(thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(host_memory.threading.Thread, "start", start)
    made.keep_free(10)
    assert (made.most, made.free) == (0, [])
    made.keep_free(10)
    made.close()


@pytest.mark.parametrize("slot", [1, 5000, 20 * MIB])
def test_without_a_gpu_it_is_there_at_once(slot):
    made = HostMemory([(torch.Size([slot]), torch.uint8), (torch.Size([3]), torch.float32)], 7 * (slot + 12))
    made.keep_free(5)
    assert made.most == 7 and made.size >= 5
    assert [tuple(part.shape) for part in made.at(4)] == [(slot,), (3,)]
