"""The model cache, in a folder of its own; the Hub is not reached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenfit.errors import NotFound, QwenfitError, UsageError
from qwenfit.run import models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub

    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", lambda real=huggingface_hub.scan_cache_dir: real(folder))
    return folder


def add(cache: Path, repo: str, nbytes: int) -> None:
    folder = cache / ("models--" + repo.replace("/", "--"))
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs" / "b1").write_bytes(b"\0" * nbytes)
    (snapshot / "config.json").symlink_to("../../blobs/b1")
    (folder / "refs" / "main").write_text("a" * 40)


def test_known_models_are_the_dense_ones() -> None:
    rows = {row["model"]: row for row in models.known_models()}
    assert len(rows) == 28 and "Qwen3-30B-A3B" not in rows
    assert rows["Qwen-7B"]["parameters"] == 7_721_324_544


def test_repository_names() -> None:
    assert models.repository("Qwen-7B") == "Qwen/Qwen-7B"
    assert models.repository("Qwen-1.8B") == "Qwen/Qwen-1_8B"
    assert models.repository("someone/model") == "someone/model"
    with pytest.raises(NotFound, match="no model"):
        models.repository("Kwen")


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("qwen-1.8b-chat", "Qwen/Qwen-1_8B-Chat"),
        ("Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("Qwen1.5-1.8B-Chat", "Qwen/Qwen1.5-1.8B-Chat"),
        ("qwen2.5-7b-instruct-gptq-int4", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct-AWQ"),
        ("Qwen3-8B-Base", "Qwen/Qwen3-8B-Base"),
    ],
)
def test_published_names_are_those_of_the_hub(name: str, repo: str) -> None:
    assert models.repository(name) == repo


def test_an_empty_cache_lists_nothing_and_has_nothing_to_remove(cache: Path) -> None:
    assert models.cached_models() == []
    with pytest.raises(NotFound, match="not in the cache"):
        models.remove("Qwen-7B")


def test_cached_models_are_listed_largest_first_and_removed(cache: Path) -> None:
    add(cache, "Qwen/Qwen-7B", 2000)
    add(cache, "other/model", 5000)
    assert [(m.id, m.nbytes) for m in models.cached_models()] == [("other/model", 5000), ("Qwen/Qwen-7B", 2000)]
    assert models.remove("Qwen-7B") == 2000
    assert [m.id for m in models.cached_models()] == ["other/model"]


def test_only_the_files_asked_for_are_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF repository holds a dozen quantizations; what is printed is what to name."""
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "m-q4_k_m.gguf").touch()
    assert models.pull("me/m-GGUF", files=("*q4_k_m*",)) == str(tmp_path / "m-q4_k_m.gguf")
    with pytest.raises(NotFound, match="no file that matches"):
        models.pull("me/m-GGUF", files=("*q9*",))
    (tmp_path / "config.json").touch()
    assert models.pull("me/m") == str(tmp_path)
    assert asked[0] == ("me/m-GGUF", ["*q4_k_m*"]) and asked[-1] == ("me/m", list(models.PATTERNS))


def test_what_the_hub_answers_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=404, headers={}, request=None)
    for answer, code, word in [
        (errors.HFValidationError("x"), 4, "no possible name"),
        (errors.GatedRepoError("x", response=response), 4, "gated"),
        (errors.RepositoryNotFoundError("x", response=response), 4, "no model"),
        (errors.RevisionNotFoundError("x", response=response), 4, "no revision 'v9'"),
        (errors.HTTPError("the connection broke"), 4, "not reachable"),
        (OSError(28, "No space left on device"), 1, "No space left"),
    ]:

        def fail(*_: object, answer: Exception = answer, **__: object) -> str:
            raise answer

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(QwenfitError, match=word) as caught:
            models.pull("me/m", revision="v9")
        assert caught.value.exit_code == code


def test_pulling_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(NotFound, match="not reachable"):
        models.pull("Qwen-7B")
    with pytest.raises(UsageError, match="no source"):
        models.pull("Qwen-7B", source="ftp")


@pytest.fixture
def modelscope_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ModelScope's own library, beside an empty one of Hugging Face's."""
    pytest.importorskip("modelscope")
    monkeypatch.setattr("modelscope_hub.config._default_config", None, raising=False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return tmp_path / "ms"


@pytest.mark.parametrize("owner", ["qwen", "Qwen"])
def test_what_modelscope_downloaded_is_found_by_name_listed_and_removed(
    modelscope_cache: Path, owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import qwen2_config, qwen2_tensors, write_model

    from qwenfit.checkpoint.load import load_model, with_files
    from qwenfit.checkpoint.resolve import resolve_model

    config = qwen2_config()
    folder = modelscope_cache / "models" / f"{owner}--Qwen2.5-0.5B-Instruct" / "snapshots" / "master"
    write_model(folder, config, qwen2_tensors(config))
    for name in ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert with_files(resolve_model(name), name).source == str(folder)
    tuned = modelscope_cache / "models" / "someone--tuned-0.1B" / "snapshots" / "master"
    write_model(tuned, config, qwen2_tensors(config))
    assert resolve_model("someone/tuned-0.1B").source == str(tuned)
    assert models.remove("someone/tuned-0.1B") > 1000
    monkeypatch.setattr("qwenfit.checkpoint.hub._cached_by_the_hub", lambda repo: tmp_path / "config-only")
    (tmp_path / "config-only").mkdir()
    assert with_files(resolve_model("Qwen2.5-0.5B"), "Qwen2.5-0.5B-Instruct").source == str(folder)  # it has weights
    assert load_model("Qwen/Qwen2.5-0.5B-Instruct")[1].hidden_size == config["hidden_size"]
    (found,) = models.cached_models()
    assert (found.id, found.source) == (f"{owner}/Qwen2.5-0.5B-Instruct", "modelscope") and found.nbytes > 1000
    assert models.remove("Qwen2.5-0.5B-Instruct") == found.nbytes
    assert models.cached_models() == [] and not folder.exists()


def test_pulling_from_modelscope_asks_its_own_library(
    modelscope_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr("modelscope_hub.compat.snapshot_download", download)
    assert models.pull("Qwen-7B-Chat", source="modelscope") == str(tmp_path)
    assert asked == [("qwen/Qwen-7B-Chat", {"revision": None, "allow_patterns": list(models.PATTERNS)})]
    monkeypatch.setattr("qwenfit.checkpoint.modelscope.installed", lambda: False)
    with pytest.raises(NotFound, match="modelscope") as caught:
        models.pull("Qwen-7B-Chat", source="modelscope")
    assert "qwenfit[modelscope]" in caught.value.hint
