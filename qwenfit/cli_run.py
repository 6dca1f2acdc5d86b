"""The command line's running verbs: chat, generate, the model cache, convert, bench, doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qwenfit.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


def run_options(command: Command) -> Command:
    """The options that every verb with an engine shares."""
    for option in reversed(
        (
            click.argument("model"),
            click.option("--precision", help="bf16, fp16, fp32, int8 or int4; default: the checkpoint's own"),
            click.option("--head-precision", type=click.Choice(["int8", "int4"]), help="quantize the head too"),
            click.option("--adapter", help="a LoRA folder in PEFT's format, such as qwenfit tune writes"),
            click.option("--kv-cache", help="bf16, fp16, fp32 or int8"),
            click.option("-c", "--context", type=int, help="tokens of prompt + answer  [4096, or fewer]"),
            click.option("--device", help="cpu or cuda; default: the GPU with the most free memory, else the CPU"),
            click.option("--threads", type=int, help="CPU threads  [all that may be used]"),
            click.option("--force", is_flag=True, help="load although the plan says it does not fit"),
        )
    ):
        command = option(command)
    return command


def make_options(batch: int = 1, **given: Any) -> Any:
    """RunOptions from the shared options; sets up the CPU's threads before torch starts them."""
    from qwenfit.run.planned import RunOptions

    threads = given.pop("threads")
    if given["device"] != "cuda":
        from qwenfit.kernels.threads import available_processors, configure_threads

        most = len(available_processors())
        if threads is not None and not 1 <= threads <= most:
            raise UsageError(f"threads lies between 1 and {most}, the processors here; {threads} does not.")
        configure_threads(threads)
    return RunOptions(batch=batch, **given)


def sampling_from(items: tuple[str, ...]) -> dict[str, Any]:
    """`--set NAME=VALUE` options as SamplingParams fields; values are JSON, or text."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {item!r}.", "--set temperature=0.7")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@click.command()
@run_options
@click.option("-p", "--prompt", help="answer this one prompt and leave")
@click.option("-s", "--system", help="the system message")
@click.option("--set", "settings", multiple=True, help="a sampling parameter, NAME=VALUE; may be repeated")
@click.option("--stats", is_flag=True, help="print speed and memory after a one-shot answer, on stderr")
@click.option("--json", "as_json", is_flag=True, help="a one-shot answer with its figures, as JSON")
def chat(
    prompt: str | None, system: str | None, settings: tuple[str, ...], stats: bool, as_json: bool, **given: Any
) -> int:
    """Talk to MODEL: a conversation, one prompt (-p), or what comes through a pipe.

    \b
    qwenfit chat Qwen/Qwen2.5-7B-Instruct --precision int4
    echo "What is a GPU?" | qwenfit chat ./model.gguf
    """
    from qwenfit.run import chat as verb
    from qwenfit.run.planned import load_planned, stderr_progress

    talk = verb.Conversation(system=system, sampling=sampling_from(settings))
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UsageError("The prompt is empty.", 'qwenfit chat MODEL -p "..."')
    if prompt is None and as_json:
        raise UsageError("--json is for one answer, not for a conversation.", 'qwenfit chat MODEL --json -p "..."')
    options = make_options(**given)
    verb.check_sampling(talk.sampling)
    llm, made = load_planned(options, stderr_progress("loading"))
    if prompt is None:
        verb.converse(llm, made, talk, verb.terminal_reader(), verb.write_now)
        return 0
    whole = verb.one_shot(llm, talk, prompt, (lambda _: None) if as_json else verb.write_now)
    if as_json:
        click.echo(json.dumps(verb.answer_figures(llm, made, talk), indent=2, ensure_ascii=False))
    if stats:
        click.echo(verb.stats_text(llm, made, talk), err=True)
    return 0 if whole else 130


@click.command()
@run_options
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="prompts, jsonl")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="answers, jsonl")
@click.option("--batch", type=int, default=8, help="requests at once  [8]")
@click.option("--set", "settings", multiple=True, help="a sampling parameter, NAME=VALUE; may be repeated")
@click.option("--json", "as_json", is_flag=True, help="what was done, as JSON on stdout")
def generate(source: Path, target: Path, batch: int, settings: tuple[str, ...], as_json: bool, **given: Any) -> int:
    """Answer a file of prompts; a run that was interrupted goes on where it stopped."""
    from dataclasses import replace

    from qwenfit.run import generate as verb
    from qwenfit.run.chat import check_sampling
    from qwenfit.run.planned import load_planned, stderr_progress

    jobs = verb.read_jobs(source)  # a bad line is named before the weights are read
    verb.finished_ids(target)
    sampling = sampling_from(settings)
    options = make_options(batch, **given)
    check_sampling(sampling)
    llm, _ = load_planned(options, stderr_progress("loading"))
    base = replace(llm.default_params, **sampling)
    with verb.progress_bar() as progress:
        now, before = verb.generate_file(llm, jobs, target, base, progress)
    if as_json:
        click.echo(json.dumps({"answered": now, "before": before, "output": str(target)}))
    else:
        click.echo(f"{now} answered, {before} were there before: {target}", err=True)
    return 0


@click.command()
@click.option("--json", "as_json", is_flag=True)
def models(as_json: bool) -> None:
    """Every model that qwenfit knows by name."""
    from qwenfit.run.models import known_models

    rows = known_models()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        size, kv = f"{row['parameters'] / 1e9:.2f}B", row["kv_bytes_per_token_bf16"] // 1024
        click.echo(
            f"{row['model']:<14}{size:>8}  {row['layers']} layers  context {row['context']:>6,}  {kv} KiB per token"
        )


@click.command()
@click.argument("model")
@click.option("--from", "source", default="huggingface", help="huggingface or modelscope")
@click.option("--revision")
@click.option("--file", "files", multiple=True, metavar="PATTERN", help="only such files; may be repeated")
@click.option("--json", "as_json", is_flag=True)
def pull(model: str, source: str, revision: str | None, files: tuple[str, ...], as_json: bool) -> None:
    """Download a model into the ecosystem's cache; prints what to name to run it.

    \b
    qwenfit pull Qwen-7B-Chat-Int4
    qwenfit pull Qwen/Qwen2.5-7B-Instruct-GGUF --file "*q4_k_m*.gguf"
    """
    from qwenfit.run.models import pull as fetch

    path = fetch(model, source, revision, files or None)
    click.echo(json.dumps({"model": model, "path": path}) if as_json else path)


@click.command("ls")
@click.option("--json", "as_json", is_flag=True)
def ls_(as_json: bool) -> None:
    """Models in the cache, largest first."""
    from dataclasses import asdict

    from qwenfit.run.models import cached_models

    found = cached_models()
    if as_json:
        click.echo(json.dumps([asdict(m) for m in found], indent=2))
        return
    for model in found:
        click.echo(f"{model.nbytes / 1e9:>9.2f} GB  {model.id}  {model.path}")
    if not found:
        click.echo("The cache has no models. qwenfit pull MODEL downloads one.")


@click.command()
@click.argument("model")
@click.option("-y", "--yes", is_flag=True, help="do not ask")
@click.option("--json", "as_json", is_flag=True)
def rm(model: str, yes: bool, as_json: bool) -> None:
    """Delete a model from the cache."""
    from qwenfit.run.models import find_cached, remove

    found = find_cached(model)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("rm asks before it deletes, and there is no terminal to ask on.", f"qwenfit rm {model} -y")
        click.confirm(f"Delete {found.id}, {found.nbytes / 1e9:.2f} GB, from the cache?", abort=True, err=as_json)
    freed = remove(model)
    click.echo(json.dumps({"model": found.id, "freed_bytes": freed}) if as_json else f"{freed / 1e9:.2f} GB freed")


@click.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="of plain weights  [as stored]")
@click.option("--dequantize", is_flag=True, help="GPTQ or AWQ layers to plain weights; else they stay packed")
@click.option("--json", "as_json", is_flag=True)
def convert(source: str, target: Path, dtype: str | None, dequantize: bool, as_json: bool) -> None:
    """Write SOURCE (a Qwen-1 checkpoint or a GGUF) as a folder in the Qwen2 layout at TARGET.

    transformers 5, vLLM, SGLang and llama.cpp can serve the result. llama.cpp's converter wants GPTQ dequantised.

    \b
    qwenfit convert ./Qwen-7B-Chat ./qwen-7b-chat-qwen2
    qwenfit convert ./Qwen-7B-Chat-Int4 ./qwen-7b-chat-16bit --dequantize
    qwenfit convert ./model.gguf ./model-safetensors --dtype float16
    """
    from dataclasses import asdict

    from qwenfit.checkpoint.convert import convert as run
    from qwenfit.run.planned import stderr_progress

    report = run(source, target, dtype=dtype, dequantize=dequantize, progress=stderr_progress("converting"))
    click.echo(json.dumps(asdict(report), default=str, indent=2, ensure_ascii=False) if as_json else report.text)


@click.command()
@click.argument("kind", type=click.Choice(["decode", "prefill", "perplexity", "demo", "guide", "tune"]))
@click.argument("model", required=False)
@click.option("--precision")
@click.option("--head-precision", type=click.Choice(["int8", "int4"]))
@click.option("--kv-cache")
@click.option("--device")
@click.option("--threads", type=int)
@click.option("--random-weights/--real-weights", default=True, help="of MODEL's shape, or its own  [random]")
@click.option("--prompt", type=int, help="tokens of each prompt")
@click.option("--generate", type=int, help="tokens of each answer")
@click.option("--batch", type=int, default=1)
@click.option("--repeat", type=int, default=3)
@click.option("--text", type=click.Path(path_type=Path), help="perplexity: of this file, with MODEL's weights")
@click.option("--tokens", type=int, default=4096, help="perplexity: of so many tokens  [4096]")
@click.option("--tolerance", type=float, help="exit 6 when a planned figure is off by more than this share")
@click.option("--record", type=click.Path(path_type=Path), default=Path("measurements"), help="folder of the record")
@click.option("--no-record", is_flag=True)
@click.option("--profile", is_flag=True, help="where the time of one decode step goes")
@click.option("--out", type=click.Path(path_type=Path), help="guide: the page  [docs/measured.md]")
@click.option("--seconds-per-row", type=float, help="guide: cut longer runs short  [no limit]")
@click.option("--deadline", type=float, help="guide: start no run after so many seconds  [no limit]")
@click.option("--method", type=click.Choice(["full", "lora", "lora-emb", "qlora"]), help="tune: the method  [lora]")
@click.option("--seq-len", type=int, help="tune: tokens of a sample  [1024]")
@click.option("--grad-accum", type=int, help="tune: micro-batches of an iteration  [8]")
@click.option("--optimizer", type=click.Choice(["fp32", "bf16", "8bit"]), help="tune: as `qwenfit tune`  [fp32]")
@click.option("--keep", type=click.Choice(["inputs", "attention", "all"]), help="tune: as `qwenfit tune`  [inputs]")
@click.option("--table", is_flag=True, help="tune: a table of cells instead of one")
@click.option("--peers", is_flag=True, help="tune: transformers, PEFT and Liger, where installed, on the same cells")
@click.option("--json", "as_json", is_flag=True)
def bench(kind: str, model: str | None, **given: Any) -> int:
    """Plan and measure MODEL on this machine: decoding, prompts, or the perplexity of a text; `demo` picks the model,
    and `guide` runs every row of the guide's inference tables that fits this GPU.

    \b
    qwenfit bench decode Qwen-1.8B --precision int4
    qwenfit bench prefill Qwen2.5-0.5B --prompt 512
    qwenfit bench perplexity ./model.gguf --precision int8 --text FILE
    qwenfit bench guide --seconds-per-row 8
    qwenfit bench tune Qwen-7B --method lora --seq-len 1024
    """
    tuning = {name: given.pop(name) for name in ("method", "seq_len", "grad_accum", "optimizer", "keep")}
    more = {name: given.pop(name) for name in ("table", "peers")}
    if kind == "tune":
        from qwenfit.bench.tune_table import bench_tune

        shared = {name: given[name] for name in ("precision", "device", "tolerance", "record", "no_record", "as_json")}
        return bench_tune(model, click.echo, steps=given["repeat"], **shared, **tuning, **more)
    if any(tuning.values()) or any(more.values()):
        raise UsageError("--method and the options after it belong to `bench tune`.", "qwenfit bench tune --table")
    page = {name: given.pop(name) for name in ("out", "seconds_per_row", "deadline")}
    if kind == "guide":
        if given["as_json"]:
            raise UsageError("bench guide tells how far it is; its record is the JSON.", "--record FOLDER, no --json")
        from qwenfit.bench.guide_verb import bench_guide

        return bench_guide(model, click.echo, record=given["record"], **page)
    if any(value is not None for value in page.values()):
        raise UsageError("--out, --seconds-per-row and --deadline belong to `bench guide`.", "qwenfit bench guide")
    from qwenfit.bench.verb import run_bench

    return run_bench(kind, model, make_options, click.echo, **given)


@click.command()
@click.argument("model")
@click.option("--precision")
@click.option("--head-precision", type=click.Choice(["int8", "int4"]))
@click.option("--kv-cache")
@click.option("--device")
@click.option("--threads", type=int)
@click.option("--random-weights/--real-weights", default=None, help="[real for a folder or a .gguf, else random]")
@click.option("--prompt", type=int, default=128, help="tokens of each prompt  [128]")
@click.option("--generate", type=int, default=64, help="tokens of each answer  [64]")
@click.option("--batch", type=int, default=1)
@click.option("--rounds", type=int, default=3, help="how often each one runs, in turn  [3]")
@click.option("--record", type=click.Path(path_type=Path), default=Path("measurements"), help="folder of the record")
@click.option("--no-record", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def compare(model: str, **given: Any) -> int:
    """MODEL as planned, as measured, and by transformers and llama.cpp where they are installed, side by side.

    transformers gets the same weights, in 16 or 32 bits; llama.cpp takes part where MODEL is a .gguf.

    \b
    qwenfit compare Qwen2.5-0.5B --precision int8
    qwenfit compare ./model.gguf --precision int4
    """
    from qwenfit.bench.compare import run_compare

    return run_compare(model, make_options, click.echo, **given)


@click.command()
@click.argument("model", required=False)
@click.option("--network", "links", is_flag=True, help="measure the link between the processes of a torchrun")
@click.option("--json", "as_json", is_flag=True)
def doctor(model: str | None, links: bool, as_json: bool) -> int:
    """Versions, devices, which kernels run here and why, and what is missing.

    With --network: bandwidth between processes, and whether ZeRO-3 of MODEL [Qwen-7B] over it makes sense.
    """
    from dataclasses import asdict

    if links:
        from qwenfit.run.network import network

        return network(model, as_json, click.echo)
    if model is not None:
        raise UsageError("doctor asks for a model only with --network.", f"qwenfit doctor {model} --network")
    from qwenfit.run.doctor import examine, report

    checks = examine()
    click.echo(json.dumps([asdict(c) for c in checks], indent=2) if as_json else report(checks))
    return 0
