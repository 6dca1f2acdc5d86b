"""The command line: one function per verb, which parses, calls and prints. No logic, and nothing heavy at import."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import warnings
from typing import Any

import click

from qwenfit import __version__
from qwenfit.errors import EXTRA_OF, QwenfitError, UsageError, missing_extra

SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda word: word.replace("_", "-"),
    "auto_envvar_prefix": "QWENFIT",
}


RUNNING = ("chat", "generate", "models", "pull", "ls", "rm", "convert", "bench", "compare", "doctor")
TUNING = ("tune", "merge")


class LazyGroup(click.Group):
    """Imports the running verbs only when one of them, or the list of all, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *RUNNING, *TUNING]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in (*RUNNING, *TUNING):  # torch would tell everyone that numpy, which is not needed, is not here
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        if cmd_name in RUNNING:
            from qwenfit import cli_run

            command: click.Command = getattr(cli_run, "ls_" if cmd_name == "ls" else cmd_name)
            return command
        if cmd_name in TUNING:
            from qwenfit import cli_tune

            return {"tune": cli_tune.tune, "merge": cli_tune.merge}[cmd_name]
        return super().get_command(ctx, cmd_name)


@click.group(cls=LazyGroup, context_settings=SETTINGS)
@click.version_option(__version__)
def app() -> None:
    """Plan, run, tune and measure Qwen models on your own hardware."""


def main(arguments: list[str] | None = None) -> None:
    """Runs a verb; prints an expected failure as one sentence with a hint, and exits with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8 shows ? for what it cannot
    try:
        sys.exit(_run(sys.argv[1:] if arguments is None else arguments))
    except QwenfitError as error:
        hint = error.hint or _help_on(sys.argv[1:] if arguments is None else arguments, error)
        _fail(error.message, hint, error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path} --help" if context is not None else "qwenfit --help"
        _fail(error.format_message(), hint, 2)
    except ModuleNotFoundError as error:  # an extra that is not installed; anything else is a bug and shows itself
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        missing = missing_extra(package, EXTRA_OF[package])
        _fail(missing.message, missing.hint, missing.exit_code)
    except (MemoryError, RuntimeError) as error:
        from qwenfit.tune.planned import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        hint = "a shorter --context, a smaller --batch, --precision int4; qwenfit plan MODEL shows what each takes"
        _fail("Memory ran out: something else took what the plan had found free, or a limit lies below it.", hint, 3)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:  # `qwenfit plan | head`
        _close_output()
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _close_output()  # what could not be written may be the answer itself
        _fail(f"The disk is full: {error.filename or 'the output'} could not be written.", "df -h shows the room.", 1)


def _run(arguments: list[str]) -> int:
    """The verb's exit code. Not click's own main(), which turns a closed pipe into a failure before we see it."""
    try:
        with app.make_context("qwenfit", list(arguments)) as context:
            code = app.invoke(context)
    except click.exceptions.Exit as end:
        code = end.exit_code
    if sys.stdout is not None:  # it may be closed
        sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _close_output() -> None:
    """So that Python does not try once more, at its end, to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help_on(words: list[str], error: QwenfitError) -> str | None:
    """Where a verb's own message ends without a next step: the verb's help."""
    verb = next((word for word in words if not word.startswith("-")), None)
    return f"qwenfit {verb} --help" if isinstance(error, UsageError) and verb is not None else None


def _fail(message: str, hint: str | None, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"  try: {hint}", err=True)
    sys.exit(code)


def _colour() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@app.command()
@click.argument("model", required=False)
@click.option("--task", default="inference", help="inference, full, lora, lora-emb or qlora")
@click.option("--gpu", help="a catalog card such as 'RTX 3090', or cpu; default: this machine")
@click.option("--gpus", type=int, default=1, help="cards per node")
@click.option("--nodes", type=int, default=1)
@click.option("--network-gbps", type=float, help="between nodes, Gb/s")
@click.option("--precision", help="bf16, fp16, fp32, int8 or int4; default: the checkpoint's own")
@click.option("--stack", default="qwenfit", help="qwenfit, transformers-4.3x, transformers-5 or vllm")
@click.option("--parallel", help="layers or tensor, for inference on several cards")
@click.option("-c", "--context", type=int, help="prompt + answer; for finetuning the sample's length")
@click.option("--prompt", type=int, help="tokens of each prompt  [1]")
@click.option("--generate", type=int, help="tokens of each answer  [2048]")
@click.option("--batch", "--users", "batch", type=int, help="requests at once  [1]")
@click.option("--shared-prefix", type=int, help="tokens that all prompts begin with  [0]")
@click.option("--kv-cache", help="bf16, fp16, fp32 or int8  [bf16]")
@click.option("--head-precision", help="int8 or int4: quantize the head too (qwenfit)")
@click.option("--flash-attention/--no-flash-attention", default=None)
@click.option("--seq-len", type=int, help="tokens of a padded training sample  [1024]")
@click.option("--micro-batch", type=int, help="samples per micro-batch  [1]")
@click.option("--grad-accum", type=int, help="micro-batches per optimizer step  [8]")
@click.option("--lora-rank", type=int, help="[64]")
@click.option("--optimizer", help="fp32 (master weights), bf16 or 8bit  [fp32]")
@click.option("--checkpointing/--no-checkpointing", default=None, help="[on]")
@click.option("--fused-loss/--full-logits", default=None, help="[what the stack does]")
@click.option("--zero", type=int, help="ZeRO stage 0, 2 or 3  [what the official scripts use]")
@click.option("--host-factor", type=float, default=1.0, help="launch time of this host relative to the guide's")
@click.option("--find", type=click.Choice(["context", "batch", "seq-len", "gpu", "precision"]), help="reverse question")
@click.option("--measure-bandwidth", is_flag=True, help="measure this CPU's memory bandwidth first (about 1 s)")
@click.option("-o", "--output", type=click.Choice(["text", "md", "csv", "json"]), default="text")
@click.option("--json", "as_json", is_flag=True, help="the same as -o json")
def plan(model: str | None, find: str | None, output: str, as_json: bool, **options: Any) -> int:
    """Memory, speed and verdict of MODEL on some hardware; without MODEL, what fits there.

    \b
    qwenfit plan Qwen-7B --gpu "RTX 3090"
    qwenfit plan Qwen-72B --task qlora --gpu A100-SXM4-80GB
    qwenfit plan Qwen2.5-32B --gpu "RTX 4090" --find context
    """
    from qwenfit.planning import verbs

    form = "json" if as_json else output
    if model is None:
        if find is not None:
            raise UsageError("--find is a question about one model.", f"qwenfit plan MODEL --find {find}")
        return verbs.plan_everything(options, form, _colour(), click.echo)
    if find is not None:
        return verbs.answer(model, find, options, form, click.echo)
    return verbs.plan_one(model, options, form, _colour(), click.echo)


@app.command()
@click.option("--table", help="only this table")
@click.option("--json", "as_json", is_flag=True)
def guide(table: str | None, as_json: bool) -> None:
    """Every table of the hardware guide, cell by cell: its figure, our prediction, and whether it can be true."""
    if as_json:
        from qwenfit.guide.cells import guide_json
        from qwenfit.guide.render import cells_of

        _print_json(guide_json(cells_of(table)))
    else:
        from rich.console import Console

        from qwenfit.guide.render import print_guide

        print_guide(Console(), table)
