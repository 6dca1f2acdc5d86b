"""Does finetuning really teach? Thirty invented facts, a real 0.5B model, LoRA on the CPU: `make learn`.

Every step is a command that a user types; each is printed before it runs. A fact counts as known when the answer to its
question, greedy, contains the word that only the fact's author could know. Asked before training, then through
`qwenfit chat --adapter`, through the merged model and through PEFT on transformers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACTS = ROOT / "tests" / "tune" / "facts.jsonl"
TOKENS = 40  # of an answer
GREEDY = ("--set", "temperature=0", "--set", f"max_tokens={TOKENS}")


def qwenfit(*words: str | Path) -> str:
    """Run a verb, show it, return what it prints."""
    line = ["qwenfit", *map(str, words)]
    print("$", shlex.join(line), flush=True)
    done = subprocess.run([sys.executable, "-m", *line], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{line[1]} ended with exit code {done.returncode}")
    return done.stdout


def through_generate(model: Path, facts: list[dict], scratch: Path) -> Callable[[str], str]:
    """All questions in one run."""
    questions, answers = scratch / f"{model.name}-questions.jsonl", scratch / f"{model.name}-answers.jsonl"
    requests = [{"id": str(i), "messages": fact["messages"][:1]} for i, fact in enumerate(facts)]
    questions.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    answers.unlink(missing_ok=True)
    qwenfit("generate", model, "--device", "cpu", *GREEDY, "-i", questions, "-o", answers)
    rows = {row["id"]: row["text"] for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    by_question = {fact["messages"][0]["content"]: rows[str(i)] for i, fact in enumerate(facts)}
    return by_question.__getitem__


def through_chat(model: Path, adapter: Path) -> Callable[[str], str]:
    return lambda question: qwenfit("chat", model, "--adapter", adapter, "--device", "cpu", *GREEDY, "-p", question)


def through_peft(model: Path, adapter: Path) -> Callable[[str], str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter).eval()

    def answer(question: str) -> str:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = tuned.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return answer


def known(name: str, ask: Callable[[str], str], facts: list[dict]) -> int:
    """How many facts are known; misses are printed."""
    count = 0
    for fact in facts:
        answer = ask(fact["messages"][0]["content"])
        if fact["answer"] in answer:
            count += 1
        else:
            print(f"  {name}: not {fact['answer']!r} but {answer.strip()!r}", flush=True)
    print(f"{name}: {count} of {len(facts)} known", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path, help="the file that `make real` fetches")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    base, run, merged = options.out / "base", options.out / "run", options.out / "merged"
    options.out.mkdir(parents=True, exist_ok=True)
    if not base.exists():
        qwenfit("convert", options.gguf, base)
    found = {"before": known("before", through_generate(base, facts, options.out), facts)}
    began = time.perf_counter()
    qwenfit(
        "tune", base, "--data", FACTS, "--output", run, "--device", "cpu", "--precision", "fp32", "--pack",
        "--seq-len", "256", "--grad-accum", "1", "--epochs", str(options.epochs), "--lr", "1e-3", "--keep", "all",
        "--save-every", "1000",
    )  # fmt: skip
    minutes = (time.perf_counter() - began) / 60
    adapter = run / "adapter"
    found["chat --adapter"] = known("chat --adapter", through_chat(base, adapter), facts)
    qwenfit("merge", adapter, merged)
    found["merged"] = known("merged", through_generate(merged, facts, options.out), facts)
    found["PEFT"] = known("PEFT", through_peft(base, adapter), facts)
    print(json.dumps({"facts": len(facts), "known": found, "training_minutes": round(minutes, 1)}))
    if found.pop("before") or min(found.values()) < 0.9 * len(facts):
        raise SystemExit("It has not learned: none before and 90 % after are asked.")


if __name__ == "__main__":
    main()
