"""Whether the other processes of a run are alive: a dead or failed one ends the rest, by name, instead of a hang.

The processes talk through torchrun's store, over connections of their own, so that a stuck GPU does not matter.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

BEAT_SECONDS = 0.5
SILENT_SECONDS = 20.0  # without a beat a process counts as dead
SILENT_AFTER_ERROR = 3.0  # the same, when a collective has already failed
PATIENCE = timedelta(minutes=30)  # for what another process is to say: rank 0 may be reading data meanwhile
FAILED = "failed"
RESUME = "the same command with --resume"


class Watch:
    """Beats for this process and listens to the others, in a thread that ends the process when one of them is gone."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.silent = SILENT_SECONDS
        self.exchanged = 0
        self.done = threading.Event()
        self.store = _connect()
        self.thread = threading.Thread(target=self._run, args=(_connect(),), daemon=True)
        self.thread.start()

    def exchange(self, value: Any) -> list[Any]:
        """A JSON value of every rank, in order. All ranks exchange equally often."""
        self.exchanged += 1
        key = f"exchange-{self.exchanged}"
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.size)]

    def fail(self, reason: str, hint: str = RESUME) -> None:
        """Tell the others that this process ends, and let them hear it; the first to say so is the one they name.

        hint: what to type, "" for nothing.
        """
        self.done.set()
        with suppress(Exception):
            self.store.compare_set(FAILED, "", json.dumps([self.rank, reason, hint]))
            time.sleep(3 * BEAT_SECONDS)

    def close(self) -> None:
        """This process ends well: from now on its silence means nothing."""
        self.done.set()
        self.thread.join()
        with suppress(Exception):  # the process that holds the store may have ended before
            self.store.set(f"beat/{self.rank}", "end")

    def blame(self) -> None:
        """After a collective failed: wait until it is known whose end was the cause, which ends this process too."""
        self.silent = SILENT_AFTER_ERROR
        time.sleep(SILENT_AFTER_ERROR + 4 * BEAT_SECONDS)

    def _run(self, store: Store) -> None:
        heard = {rank: ("", time.monotonic()) for rank in range(self.size)}
        number = 0
        while not self.done.wait(BEAT_SECONDS):
            number += 1
            try:
                store.set(f"beat/{self.rank}", str(number))
                reason, hint = self._failure(store, heard)
            except Exception as error:  # torch has no one class for it
                hint = RESUME
                reason = f"The store of the run cannot be reached ({_line(error)}): rank 0's host or torchrun is gone"
            if reason and not self.done.is_set():
                print(f"error: {reason}. Rank {self.rank} ends too.", file=sys.stderr, flush=True)
                if hint:
                    print(f"  try: {hint}", file=sys.stderr, flush=True)
                os._exit(1)

    def _failure(self, store: Store, heard: dict[int, tuple[str, float]]) -> tuple[str, str]:
        """A sentence about the first process found dead or failed, empty when all is well; and what to type then."""
        if store.check([FAILED]):
            rank, reason, hint = json.loads(store.get(FAILED))
            if rank != self.rank:
                return f"Rank {rank} failed: {reason.rstrip('.')}", hint
        now = time.monotonic()
        for rank, (last, since) in heard.items():
            beat = store.get(f"beat/{rank}").decode() if store.check([f"beat/{rank}"]) else ""
            if beat != last:
                heard[rank] = (beat, now)
            elif beat != "end" and now - since > self.silent and rank != self.rank:
                silent = f"Rank {rank} has been silent for {now - since:.0f} s"
                return f"{silent}: its process was killed or its host is gone", RESUME
        return "", ""


def _connect() -> Store:
    """A connection of its own to the store that the processes met at."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    return PrefixStore(f"qwenfit-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
