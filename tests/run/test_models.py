"""The model cache, in a folder of its own; the Hub is not reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenfit.errors import NotFound, UsageError
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


def test_pulling_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(NotFound, match="not reachable"):
        models.pull("Qwen-7B")
    with pytest.raises(UsageError, match="no source"):
        models.pull("Qwen-7B", source="ftp")
