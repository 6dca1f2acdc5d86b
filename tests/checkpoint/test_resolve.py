"""A ModelConfig from anything a user names."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from header_files import QWEN2_GGUF, QWEN2_GGUF_TENSORS, gguf_bytes, refused

from qwenfit import catalog
from qwenfit.checkpoint import hub
from qwenfit.checkpoint.headers_safetensors import read_safetensors_header
from qwenfit.checkpoint.resolve import resolve_model, weight_bytes
from qwenfit.config import Quantization, checkpoint_tensors
from qwenfit.errors import BadFile, NotFound, UsageError

GOLDEN_MODELS = [
    *(f"qwen1/{name}" for name in ("a_ntk_logn", "b_plain_base1e6", "c_ntk", "d_logn")),
    *(f"qwen1_gptq/{name}" for name in ("int4", "int8")),
    *(f"qwen2_qwen3/{name}" for name in ("qwen2_tied", "qwen2_untied", "qwen2_yarn", "qwen3_tied", "qwen3_untied")),
]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_computed_bytes_are_the_stored_bytes(golden: Path, name: str) -> None:
    config = resolve_model(golden / name)
    header = read_safetensors_header(golden / name / "model.safetensors")
    assert weight_bytes(config) == sum(tensor.nbytes for tensor in header.tensors.values())
    assert weight_bytes(replace(config, tensors=None)) == weight_bytes(config)
    computed = sorted((t.shape, t.dtype, t.nbytes) for t in checkpoint_tensors(config, config.dtype))
    assert computed == sorted((t.shape, t.dtype, t.nbytes) for t in config.tensors or ())


def test_the_config_of_a_folder_says_what_its_config_json_says(golden: Path) -> None:
    config = resolve_model(str(golden / "qwen1/a_ntk_logn") + "/")
    assert (config.name, config.architecture, config.head_dim, config.intermediate_size) == (
        "a_ntk_logn",
        "qwen1",
        16,
        128,
    )
    assert (config.training_length, config.context_length, config.use_dynamic_ntk) == (64, 512, True)
    assert resolve_model(golden / "qwen1/a_ntk_logn/config.json") == config
    assert resolve_model(golden / "qwen2_qwen3/qwen2_yarn").context_length == 4 * 48
    assert resolve_model(golden / "qwen1_gptq/int8").quantization == Quantization("gptq", 8)
    assert resolve_model(config) is config


def test_catalog_names() -> None:
    assert weight_bytes(resolve_model("Qwen-72B")) == 144_575_840_256
    assert resolve_model("Qwen/Qwen-1_8B-Chat") == catalog.get_model("Qwen-1.8B")
    for name in catalog.dense_model_names():
        assert resolve_model(name) == resolve_model(f"Qwen/{name}") == catalog.get_model(name)


@pytest.mark.parametrize(
    ("name", "model", "quantization"),
    [
        ("Qwen/Qwen-7B-Chat-Int4", "Qwen-7B", Quantization("gptq", 4)),
        ("Qwen-1_8B-Chat-Int8", "Qwen-1.8B", Quantization("gptq", 8)),
        ("Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen2.5-7B", Quantization("gptq", 8)),
        ("qwen/qwen2.5-72b-instruct-gptq-int4", "Qwen2.5-72B", Quantization("gptq", 4)),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B", Quantization("awq", 4, sym=False)),
    ],
)
def test_names_of_quantized_models(name: str, model: str, quantization: Quantization) -> None:
    config = resolve_model(name)
    assert config.quantization == quantization and config.dtype == "float16"
    assert replace(config, name=model, quantization=None, dtype="bfloat16") == catalog.get_model(model)
    assert weight_bytes(config) < weight_bytes(catalog.get_model(model))


@pytest.mark.parametrize(
    ("spec", "kind", "word"),
    [
        ("", UsageError, "No model"),
        ("Qwen-8B", NotFound, "'Qwen-8B'"),
        ("Qwen-8B-Int4", NotFound, "'Qwen-8B-Int4'"),
        ("Qwen3-30B-A3B", UsageError, "mixture of experts"),
        ("./nothing", NotFound, "no file or folder"),
        ("~nobody-of-that-name/x", NotFound, "home folder"),
        ("gone.gguf", NotFound, "no file or folder"),
        ("gone/config.json", NotFound, "no file or folder"),
        ("a/b/c", NotFound, "no file or folder"),
        ("x" * 5000, NotFound, "catalog"),
        ("zero\0byte", NotFound, "catalog"),
        ("zero\0byte.gguf", NotFound, "no file or folder"),
    ],
)
def test_what_is_not_there(spec: str, kind: type, word: str) -> None:
    refused(kind, word, lambda: resolve_model(spec))


def test_an_unknown_name_offers_the_nearest() -> None:
    error = refused(NotFound, "Qwen2.5-7", lambda: resolve_model("Qwen2.5-7"))
    assert error.hint and "Qwen2.5-7B" in error.hint


def test_a_gguf_by_path_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf_bytes(QWEN2_GGUF, QWEN2_GGUF_TENSORS))
    config = resolve_model(tmp_path)
    assert config == resolve_model(tmp_path / "model.gguf") and config.name == "model"
    assert weight_bytes(config) == weight_bytes(replace(config, tensors=None, dtype="float32"))  # stored as F32
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    refused(UsageError, "2 GGUF files", lambda: resolve_model(tmp_path))


def copied(golden: Path, name: str, to: Path, **changes: Any) -> Path:
    """A golden folder's config, changed, and its weights."""
    table = json.loads((golden / name / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(table))
    shutil.copy(golden / name / "model.safetensors", to)
    return to


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"intermediate_size": 128},
        {"vocab_size": 161},
        {"tie_word_embeddings": False},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    ids=str,
)
def test_a_config_that_its_weights_contradict_is_refused(golden: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copied(golden, "qwen2_qwen3/qwen2_tied", tmp_path, **changes)
    refused(BadFile, "asks for", lambda: resolve_model(folder))


def test_quantize_config_json_of_older_autogptq_counts(golden: Path, tmp_path: Path) -> None:
    folder = copied(golden, "qwen1_gptq/int4", tmp_path, quantization_config=None)
    refused(BadFile, "asks for", lambda: resolve_model(folder))
    shutil.copy(golden / "qwen1_gptq/int4/quantize_config.json", tmp_path)
    assert resolve_model(folder).quantization == Quantization("gptq", 4)


def test_folders_without_weights_and_with_pickles(golden: Path, tmp_path: Path) -> None:
    refused(NotFound, "neither a config.json nor a .gguf", lambda: resolve_model(tmp_path))
    shutil.copy(golden / "qwen1/c_ntk/config.json", tmp_path)
    config = resolve_model(tmp_path)
    assert config.tensors is None and weight_bytes(config) == weight_bytes(resolve_model(golden / "qwen1/c_ntk"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for spec in (tmp_path, tmp_path / "pytorch_model.bin"):
        error = refused(BadFile, "pickle", lambda spec=spec: resolve_model(spec))
        assert error.hint and "safe_serialization" in error.hint
    refused(UsageError, "only the weights", lambda: resolve_model(golden / "qwen1/c_ntk/model.safetensors"))


def test_a_folder_named_like_a_model_comes_first(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen-7B").mkdir()
    assert resolve_model("Qwen-7B").num_layers == 32
    copied(golden, "qwen1/c_ntk", tmp_path / "Qwen-7B")
    assert resolve_model("Qwen-7B").num_layers == 2


class FakeHub:
    """What of huggingface_hub is used, serving the files of one folder as the repository some/model."""

    def __init__(self, folder: Path, cached: Path | None = None, config_bytes: int | None = None) -> None:
        self.folder, self.cached, self.config_bytes = folder, cached, config_bytes
        self.calls: list[str] = []
        self.errors = pytest.importorskip("huggingface_hub.errors")

    def try_to_load_from_cache(self, repo_id: str, name: str) -> str | None:
        return str(self.cached / name) if self.cached else None

    def snapshot_download(self, repo_id: str, local_files_only: bool) -> str:
        assert local_files_only
        raise self.errors.LocalEntryNotFoundError("nothing cached")

    def hf_hub_url(self, repo_id: str, name: str) -> str:
        return name

    def get_hf_file_metadata(self, url: str, timeout: float) -> Any:
        self.calls.append(url)
        if not (self.folder / url).exists():
            response = SimpleNamespace(status_code=404, headers={}, request=None)
            raise self.errors.RemoteEntryNotFoundError("absent", response=response)
        return SimpleNamespace(size=self.config_bytes or (self.folder / url).stat().st_size)

    def hf_hub_download(self, repo_id: str, name: str, etag_timeout: float) -> str:
        return str(self.folder / name)

    def get_safetensors_metadata(self, repo_id: str, timeout: float) -> Any:
        from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo

        codes = {"float32": "F32", "float16": "F16", "int32": "I32"}
        header = read_safetensors_header(self.folder / "model.safetensors")
        tensors = {
            name: TensorInfo(codes[t.dtype], list(t.shape), (t.begin, t.end)) for name, t in header.tensors.items()
        }
        return SimpleNamespace(files_metadata={"model.safetensors": SafetensorsFileMetadata({}, tensors)})


def test_a_hub_id_reads_the_config_and_the_headers(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    fake = FakeHub(golden / "qwen2_qwen3/qwen3_tied")
    monkeypatch.setattr(hub, "_library", lambda: fake)
    config = resolve_model("some/model")
    local = resolve_model(golden / "qwen2_qwen3/qwen3_tied")
    assert replace(config, name=local.name, source=local.source) == local
    assert (config.name, config.source) == ("model", "the Hub: some/model")
    assert fake.calls == ["config.json", "model.safetensors.index.json"]
    assert config.tensors is not None and weight_bytes(config) == weight_bytes(local)


def test_the_local_cache_comes_before_the_network(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    fake = FakeHub(golden, cached=golden / "qwen1/c_ntk")
    monkeypatch.setattr(hub, "_library", lambda: fake)
    assert resolve_model("some/model").num_layers == 2
    assert fake.calls == []


def test_a_config_of_one_gigabyte_is_not_downloaded(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "_library", lambda: FakeHub(golden / "qwen1/c_ntk", config_bytes=2**30))
    refused(BadFile, "some/model/config.json", lambda: resolve_model("some/model"))


def test_answers_of_the_hub_become_one_sentence(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    response = SimpleNamespace(status_code=503, headers={}, request=None)
    answers = [
        (errors.RepositoryNotFoundError("x", response=response), NotFound, "no public model"),
        (errors.GatedRepoError("x", response=response), NotFound, "gated"),
        (errors.RemoteEntryNotFoundError("x", response=response), NotFound, "no config.json"),
        (errors.HfHubHTTPError("x", response=response), NotFound, "503"),
        (errors.NotASafetensorsRepoError("x"), BadFile, "no safetensors"),
        (errors.SafetensorsParsingError("x"), BadFile, "malformed"),
        (errors.OfflineModeIsEnabled("x"), NotFound, "HF_HUB_OFFLINE"),
        (TimeoutError("x"), NotFound, "cannot be reached"),
    ]
    fake = FakeHub(golden / "qwen1/c_ntk")
    monkeypatch.setattr(hub, "_library", lambda: fake)
    for answer, kind, word in answers:

        def fail(*_: object, answer: Exception = answer, **__: object) -> None:
            raise answer

        monkeypatch.setattr(fake, "get_hf_file_metadata", fail)
        refused(kind, word, lambda: resolve_model("some/model"))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root, env=os.environ | environment
    )


RESOLVE = """
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.errors import QwenfitError
try:
    print(resolve_model("some-owner/some-model").num_layers)
except QwenfitError as error:
    print(error.exit_code, error.message)
"""


@pytest.mark.parametrize(
    ("environment", "word"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached")],
)
def test_without_a_network_it_says_so_within_seconds(tmp_path: Path, environment: dict[str, str], word: str) -> None:
    pytest.importorskip("huggingface_hub")
    start = time.monotonic()
    done = run_python(RESOLVE, HF_HOME=str(tmp_path), **environment)
    assert done.stdout.startswith("4 some-owner/some-model is neither") and word in done.stdout, done.stderr
    assert time.monotonic() - start < 10


def cached_repository(home: Path) -> tuple[Path, Path]:
    """The repository some-owner/some-model in the Hub's cache, still empty, and its snapshot."""
    repo = home / "hub/models--some-owner--some-model"
    snapshot = repo / "snapshots/0123456789012345678901234567890123456789"
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs/main").write_text(snapshot.name)
    return repo, snapshot


def test_the_real_cache_layout_is_read_offline(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repo, snapshot = cached_repository(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / "qwen1/a_ntk_logn" / name, repo / "blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout == "3\n"
    (snapshot / "model.safetensors").unlink()  # the config alone: weights are computed
    assert run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout == "3\n"


def test_a_gguf_repository_of_the_real_cache_is_known_by_its_id(tmp_path: Path) -> None:
    """It has no config.json; with several files one has to be named."""
    pytest.importorskip("huggingface_hub")
    repo, snapshot = cached_repository(tmp_path)
    (repo / "blobs/weights").write_bytes(gguf_bytes(QWEN2_GGUF, QWEN2_GGUF_TENSORS))
    (snapshot / "README.md").touch()
    without = run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout
    assert without.startswith("4 some-owner/some-model is neither")
    (snapshot / "a-q4_k_m.gguf").symlink_to("../../blobs/weights")
    layers = resolve_model(snapshot / "a-q4_k_m.gguf").num_layers
    assert run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout == f"{layers}\n"
    (snapshot / "b-q8_0.gguf").symlink_to("../../blobs/weights")
    assert "2 GGUF files" in run_python(RESOLVE, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1").stdout


class HubServer(BaseHTTPRequestHandler):
    """Serves the files of `folder` as repository some-owner/some-model, as the Hub does."""

    folder: Path
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path.rsplit('/', 1)[1]} {self.headers.get('authorization')}")
        path = self.folder / self.path.removeprefix("/some-owner/some-model/resolve/main/")
        content = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"some-etag"')
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        if wanted := self.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content = content[int(first) : int(last) + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_real_client_reads_config_and_headers_and_sends_the_token(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    HubServer.folder = golden / "qwen1/a_ntk_logn"
    with ThreadingHTTPServer(("127.0.0.1", 0), HubServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = """
from qwenfit.checkpoint.resolve import resolve_model, weight_bytes
config = resolve_model("some-owner/some-model")
print(config.num_layers, len(config.tensors), weight_bytes(config))
"""
        endpoint = f"http://127.0.0.1:{server.server_port}"
        done = run_python(code, HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint, HF_TOKEN="hf_secret")
        server.shutdown()
    assert done.stdout == "3 27 643072\n", done.stderr
    assert "HEAD config.json Bearer hf_secret" in HubServer.seen
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]  # no weights were fetched


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refused(NotFound, "huggingface_hub", lambda: resolve_model("some-owner/some-model"))
    assert error.hint == "pip install 'qwenfit[hub]'"


def test_naming_a_catalog_model_or_a_folder_imports_nothing_heavy(golden: Path) -> None:
    code = f"""
import sys
from qwenfit.checkpoint.resolve import resolve_model
resolve_model("Qwen-7B-Chat-Int4"); resolve_model({str(golden / "qwen1/c_ntk")!r})
print([name for name in ("torch", "numpy", "transformers", "huggingface_hub", "gguf") if name in sys.modules])
"""
    assert run_python(code).stdout == "[]\n"
