"""Whether a checkpoint is a base model, and what that means when it is trained on ChatML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.config import ModelConfig
from qwenfit.tune.config import TuneConfig

CHATML = ("<|im_start|>", "<|im_end|>")
IM_END = {151645}  # of Qwen-1 to Qwen3


def is_base(config: ModelConfig) -> bool:
    """Whether a checkpoint was never trained to chat: by its generation_config.json, else by its name.

    Chat models stop at <|im_end|> (Qwen-1: say chat_format chatml); base models only at <|endoftext|>.
    """
    file = Path(config.source) / "generation_config.json"
    if file.is_file():
        table = read_json_object(file)
        if "chat_format" in table:
            return bool(table["chat_format"] != "chatml")
        stops = table.get("eos_token_id")
        if stops is not None:
            return not IM_END & set(stops if isinstance(stops, list) else [stops])
    name = config.name.lower()
    if config.architecture == "qwen3":
        return "base" in name
    return not any(word in name for word in ("chat", "instruct"))


def choose_method(config: TuneConfig, model: ModelConfig, chatml: bool) -> tuple[TuneConfig, str]:
    """(the settings with a method, one sentence that explains what was chosen; empty when nothing was).

    As the official script: a base model does not know ChatML's tokens, so that adapters alone would leave it unable
    to end an answer; its embedding and head are trained too.
    """
    base = chatml and is_base(model)
    if config.method is None:
        method = "qlora" if model.quantization is not None else "lora-emb" if base and not config.new_tokens else "lora"
        chosen = replace(config, method=method)
        if method != "lora-emb":
            return chosen, ""
        return chosen, (
            f"{model.name} is a base model and the data is ChatML, whose tokens it never learned: its embedding and "
            "head are trained too (lora-emb). --new-tokens trains only those tokens' rows; --method lora neither."
        )
    if base and config.method in ("lora", "qlora") and not config.new_tokens:
        return config, (
            f"Warning: {model.name} is a base model and never learned ChatML's tokens; with {config.method} alone it "
            "may not end its answers. --new-tokens trains those rows, --method lora-emb the whole tables."
        )
    return config, ""
