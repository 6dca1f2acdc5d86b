"""Converted folders in transformers: the same logits within the training length, the same token ids."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import qwen2_config, qwen2_tensors, read_model, write_model
from safetensors import safe_open
from safetensors.torch import load_file

from qwenfit.checkpoint import save, tokenizer_export
from qwenfit.checkpoint.convert import convert
from qwenfit.checkpoint.load import load_model, open_weights, state_dict
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.checkpoint.save import save_checkpoint
from qwenfit.errors import BadFile, QwenfitError, UsageError

QWEN1 = ["a_ntk_logn", "b_plain_base1e6", "c_ntk", "d_logn"]


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.inference_mode():
        return model(ids.long()[None]).logits[0]


@pytest.mark.parametrize("name", QWEN1)
def test_qwen1_gives_its_logits_in_transformers(golden, tmp_path, name):
    """Also past the training length where the model has neither dynamic NTK nor LogN."""
    report = convert(golden / "qwen1" / name, tmp_path / "out")
    reference = load_file(golden / "qwen1" / name / "prefill.safetensors")
    plain = name.startswith("b_plain")
    for prompt in ("L10", "L64", *(("L300",) if plain else ())):
        got = transformers_logits(tmp_path / "out", reference[f"{prompt}.input_ids"])
        expected = reference[f"{prompt}.logits"]
        assert (got[reference[f"{prompt}.positions"].long()] - expected).abs().max() < 1e-4, prompt
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == (512 if plain else 64)
    assert ("beyond 64 tokens" in report.text) != plain
    assert "no vocabulary beside the weights" in report.text


@pytest.mark.parametrize("name", ["a_ntk_logn", "c_ntk", "d_logn"])
def test_what_the_report_calls_not_equal_is_not(golden, tmp_path, name):
    convert(golden / "qwen1" / name, tmp_path / "out")
    reference = load_file(golden / "qwen1" / name / "prefill.safetensors")
    got = transformers_logits(tmp_path / "out", reference["L300.input_ids"])
    assert (got[reference["L300.positions"].long()] - reference["L300.logits"]).abs().max() > 0.1


def test_the_converted_folder_is_the_same_model_here(golden, tmp_path):
    source = golden / "qwen1/b_plain_base1e6"
    convert(source, tmp_path / "out")
    before, after = load_model(source)[0].state_dict(), load_model(tmp_path / "out")[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_gptq_stays_packed_and_exact(golden, tmp_path, bits):
    source = golden / "qwen1_gptq" / bits
    convert(source, tmp_path / "out")
    before, after = (open_weights(resolve_model(folder)) for folder in (source, tmp_path / "out"))
    assert after.config.architecture == "qwen2" and after.config.quantization == before.config.quantization
    for name, parameter in before.parameters.items():
        ours, theirs = before.read(parameter, torch.float32), after.read(after.parameters[name], torch.float32)
        assert torch.equal(ours, theirs), name
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.k_proj.qweight" in file.keys()  # noqa: SIM118  # not a dict
        assert "model.layers.0.self_attn.o_proj.bias" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_gptq_dequantised_gives_its_logits_in_transformers(golden, tmp_path, bits):
    source = golden / "qwen1_gptq" / bits
    report = convert(source, tmp_path / "out", dtype="float32", dequantize=True)
    reference = load_file(source / "reference.safetensors")
    got = transformers_logits(tmp_path / "out", reference["L10.input_ids"])
    assert (got[reference["L10.positions"].long()] - reference["L10.logits"]).abs().max() < 1e-4
    assert "dequantised to float32" in report.text


# The tokenizer


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory, qwen_tiktoken):
    """A tiny Qwen-1 chat model with the real vocabulary, converted."""
    golden = Path(__file__).parents[1] / "golden"
    base = tmp_path_factory.mktemp("convert")
    config, tensors = read_model(golden / "qwen1/b_plain_base1e6")
    config["vocab_size"] = 151936
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.randn(151936, 64, generator=torch.Generator().manual_seed(0))
    write_model(base / "source", config, tensors)
    (base / "source/qwen.tiktoken").write_bytes(qwen_tiktoken.read_bytes())
    (base / "source/generation_config.json").write_text(
        json.dumps({"chat_format": "chatml", "top_p": 0.8, "top_k": 0, "repetition_penalty": 1.1, "do_sample": True})
    )
    convert(base / "source", base / "out")
    return base / "out"


def test_transformers_tokenizes_as_the_original(golden, with_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer)
    rows = [json.loads(line) for line in (golden / "tokenizer/encode.jsonl").read_text().splitlines()]
    assert len(rows) == 401
    wrong = [row["text"] for row in rows if tokenizer(row["text"])["input_ids"] != row["ids"]]
    assert not wrong
    assert tokenizer.decode(rows[5]["ids"]) == rows[5].get("decoded", rows[5]["text"])
    assert tokenizer.eos_token_id == 151645 and tokenizer.pad_token_id == 151643


def test_transformers_builds_the_same_chat_prompt(golden, with_tokenizer):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer)
    compared = 0
    for prompt in json.loads((golden / "chat/chatml.json").read_text())["prompts"]:
        turns = prompt["history"] or []
        texts = [prompt["system"], prompt["query"], *(text for turn in turns for text in turn)]
        if prompt.get("turns_kept") != len(turns) or any(t.startswith("\n") or "<|" in t for t in texts):
            continue  # shortened, or what the report calls not equal
        messages = [{"role": "system", "content": prompt["system"]}]
        for query, reply in turns:
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": prompt["query"]})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == prompt["ids"], prompt["raw_text"][:80]
        compared += 1
    assert compared >= 3


def test_generation_stops_and_samples_as_before(with_tokenizer):
    generation = json.loads((with_tokenizer / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643] and generation["top_p"] == 0.8
    assert "chat_format" not in generation


def test_qwenfit_reads_the_written_tokenizer(golden, with_tokenizer):
    from qwenfit.checkpoint.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(with_tokenizer, resolve_model(with_tokenizer))
    rows = [json.loads(line) for line in (golden / "tokenizer/encode.jsonl").read_text().splitlines()]
    assert all(tokenizer.encode(row["text"], allow_special=True) == row["ids"] for row in rows)


def test_ranks_that_no_merge_explains_are_refused():
    ranks = {bytes([b]): b for b in range(256)} | {b"abcd": 256}
    with pytest.raises(BadFile, match="rank 256"):
        tokenizer_export.merges_of(ranks)


# GGUF


def write_gguf(path: Path, tensors: dict, config: dict) -> Path:
    """A GGUF of a Qwen2, written by the gguf package: embedding F16, layer linears Q8_0, the rest F32."""
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    letters = list(tokenizer_export.byte_level_alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*letters, "th", *special])
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(259)
    writer.add_chat_template(tokenizer_export.CHATML_TEMPLATE)
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32
        if "embed" in name:
            kind = gguf.GGMLQuantizationType.F16
        elif data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", qwen2_tensors(qwen2_config()), qwen2_config())


def test_gguf_becomes_a_folder_with_its_tokenizer(gguf_file, tmp_path):
    report = convert(gguf_file, tmp_path / "out", dtype="float32")
    ours = state_dict(resolve_model(gguf_file), torch.float32)
    written = state_dict(resolve_model(tmp_path / "out"), torch.float32)
    assert all(torch.equal(ours[key], written[key]) for key in ours)
    assert "dequantised to float32" in report.text
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the<|im_end|>")["input_ids"] == [256, tokenizer.convert_tokens_to_ids("e"), 259]
    ids = torch.arange(60) * 5 % 256
    ours_model, _ = load_model(gguf_file, precision="fp32")
    with torch.inference_mode():
        expected = ours_model.logits(ours_model.forward_full(ids[None]))[0]
    assert (transformers_logits(tmp_path / "out", ids) - expected).abs().max() < 1e-4


def test_gguf_weights_are_those_of_the_gguf_package(gguf_file, monkeypatch):
    """Each block of rows in its place, whatever the size of the blocks."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr("qwenfit.checkpoint.weights_gguf.BLOCK_ELEMENTS", 256 * 7)
    expected = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(gguf_file).tensors
    }
    state = state_dict(resolve_model(gguf_file), torch.float32)
    fused = torch.cat([expected[f"blk.1.attn_{part}.weight"] for part in "qkv"])
    assert torch.equal(state["layers.1.self_attn.qkv_proj.weight"], fused)
    assert torch.equal(state["layers.0.mlp.down_proj.weight"], expected["blk.0.ffn_down.weight"])
    assert torch.equal(state["embed_tokens.weight"], expected["token_embd.weight"])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gguf_rounded_again_while_loading(gguf_file, precision):
    model, _ = load_model(gguf_file, precision=precision, dtype=torch.float32)
    assert model.layers[1].mlp.down_proj.packed.bits == int(precision[-1])
    with torch.inference_mode():
        assert model.logits(model.forward_full(torch.arange(9)[None])).isfinite().all()


# Writing


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_tied", "qwen2_yarn", "qwen3_untied", "qwen3_tied"])
def test_saved_checkpoints_are_read_by_transformers(golden, tmp_path, monkeypatch, name):
    """Written in shards and read back: the same logits, and the same config."""
    monkeypatch.setattr(save, "MAX_SHARD_BYTES", 60_000)
    config = resolve_model(golden / "qwen2_qwen3" / name)
    state = state_dict(config, torch.float32)
    save_checkpoint(
        tmp_path / "out", config, lambda n, start, out: out.copy_(state[n][start : start + out.shape[0]]), "float32"
    )
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    reference = load_file(golden / "qwen2_qwen3" / name / "reference.safetensors")
    got = transformers_logits(tmp_path / "out", reference["L65.input_ids"])
    positions = reference.get("L65.positions", torch.arange(65)).long()
    assert (got[positions] - reference["L65.logits"]).abs().max() < 1e-4
    again = resolve_model(tmp_path / "out")
    fields = ("architecture", "head_dim", "rope_theta", "yarn", "rms_norm_eps", "context_length", "tie_word_embeddings")
    assert [getattr(again, f) for f in fields] == [getattr(config, f) for f in fields]
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_with_something_in_it_is_not_overwritten(golden, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        convert(golden / "qwen1/c_ntk", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_an_empty_folder_is_filled(golden, tmp_path):
    (tmp_path / "out").mkdir()
    convert(golden / "qwen1/c_ntk", tmp_path / "out")
    assert resolve_model(tmp_path / "out").architecture == "qwen2"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_convert_leaves_nothing(golden, tmp_path, failure):
    def fail(done, total):
        if done > total // 2:
            raise failure

    with pytest.raises((QwenfitError, KeyboardInterrupt)):
        convert(golden / "qwen1/c_ntk", tmp_path / "out", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_vocabulary_leaves_nothing(golden, tmp_path):
    config, tensors = read_model(golden / "qwen1/c_ntk")
    folder = write_model(tmp_path / "source", config, tensors)
    (folder / "qwen.tiktoken").write_text("not a vocabulary\n")
    with pytest.raises(BadFile):
        convert(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_disk_too_small_is_told_before_writing(golden, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(QwenfitError, match="100 free"):
        convert(golden / "qwen1/c_ntk", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounded_weights_are_reported(golden, tmp_path):
    report = convert(golden / "qwen1/c_ntk", tmp_path / "out", dtype="float16")
    assert "rounded from float32 to float16" in report.text and "but for the rounding" in report.text
    assert "but for the rounding" not in convert(golden / "qwen1/c_ntk", tmp_path / "same").text


def test_nothing_to_convert(golden, tmp_path):
    with pytest.raises(UsageError, match="layout already"):
        convert(golden / "qwen2_qwen3/qwen2_tied", tmp_path / "out")
    with pytest.raises(UsageError, match="float64"):
        convert(golden / "qwen1/c_ntk", tmp_path / "out", dtype="float64")
