"""Chat templates of models: untrusted Jinja, rendered in a process of its own under limits of time, memory and size."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenfit.errors import BadFile, UsageError, missing_extra

SANDBOX = Path(__file__).with_name("sandbox.py")
WALL_SECONDS = 10.0  # for a request; the sandbox ends itself after 2 seconds of work, so this is for a stalled machine
MAX_INPUT_BYTES = 32 << 20  # messages and tools as JSON
MAX_ANSWER_BYTES = 256 << 20  # 16 Mi characters, each escaped
# What Python needs to start and to tell the time. Nothing else of the environment (keys, tokens) reaches a template.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "USERPROFILE", "SYSTEMROOT", "TZ")


class ChatTemplate:
    """A chat template; its process starts with the first render and ends with this object. Safe to share by threads."""

    def __init__(self, source: str, special: Sequence[str], variables: Mapping[str, str] | None = None) -> None:
        """`special`: texts of the special tokens. `variables`: texts the template may name, such as eos_token."""
        self.source = source
        self._setup = {"source": source, "special": list(special), "variables": dict(variables or {})}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[str]:
        """The prompt as [text, special token, text, ..., text].

        Only special tokens that the template itself writes are told apart; the same characters in a message are part of
        the text. Raises UsageError when the template refuses these messages, BadFile when it is broken or exceeds a
        limit (2 s of work, 1 GiB, 16 Mi characters).
        """
        if "chat_template" in kwargs or any(name.startswith("_") for name in kwargs):
            raise UsageError("A request may not bring a chat template or names that start with an underscore.")
        values = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt, **kwargs}
        try:
            line = json.dumps(values).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"The messages are not plain JSON ({str(error)[:120]}).") from None
        if len(line) > MAX_INPUT_BYTES:
            raise UsageError(f"The messages have {len(line):,} bytes as JSON, more than {MAX_INPUT_BYTES:,}.")
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._ask(line)

    def _start(self) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise missing_extra("jinja2", "run")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._ask(json.dumps(self._setup).encode() + b"\n")

    def _ask(self, line: bytes) -> list[str]:
        """One request, one answer. The process is gone after anything but an answer to this request."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(WALL_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(MAX_ANSWER_BYTES)
        except BrokenPipeError:
            pass
        finally:  # also on Ctrl-C: an answer that comes later must not be taken for the next one's
            watchdog.cancel()
            if not answer.endswith(b"\n"):
                self._end()
        if not answer.endswith(b"\n"):
            raise _died(process.returncode)
        reply = json.loads(answer)
        if "refused" in reply:
            raise UsageError(f"The chat template cannot take these messages: {_one_line(reply['refused'])}.")
        if "faulty" in reply:
            self._end()  # and what the failed render left behind goes with it
            raise BadFile(f"The chat template {_one_line(reply['faulty'])}.")
        pieces: list[str] = reply["pieces"]
        return pieces


def _died(returncode: int) -> BadFile:
    if returncode == -getattr(signal, "SIGPROF", 0):
        return BadFile("The chat template worked longer than 2 seconds and was stopped.")
    if returncode == -getattr(signal, "SIGKILL", 0):
        return BadFile("The chat template gave no answer within 10 seconds, or memory ran out, and it was stopped.")
    return BadFile("The chat template crashed the process that renders it.")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # half a request was still to be written
                pipe.close()


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 200 else text[:200] + "..."
