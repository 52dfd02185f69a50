"""Searches of an index of many images: time, memory and recall, beside LanceDB itself, faiss and numpy.

    python -m benchmarks.search.vectors --images 100000
    python -m benchmarks.search.vectors --images 1000000 --approximate --peers numpy faiss

The embeddings are drawn: a direction that all share (CLIP's images have cosines of 0.5 to 0.6 with one another), 2,000
clusters, and noise. Texts share another direction, and lie at cosines of 0.2 to 0.4 with images, as CLIP's do. Half of
the queries are images, half are texts. Nothing of a model is measured: a query is a direction.

Memory is that of a process of its own that searches: after the import of torch, and at its peak.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..machine import describe, headline

WIDTH, CLUSTERS, BLOCK = 512, 2000, 50_000
QUERIES, TOP = 40, 20
PEERS = ("numpy", "lancedb", "faiss", "lancedb-pq")

SEARCHER = """
import json, sys, numpy as np, torch
def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1000
torch.zeros(1) + 1
start = memory("VmRSS")
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import IndexTables
index = ImageIndex(IndexTables.open(sys.argv[1]))
for query in torch.from_numpy(np.load(sys.argv[2]))[:5]:
    index.search(query, top=20, cutoff="auto")
print(json.dumps({"torch": start, "now": memory("VmRSS"), "peak": memory("VmHWM")}))
"""


def centres(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The directions that images and texts share, and the clusters: (2, D) and (clusters, D)."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((2, WIDTH), dtype=np.float32)
    return shared, generator.standard_normal((CLUSTERS, WIDTH), dtype=np.float32)


def draw(count: int, seed: int, of_texts: bool = False) -> np.ndarray:
    """Embeddings (count, D) float32 of length one."""
    shared, clusters = centres()
    generator = np.random.default_rng(seed)
    vectors = 0.45 * generator.standard_normal((count, WIDTH), dtype=np.float32)
    vectors += 0.6 * clusters[generator.integers(0, CLUSTERS, count)] + 0.9 * shared[int(of_texts)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_index(place: str, count: int, thumbnail: int) -> np.ndarray:
    """Write an index of drawn embeddings, which are returned too, (count, D) float16."""
    import pyarrow as pa  # type: ignore[import-untyped]

    from hf_clip.search.index_table import IndexDescription, IndexTables

    tables = IndexTables.create(place, IndexDescription(WIDTH, "drawn", {}, ""))
    schema, found = tables.images.schema, np.empty((count, WIDTH), np.float16)
    for first in range(0, count, BLOCK):
        ids = np.arange(first, min(first + BLOCK, count))
        part = found[first : first + len(ids)]
        part[:] = draw(len(ids), 1000 + first)
        columns = {
            "id": ids,
            "path": [f"/photos/{id % 97}/{id}.jpg" for id in ids],
            "path_bytes": [b"/photos/%d/%d.jpg" % (id % 97, id) for id in ids],
            "perceptual_hash": np.random.default_rng(first).integers(-(2**63), 2**63, len(ids)),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), WIDTH),
            "thumbnail": pa.array([np.random.default_rng(1).bytes(thumbnail)] * len(ids), pa.binary()),
        }
        arrays = [columns.get(name, pa.nulls(len(ids), schema.field(name).type)) for name in schema.names]
        arrays = [pa.array(values, schema.field(n).type) for n, values in zip(schema.names, arrays, strict=True)]
        tables.add_table(pa.Table.from_arrays(arrays, schema=schema))
    return found


def measure(
    search: Callable[[np.ndarray], list[int]], queries: np.ndarray, best: list[set[int]]
) -> tuple[float, float]:
    """Median seconds of a search once it is warm, and recall@10."""
    for query in queries[:3]:
        search(query)
    seconds, recall = [], []
    for query, wanted in zip(queries, best, strict=True):
        start = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - start)
        recall.append(len(wanted & {*found[:10]}) / 10)
    return statistics.median(seconds), statistics.mean(recall)


def peers(
    names: list[str], stored: np.ndarray, place: str
) -> Iterator[tuple[str, Callable[[np.ndarray], list[int]], float]]:
    """Name, function and seconds to build of each peer that is asked for and installed."""
    if "numpy" in names:
        wide = stored.astype(np.float32)

        def by_numpy(query: np.ndarray) -> list[int]:
            scores = wide @ query
            near = np.argpartition(-scores, TOP)[:TOP]
            return near[np.argsort(-scores[near])].tolist()

        yield "numpy, float32 in memory", by_numpy, 0.0
        del wide
    if "faiss" in names:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        partitions = max(1, round(len(stored) / 4096))

        def by_faiss(index: Any, query: np.ndarray) -> list[int]:
            return list(index.search(query[None], TOP)[1][0].tolist())

        for name, kind in (("flat", "Flat"), ("IVF-PQ with refinement", f"IVF{partitions},PQ64,RFlat")):
            start = time.perf_counter()
            index = faiss.index_factory(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
            index.train(stored[: 64 * max(partitions, 256)].astype(np.float32))
            for first in range(0, len(stored), BLOCK):
                index.add(stored[first : first + BLOCK].astype(np.float32))
            if kind != "Flat":
                index.k_factor = 16
                faiss.ParameterSpace().set_index_parameter(index, "nprobe", 32)
            yield (
                f"faiss, {name}",
                partial(by_faiss, index),
                time.perf_counter() - start,
            )
    if "lancedb" in names or "lancedb-pq" in names:
        import lancedb

        table = lancedb.connect(place).open_table("images")

        def by_lancedb(query: np.ndarray, indexed: bool = False) -> list[int]:
            search = table.search(query, vector_column_name="embedding").distance_type("cosine").limit(TOP)
            search = search.nprobes(32).refine_factor(16) if indexed else search.bypass_vector_index()
            return search.select(["id", "_distance"]).to_arrow()["id"].to_pylist()

        if "lancedb" in names:
            yield "LanceDB, exact", by_lancedb, 0.0
        if "lancedb-pq" in names:
            from lancedb.index import IvfPq

            start = time.perf_counter()
            how = {"num_partitions": max(1, round(len(stored) / 4096)), "max_iterations": 10, "sample_rate": 64}
            table.create_index("embedding", config=IvfPq(distance_type="cosine", **how))
            yield "LanceDB, IVF-PQ with refinement", partial(by_lancedb, indexed=True), time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--thumbnail", type=int, default=2000, help="bytes of each thumbnail")
    parser.add_argument("--approximate", action="store_true", help="build and measure the approximate scan")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["numpy", "lancedb", "faiss"])
    given = parser.parse_args(arguments)
    from hf_clip.search.approximate_scan import build
    from hf_clip.search.image_index import ImageIndex
    from hf_clip.search.index_table import IndexTables

    print(headline(describe(torch.get_num_threads())))
    print(f"{given.images:,} images, {WIDTH} numbers each", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "index")
        start = time.perf_counter()
        stored = make_index(place, given.images, given.thumbnail)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        queries = np.concatenate([draw(QUERIES // 2, 1), draw(QUERIES // 2, 2, of_texts=True)])
        np.save(Path(folder) / "queries.npy", queries)
        scores = np.concatenate(
            [queries @ stored[first : first + BLOCK].astype(np.float32).T for first in range(0, len(stored), BLOCK)],
            axis=1,
        )
        best = [set(np.argpartition(-row, 10)[:10].tolist()) for row in scores]
        del scores
        index = ImageIndex(IndexTables.open(place))

        def say(name: str, search: Callable[[np.ndarray], list[int]], built: float) -> None:
            seconds, recall = measure(search, queries, best)
            print(f"| {name} | {1000 * seconds:.1f} ms | {recall:.3f} | {built:.0f} s |", flush=True)

        def ours(query: np.ndarray, exact: bool = True, cutoff: str | None = None) -> list[int]:
            how: dict[str, Any] = {"top": TOP, "folded": False, "exact": exact, "cutoff": cutoff}
            return [result.id for result in index.search(torch.from_numpy(query), **how)]

        print("| search of the best 20 | a query | recall@10 | build |\n|---|---|---|---|")
        say("hf_clip, exact", ours, 0.0)
        say("hf_clip, exact, ended by the cutoff", partial(ours, cutoff="auto"), 0.0)
        if given.approximate:
            start = time.perf_counter()
            scan = build(index.tables, torch.from_numpy(draw(100, 3, of_texts=True)))
            seconds = time.perf_counter() - start
            say("hf_clip, approximate", lambda query: ours(query, False), seconds)
            print(scan.describe())
        for name, search, built in peers(given.peers, stored, place):
            say(name, search, built)
        words = [sys.executable, "-c", SEARCHER, place, str(Path(folder) / "queries.npy")]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        print(
            f"memory of a process that searches: {found['peak']:.0f} MB at its peak, {found['now']:.0f} MB when warm, "
            f"of which torch took {found['torch']:.0f} MB"
        )


if __name__ == "__main__":
    main()
