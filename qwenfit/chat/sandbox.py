"""The process that renders one chat template, so that a hostile template can be stopped whatever it does.

It runs as a script of its own (`template.py` starts it), reads one JSON request a line from stdin and answers each with
one line on stdout. The first request holds the template. Nothing of qwenfit is imported here: only the standard library
and jinja2, with which it starts in about a tenth of a second.

Control tokens. A rendered prompt mixes the template's own `<|im_start|>` with whatever users typed. Only the template's
literals are trusted: before the template is compiled, each special token in them gets a mark with an unguessable number
in it; after rendering, what carries the mark is a special token and all else is text. User text is never changed, so
the template's own logic on it (split, startswith, length) sees exactly what was sent.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor

CPU_SECONDS = 2.0  # of compiling or rendering once
MEMORY_BYTES = 1 << 30  # address space of this process
MAX_OUTPUT_CHARS = 16 << 20


class Refused(Exception):
    """The template will not take these messages: the caller's fault."""


class Faulty(Exception):
    """The template itself is broken or exceeds a limit."""


class TrustedText(str):
    """A literal of the template that holds special tokens.

    To the template's logic it is the plain text; what is put into the prompt is `_marked`.
    """

    _marked: str

    def __new__(cls, plain: str, marked: str | None = None) -> TrustedText:
        self = super().__new__(cls, plain)
        self._marked = plain if marked is None else marked  # without a mark: plain text, the safe side
        return self

    def __str__(self) -> str:
        return self._marked

    def __add__(self, other: str) -> TrustedText:
        if not isinstance(other, str):
            return NotImplemented
        return TrustedText(_plain(self) + _plain(other), self._marked + str(other))

    def __radd__(self, other: str) -> TrustedText:
        if not isinstance(other, str):
            return NotImplemented
        return TrustedText(_plain(other) + _plain(self), str(other) + self._marked)

    def __mod__(self, values: Any) -> str:
        return str(self._marked % values)

    def strip(self, chars: str | None = None) -> TrustedText:
        return TrustedText(_plain(self).strip(chars), self._marked.strip(chars))

    def lstrip(self, chars: str | None = None) -> TrustedText:
        return TrustedText(_plain(self).lstrip(chars), self._marked.lstrip(chars))

    def rstrip(self, chars: str | None = None) -> TrustedText:
        return TrustedText(_plain(self).rstrip(chars), self._marked.rstrip(chars))


def _plain(text: str) -> str:
    return str.__str__(text)


class Marker(visitor.NodeTransformer):
    """Marks the special tokens in a template's literals, and takes the marks out of what it rendered."""

    def __init__(self, special: list[str], environment: jinja2.Environment) -> None:
        self.special = sorted(special, key=len, reverse=True)
        self.environment = environment
        self.find = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self.secret = secrets.token_hex(16)
        self.marks = re.compile(f"\U0010fffd{self.secret}:(\\d+)\U0010fffd")
        self.numbers = {text: i for i, text in enumerate(self.special)}
        self.literals = 0

    def mark(self, text: str) -> str:
        return self.find.sub(lambda match: f"\U0010fffd{self.secret}:{self.numbers[match[0]]}\U0010fffd", text)

    def trusted(self, text: str) -> str:
        return TrustedText(text, self.mark(text)) if self.find.search(text) else text

    def pieces(self, rendered: str) -> list[str]:
        """[text, special token, text, ..., text]"""
        parts = self.marks.split(rendered)
        if any(self.secret in text for text in parts[::2]):
            raise Faulty("cuts its own special tokens apart")
        return [self.special[int(part)] if i % 2 else part for i, part in enumerate(parts)]

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self.mark(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        """A text literal with special tokens becomes an attribute of the environment: source code cannot spell it."""
        if not isinstance(node.value, str) or not self.find.search(node.value):
            return node
        name = f"trusted_literal_{self.literals}"
        self.literals += 1
        setattr(self.environment, name, self.trusted(node.value))
        return nodes.EnvironmentAttribute(name, lineno=node.lineno)


class Generation(ext.Extension):
    """`{% generation %}` marks the assistant's own words for training; rendering a prompt just passes through it."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Template:
    """A compiled chat template, with what transformers offers to templates (utils/chat_template_utils.py)."""

    def __init__(self, source: str, special: list[str], variables: dict[str, str]) -> None:
        self.environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        self.environment.filters["tojson"] = _tojson
        self.environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.marker = Marker(special, self.environment)
        self.variables = {name: self.marker.trusted(text) for name, text in variables.items()}
        tree = self.environment.parse(source)
        if next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None) is not None:
            raise Faulty("asks for other templates, and there are none")
        tree = self.marker.visit(tree)
        code = self.environment.compile(tree)
        self.template = jinja2.Template.from_code(self.environment, code, self.environment.make_globals(None))

    def render(self, values: dict[str, Any]) -> list[str]:
        """[text, special token, text, ..., text]"""
        rendered, chars = [], 0
        for chunk in self.template.generate({**self.variables, **values}):
            chars += len(chunk)
            if chars > MAX_OUTPUT_CHARS:
                raise Faulty(f"made a prompt of more than {MAX_OUTPUT_CHARS:,} characters")
            rendered.append(chunk)
        pieces = self.marker.pieces("".join(rendered))
        self._check_assembled(pieces, values)
        return pieces

    def _check_assembled(self, pieces: list[str], values: dict[str, Any]) -> None:
        """A special token in the text that no input holds was put together from parts, which nothing can vouch for."""
        found = {token for piece in pieces[::2] for token in self.marker.find.findall(piece)}
        if found and (made := [token for token in found if not any(token in text for text in _texts(values))]):
            raise Faulty(f"puts {made[0]} together from parts, so that it cannot be told from text that users typed")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without jinja2's escaping for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def limit_process() -> None:
    """Cap memory and forbid writing files; only POSIX has these limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(ImportError):
        import resource

        limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
        for kind, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
                resource.setrlimit(kind, (limit, limit))


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """SIGPROF ends the process after CPU_SECONDS of work, also inside C code; on Windows the parent's clock does."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    limit_process()
    template: Template | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            with limited_time():
                if template is None:
                    template = Template(**request)
                    answer = {"pieces": []}
                else:
                    answer = {"pieces": template.render(request)}
        except (Refused, jinja2.UndefinedError, TypeError, ValueError, AttributeError, LookupError) as error:
            answer = {"refused": str(error)}
        except Faulty as error:
            answer = {"faulty": str(error)}
        except jinja2.TemplateSyntaxError as error:
            answer = {"faulty": f"is not valid Jinja at line {error.lineno}: {error.message}"}
        except jinja2.TemplateError as error:
            answer = {"faulty": f"cannot be rendered: {error}"}
        except (RecursionError, SyntaxError):
            answer = {"faulty": "nests or calls itself too deeply"}
        except MemoryError:
            answer = {"faulty": f"needs more than {MEMORY_BYTES >> 20} MiB"}
        except (ArithmeticError, RuntimeError, OSError) as error:
            answer = {"faulty": f"cannot be rendered: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
