"""config.json: real ones of every generation, and every way in which one can be wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from header_files import only_expected, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit import catalog
from qwenfit.checkpoint.config_json import config_from_dict, read_config_json
from qwenfit.config import Quantization, YarnScaling
from qwenfit.errors import BadFile, NotFound, UsageError

# undefdev/Qwen-7B-Chat@26fad65 config.json, the first release of August 2023
QWEN_7B_AUGUST_2023: dict[str, Any] = {
    "activation": "swiglu", "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "bf16": False, "fp16": False, "fp32": False, "ffn_hidden_size": 22016, "kv_channels": 128,
    "layer_norm_epsilon": 1e-05, "model_type": "qwen", "n_embd": 4096, "n_head": 32, "n_layer": 32, "n_positions": 6144,
    "no_bias": True, "onnx_safe": None, "padded_vocab_size": 151936, "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary", "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
    "tie_word_embeddings": False, "vocab_size": 151936, "use_dynamic_ntk": True, "use_logn_attn": True,
}  # fmt: skip
# mapengAdam/qianwen-72B@3334bfe config.json, a release candidate of November 2023
QWEN_72B: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "bf16": True, "fp16": False, "fp32": False, "hidden_size": 8192,
    "intermediate_size": 49152, "kv_channels": 128, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 8192,
    "model_type": "qwen", "no_bias": True, "num_attention_heads": 64, "num_hidden_layers": 80, "rope_theta": 1000000,
    "padded_vocab_size": 152064, "rotary_emb_base": 1000000, "rotary_pct": 1.0, "seq_length": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_dynamic_ntk": False, "use_logn_attn": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "sliding_window": 32768, "vocab_size": 151936, "hidden_act": "silu",
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "attention_bias": False,
    "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "vocab_size": 151936,
    "layer_types": ["full_attention"] * 28,
}  # fmt: skip


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with keys replaced, or removed where the change is `...`."""
    return {key: value for key, value in (base | changes).items() if value is not ...}


def test_qwen1_in_its_first_key_style() -> None:
    config = config_from_dict(QWEN_7B_AUGUST_2023, "Qwen-7B-Chat")
    published = catalog.get_model("Qwen-7B")
    assert config.parameters == published.parameters == 7_721_324_544
    assert (config.intermediate_size, config.head_dim, config.rms_norm_eps) == (11008, 128, 1e-5)
    assert (config.training_length, config.context_length) == (2048, 6144)  # not yet the 32k release
    assert config.use_dynamic_ntk and config.use_logn_attn and config.dtype == "bfloat16"


def test_qwen1_in_its_released_key_style() -> None:
    config = config_from_dict(QWEN_72B, "Qwen-72B")
    assert config.parameters == 72_287_920_128
    assert (config.intermediate_size, config.rope_theta, config.context_length) == (24576, 1e6, 8192)


def test_qwen_7b_is_published_for_32768_whatever_its_config_prints() -> None:
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
             "ffn_hidden_size": "intermediate_size", "n_positions": "max_position_embeddings"}  # fmt: skip
    released = {names.get(key, key): value for key, value in QWEN_7B_AUGUST_2023.items()}
    released |= {"seq_length": 8192, "max_position_embeddings": 8192}
    assert config_from_dict(released, "q").context_length == 32768
    assert config_from_dict(released | {"use_dynamic_ntk": False}, "q").context_length == 8192


def test_qwen2_and_qwen3_are_the_catalogs() -> None:
    for table, name in ((QWEN2, "Qwen2.5-0.5B"), (QWEN3, "Qwen3-0.6B")):
        published = catalog.get_model(name)
        config = config_from_dict(table, published.name, published.source)
        assert config == published


def test_missing_optional_keys_take_the_defaults_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen2Config, Qwen3Config

    for table, defaults in ((QWEN2, Qwen2Config()), (QWEN3, Qwen3Config())):
        bare = changed(
            table, rms_norm_eps=..., rope_theta=..., rope_parameters=..., tie_word_embeddings=..., head_dim=...
        )
        config = config_from_dict(bare, "q")
        assert config.rms_norm_eps == defaults.rms_norm_eps
        assert config.rope_theta == defaults.rope_parameters["rope_theta"]
        assert config.tie_word_embeddings == defaults.tie_word_embeddings
        assert config.head_dim == getattr(defaults, "head_dim", config.hidden_size // config.num_heads)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": YARN | {"type": "yarn"}},
        {"rope_scaling": YARN | {"rope_type": "yarn"}},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"rope_theta": ..., "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e6}},
    ],
)
def test_yarn_is_read_in_every_spelling(changes: dict[str, Any]) -> None:
    config = config_from_dict(changed(QWEN2, **changes), "q")
    assert config.yarn == YarnScaling(4.0, 32768) and config.rope_theta == 1e6
    assert (config.context_length, config.training_length) == (131072, 32768)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
            Quantization("gptq", 4),
        ),
        ({"bits": 8, "group_size": -1, "desc_act": True, "sym": False}, Quantization("gptq", 8, -1, True, False)),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
            Quantization("gptq", 4, 32, checkpoint_format="gptq_v2"),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
            Quantization("awq", 4, 128, sym=False),
        ),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False}, Quantization("awq", 4, 64)),
    ],
)
def test_quantization_config(section: dict[str, Any], expected: Quantization) -> None:
    assert config_from_dict(changed(QWEN2, quantization_config=section), "q").quantization == expected


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": changed({"quant_method": "gptq", "bits": 4, "group_size": 128}, **changes)}


@pytest.mark.parametrize(
    ("base", "changes", "kind", "word"),
    [
        (QWEN2, {"model_type": "qwen2_moe"}, UsageError, "'qwen2_moe'"),
        (QWEN2, {"model_type": "qwen3_moe"}, UsageError, "'qwen3_moe'"),
        (QWEN2, {"model_type": "qwen2_5_vl"}, UsageError, "'qwen2_5_vl'"),
        (QWEN2, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, UsageError, "'llama'"),
        (QWEN2, {"model_type": ..., "architectures": ["GPT2LMHeadModel"]}, BadFile, "neither a model_type"),
        (QWEN2, {"architectures": ["Qwen2ForRewardModel"]}, UsageError, "'Qwen2ForRewardModel'"),
        (QWEN2, {"architectures": "Qwen2ForCausalLM"}, BadFile, "list of names"),
        (QWEN2, {"model_type": 2}, BadFile, "model_type"),
        (QWEN2, {"num_experts": 60}, UsageError, "mixture of experts"),
        (QWEN_72B, {"visual": {"layers": 48}}, UsageError, "vision-language"),
        (QWEN2, {"use_sliding_window": True}, UsageError, "use_sliding_window"),
        (QWEN3, {"layer_types": ["sliding_attention"]}, UsageError, "layer_types"),
        (QWEN3, {"attention_bias": True}, UsageError, "attention_bias"),
        (QWEN2, {"hidden_act": "gelu"}, UsageError, "'gelu'"),
        (QWEN2, {"torch_dtype": "float64"}, UsageError, "'float64'"),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, UsageError, "'linear'"),
        (QWEN2, {"rope_scaling": YARN | {"type": "yarn", "mscale": 1}}, UsageError, "mscale"),
        (QWEN2, {"rope_scaling": YARN | {"type": "yarn", "factor": float("inf")}}, BadFile, "factor"),
        (QWEN2, {"rope_scaling": {"type": "yarn"}}, BadFile, "no factor"),
        (QWEN2, {"rope_scaling": [4]}, BadFile, "not an object"),
        (QWEN_72B, {"no_bias": False}, UsageError, "no_bias"),
        (QWEN_72B, {"rotary_pct": 0.5}, UsageError, "rotary_pct"),
        (QWEN_72B, {"seq_length_expansion": 2}, UsageError, "seq_length_expansion"),
        (QWEN_72B, {"seq_length": ...}, BadFile, "no seq_length"),
        (QWEN_72B, {"intermediate_size": 49151}, BadFile, "odd intermediate_size"),
        (QWEN_72B, {"kv_channels": 64}, BadFile, "do not make up"),
        (QWEN_72B, {"use_dynamic_ntk": "yes"}, BadFile, "neither true nor false"),
        *[
            (QWEN2, {key: ...}, BadFile, f"no {key}")
            for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        ],
        (QWEN2, {"hidden_size": None}, BadFile, "no hidden_size"),
        (QWEN2, {"hidden_size": "896"}, BadFile, "not an integer: '896'"),
        (QWEN2, {"hidden_size": 896.0}, BadFile, "not an integer"),
        (QWEN2, {"num_hidden_layers": True}, BadFile, "not an integer: 'True'"),
        (QWEN2, {"hidden_size": -896}, BadFile, "-896, which is not between"),
        (QWEN2, {"hidden_size": 0}, BadFile, "not between"),
        (QWEN2, {"hidden_size": 10**7}, BadFile, "not between"),
        (QWEN2, {"num_hidden_layers": 10**30}, BadFile, "many digits"),
        (QWEN2, {"num_hidden_layers": 10**5000}, BadFile, "many digits"),
        (QWEN2, {"rms_norm_eps": 10**5000}, BadFile, "too long to print"),
        (QWEN2, {"max_position_embeddings": -1}, BadFile, "not between"),
        (QWEN2, {"num_attention_heads": 15}, BadFile, "do not divide"),
        (QWEN2, {"num_key_value_heads": 3}, BadFile, "no multiple of its 3 KV heads"),
        (QWEN2, {"num_key_value_heads": 28}, BadFile, "no multiple"),
        (QWEN2, {"head_dim": 63}, BadFile, "odd head size"),
        (QWEN3, {"head_dim": 65536, "num_attention_heads": 100_000}, BadFile, "wider than"),
        (QWEN2, {"rms_norm_eps": float("nan")}, BadFile, "'nan'"),
        (QWEN2, {"rms_norm_eps": -1e-6}, BadFile, "not between"),
        (QWEN2, {"rms_norm_eps": "1e-6"}, BadFile, "not a number"),
        (QWEN2, {"rope_theta": float("inf")}, BadFile, "'inf'"),
        (QWEN2, {"tie_word_embeddings": 1}, BadFile, "neither true nor false"),
        (QWEN2, {"quantization_config": "gptq"}, BadFile, "not an object"),
        (QWEN2, gptq(quant_method="fp8"), UsageError, "'fp8'"),
        (QWEN2, gptq(quant_method="bitsandbytes"), UsageError, "'bitsandbytes'"),
        (QWEN2, gptq(bits=3), UsageError, "3 bits"),
        (QWEN2, gptq(bits=...), BadFile, "no bits"),
        (QWEN2, gptq(group_size=0), BadFile, "group_size of 0"),
        (QWEN2, gptq(group_size=-2), BadFile, "group_size"),
        (QWEN2, gptq(desc_act=1), BadFile, "desc_act"),
        (QWEN2, gptq(lm_head=True), UsageError, "lm_head"),
        (QWEN2, gptq(dynamic={"-:lm_head": {}}), UsageError, "dynamic"),
        (QWEN2, gptq(checkpoint_format="marlin"), UsageError, "'marlin'"),
        (QWEN2, gptq(quant_method="awq", version="gemv"), UsageError, "'gemv'"),
        (QWEN2, gptq(quant_method="awq", bits=8), UsageError, "8 bits"),
    ],
)
def test_what_cannot_be_or_is_not_handled_is_refused(base: Any, changes: dict[str, Any], kind: type, word: str) -> None:
    refused(kind, word, lambda: config_from_dict(changed(base, **changes), "some/model"))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON or is cut short"),
        (json.dumps(QWEN2).encode()[:-20], "not JSON or is cut short"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b'"qwen"', "not a JSON object"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b'{"rms_norm_eps": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "twice"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 100_000 + b"}", "too many digits"),
        (b'{"a": [' + b"0," * 200_000 + b"0]}", "more than 160,000 JSON values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refused(BadFile, word, lambda: read_config_json(path))
    only_expected(lambda: read_config_json(path))


def test_a_config_of_one_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    refused(BadFile, "1,073,741,824 bytes", lambda: read_config_json(path))
    only_expected(lambda: read_config_json(path))


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    refused(NotFound, "no file", lambda: read_config_json(tmp_path / "gone.json"))
    refused(NotFound, "no file", lambda: read_config_json(tmp_path / "gone" / "config.json"))
    refused(BadFile, "directory", lambda: read_config_json(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    refused(BadFile, "not a regular file", lambda: read_config_json(tmp_path / "pipe"))
    (tmp_path / "circle").symlink_to("circle")
    refused(BadFile, "cannot be read", lambda: read_config_json(tmp_path / "circle"))
    refused(BadFile, "cannot be read", lambda: read_config_json(tmp_path / ("x" * 300)))
    refused(BadFile, "cannot be read", lambda: read_config_json(tmp_path / "zero\0byte"))


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # root, who may run this test, reads everything
    refused(BadFile, "Permission denied", lambda: read_config_json(tmp_path / "config.json"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=8
)
KEYS = sorted({*QWEN_7B_AUGUST_2023, *QWEN_72B, *QWEN2, *QWEN3, "quantization_config", "rope_scaling", "num_experts"})
SECTION = st.dictionaries(
    st.sampled_from(["quant_method", "bits", "group_size", "rope_type", "type", "factor", "rope_theta", "version"]),
    st.sampled_from(["gptq", "awq", "yarn", "default", 4, 128]) | SCALARS,
)


@settings(max_examples=400, deadline=1000)
@given(
    base=st.sampled_from([QWEN_7B_AUGUST_2023, QWEN_72B, QWEN2, QWEN3]),
    lies=st.dictionaries(st.sampled_from(KEYS), JSON | SECTION, max_size=5),
    name=st.text(max_size=20),
)
def test_fuzz_configs_that_lie(base: dict[str, Any], lies: dict[str, Any], name: str) -> None:
    only_expected(lambda: config_from_dict(base | lies, name))


@settings(max_examples=150, deadline=1000)
@given(content=st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_fuzz_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    only_expected(lambda: config_from_dict(read_config_json(path), "fuzz"))
