"""Embedding through Ray Data gives what this process alone gives."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_clip.commands.program import main
from hf_clip.search.embed_source import RayOptions, embed_source
from hf_clip.search.embed_with_ray import _as_embedded, _as_table, _Encoder, _read_unit
from hf_clip.search.embedding_files import StoredEmbeddings
from hf_clip.search.image_rows import Position, open_image_rows
from hf_clip.search.index_model import describe

from .test_data_set_rows import png
from .test_image_rows import save_tars


@pytest.fixture(scope="module")
def cluster() -> Any:
    """Ray on two cores of this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, address="local")
        try:
            yield ray
        finally:
            ray.shutdown()


@pytest.mark.slow  # half a minute and a dozen processes; what tasks and actors compute is tested below
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_give_what_one_process_gives(tmp_path: Path, small_model: Any, cluster: Any):
    source = save_tars(tmp_path / "tars", [50, 40])
    how: dict[str, Any] = {"model": small_model[2], "texts": True, "dtype": "float32", "shard_rows": 25}
    alone = embed_source(source, tmp_path / "alone", **how)
    together = embed_source(source, tmp_path / "together", **how, ray=RayOptions(workers=2))
    assert cluster.is_initialized()  # it was not started by the run
    assert (together.rows, together.problems, together.shards) == (89, 1, 4)
    assert list(together.reasons) == list(alone.reasons)
    for one, other in zip(StoredEmbeddings(tmp_path / "alone"), StoredEmbeddings(tmp_path / "together"), strict=True):
        assert (one.paths, one.captions, one.metadata) == (other.paths, other.captions, other.metadata)
        assert one.ids.tolist() == other.ids.tolist()
        assert np.allclose(one.embeddings, other.embeddings, atol=1e-5)
        assert one.text_embeddings is not None
        assert other.text_embeddings is not None
        assert np.allclose(one.text_embeddings, other.text_embeddings, atol=1e-5)


def test_tasks_and_actors_on_their_own(tmp_path: Path, small_model: Any):
    model, processor, name = small_model
    identity = describe(model, processor, name)
    encoding = {"batch_size": 2, "exact": False, "threads": 1}
    rows = open_image_rows(save_tars(tmp_path / "tars", [3, 2, 2]))
    (table,) = _read_unit({"unit": np.array([1])}, rows, Position(1, 1, 4))
    assert [row.path for row in rows.rows_of(1)][1:] == [os.fsdecode(path) for path in table["path"].to_pylist()]
    found = list(_as_embedded(_Encoder(rows.content, True, identity, True, encoding)(table)))
    assert (len(found), found[0].row.caption) == (1, "image 4")
    assert found[0].embedding is not None
    assert found[0].text_embedding is not None

    (tmp_path / "images").mkdir()
    for file, content in ((b"a.png", png(1)), (b"b.png", b"no image"), (b"c\xff.png", png(2))):
        Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/" + file)).write_bytes(content)
    folder = open_image_rows(str(tmp_path / "images"))
    found = list(_as_embedded(_Encoder(folder.content, False, identity, False, encoding)(_as_table(list(folder)))))
    assert [one.row.path for one in found] == [row.path for row in folder]
    assert [one.problem is None for one in found] == [True, False, True]
    assert [one.embedding is None for one in found] == [False, True, False]
    assert found[0].text_embedding is None


def test_what_a_worker_cannot_do_is_one_line(tmp_path: Path, small_model: Any, digits: Path):
    model, processor, _ = small_model
    rows = open_image_rows(save_tars(tmp_path / "tars", [3, 2]))
    encoding = {"batch_size": 2, "exact": False, "threads": 1}
    other = describe(model, processor, str(digits / "resnet"))
    (table,) = _read_unit({"unit": np.array([0])}, rows, Position())
    with pytest.raises(ValueError, match=r"resnet on the machine .* is another model than where the run was started"):
        list(_as_embedded(_Encoder(rows.content, True, other, False, encoding)(table)))
    (tmp_path / "tars/001.tar").write_bytes(b"no tar at all" * 100)
    identity = describe(model, processor, small_model[2])
    encoder = _Encoder(rows.content, True, identity, False, encoding)
    (table,) = _read_unit({"unit": np.array([1])}, rows, Position())
    with pytest.raises(ValueError, match=r"The data set .* cannot be read"):
        list(_as_embedded(encoder(table)))


def test_command_without_ray(
    tmp_path: Path, small_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["embed", str(tmp_path), str(tmp_path / "out"), "--model", small_model[2]]
    assert main([*words, "--ray"]) == 1
    assert capsys.readouterr().err == (
        'error: Embedding on many machines needs ray, which this Python does not have: pip install "hf-clip[ray]"\n'
    )
    assert main([*words, "--ray-workers", "2"]) == 1
    assert capsys.readouterr().err == "error: --ray-address and --ray-workers say how Ray embeds: give --ray too.\n"
