"""A folder of JPEGs to a finished index, and a second run without changes, beside rclip: whole processes, in turn.

    python -m venv rclip-venv && rclip-venv/bin/pip install rclip
    python -m benchmarks.search.folder --rclip rclip-venv/bin/python --work folder-benchmark

Both index with one architecture, rclip's: ViT-B/32 at 256x256 pixels, with the same random weights, in float32; ours
does it in bfloat16 too. rclip gets them as the ONNX graphs that it would download; nothing else of it is changed. The
embeddings of both are compared before anything is said of speed. rclip decodes JPEGs in full and keeps no thumbnails;
hf_clip decodes large ones at a half or a quarter, and makes thumbnails. Each process may use as many cores as there are
threads.

The work folder is kept: a second run finds the model and the photographs there. Files are in the page cache.
"""

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer
from hf_clip.checkpoints.onnx_graphs import ImageTower, TextTower, write_graph
from hf_clip.checkpoints.vocabulary import find_vocabulary

from ..__main__ import at_least_one
from ..load import COMMAND
from ..machine import describe, headline
from ..measuring import OURS, LeftOutError, Row, Table
from ..reporting import format_table

SIZES = ((640, 480), (1024, 768), (1600, 1200), (1920, 1440), (4000, 3000))
"""Of the photographs, in equal shares; every third of them stands upright."""

IMAGE_SIZE = 256
RCLIP_MODEL = "ViT-B-32-256-datacomp_s34b_b86k"
INDEX_BY_RCLIP = "import os; from rclip.main import init_rclip; init_rclip(os.getcwd(), 8)"
"""What the program `rclip` does before it searches; 8 is its own batch size."""

HALF = "bfloat16"

LEAST_COSINE = 0.99
"""Of the two embeddings of an image. They differ since JPEGs are decoded, resized and cropped in other ways."""


def write_photographs(folder: Path, count: int) -> None:
    """Write crops of photographs that ship with scikit-image, with noise, as cameras and the web have them."""
    from skimage import data

    random, sources = np.random.default_rng(0), []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = Image.fromarray(getattr(data, name)()).resize((4400, 3300), Image.Resampling.BICUBIC)
        levels = np.asarray(image).astype(np.int16) + random.integers(-6, 7, (3300, 4400, 3), dtype=np.int16)
        sources.append(Image.fromarray(levels.clip(0, 255).astype(np.uint8)))
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for number in range(count):
        left, top = int(random.integers(400)), int(random.integers(300))
        image = sources[int(random.integers(len(sources)))].crop((left, top, left + 4000, top + 3000))
        size = SIZES[number % len(SIZES)]
        image = image if image.size == size else image.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        image = image.transpose(Image.Transpose.ROTATE_90) if number % 3 == 0 else image
        image.save(unfinished / f"{number:05}.jpg", quality=88)
    unfinished.rename(folder)


def write_models(ours: Path, rclip: Path) -> None:
    """One model with random weights, as a folder of ours and as what rclip downloads."""
    import onnx

    config = HfClipConfig.from_variant("ViT-B/32")
    config.vision_config.image_size = IMAGE_SIZE
    torch.manual_seed(0)
    model = HfClipModel(config).eval()
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    HfClipProcessor(HfClipImageProcessor.for_image_size(IMAGE_SIZE), tokenizer).save_pretrained(ours)
    model.save_pretrained(ours)
    (rclip / RCLIP_MODEL).mkdir(parents=True)
    (rclip / "tokenizer").mkdir()
    shutil.copy(find_vocabulary(offline=True), rclip / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz")
    eager = HfClipModel.from_pretrained(ours, attn_implementation="eager").eval()
    for tower, name in ((ImageTower(eager), "visual.onnx"), (TextTower(eager), "textual.onnx")):
        path = rclip / RCLIP_MODEL / name
        write_graph(tower, path)
        graph = onnx.load(path)
        given = graph.graph.input[0].name
        for node in graph.graph.node:
            node.input[:] = ["input" if each == given else each for each in node.input]
        graph.graph.input[0].name = "input"
        onnx.save(graph, path)


def run_process(command: list[str], threads: int, where: Path, **environment: str) -> float:
    """Seconds of a whole process on the first cores. Raises LeftOutError with the last line of what went wrong."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=where,
        env=os.environ | environment | {"OMP_NUM_THREADS": str(threads)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300])
    return time.perf_counter() - start


def compare_embeddings(index: Path, database: Path) -> tuple[float, int]:
    """The smallest cosine similarity of the two embeddings of an image, and the number of images."""
    from hf_clip.search.index_table import IndexTables

    rows = IndexTables.open(str(index)).rows(["path", "embedding"]).to_pylist()
    ours = {row["path"]: np.array(row["embedding"], dtype=np.float32) for row in rows}
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT filepath, vector FROM images WHERE deleted IS NULL").fetchall()
    theirs = {path: np.frombuffer(vector, dtype=np.float32) for path, vector in found}
    if ours.keys() != theirs.keys():
        raise LeftOutError(f"rclip has {len(theirs)} images, and the index {len(ours)}")
    return min(float(ours[path] @ theirs[path]) for path in ours), len(ours)


def measure(work: Path, rclip: str | None, threads: int, count: int) -> list[Table]:
    """Index the folder with both, each twice."""
    photographs, model, data = work / f"photographs-{count}", work / "model", work / "rclip"
    if not photographs.exists():
        write_photographs(photographs, count)
    if not (data / RCLIP_MODEL / "textual.onnx").exists():
        shutil.rmtree(data, ignore_errors=True)
        write_models(model, data)
    index, half, database = work / "index", work / f"index-{HALF}", data / "db.sqlite3"
    root = str(Path(__file__).resolve().parents[2])
    for place in (index, half):
        shutil.rmtree(place, ignore_errors=True)
    database.unlink(missing_ok=True)

    def index_it(place: Path, *more: str) -> float:
        words = ["index", str(photographs), "--model", str(model), "--into", str(place), *more]
        return run_process([sys.executable, "-W", "ignore", "-c", COMMAND, *words], threads, work, PYTHONPATH=root)

    runs: dict[str, Callable[[], float]] = {
        OURS: lambda: index_it(index),
        f"{OURS}, {HALF}": lambda: index_it(half, "--dtype", HALF),
        "rclip": lambda: run_process(
            [str(rclip), "-c", INDEX_BY_RCLIP], threads, photographs, RCLIP_DATADIR=str(data), PYTHONPATH=""
        ),
    }
    tables = [
        Table(f"{count:,} JPEGs of up to 12 megapixels to a finished index", "images"),
        Table("the same folder again, without changes", "images"),
    ]
    for table in tables:
        for name, run in runs.items():
            if name == "rclip" and rclip is None:
                table.left_out.append(f"{name} is left out: name the Python that has it with --rclip")
                continue
            seconds = run()
            table.rows.append(Row(name, HALF if HALF in name else "float32", count, [seconds]))
            table.notes.append(f"{name}: {seconds:.1f} s")
            print(f"{table.title}, {table.notes[-1]}", file=sys.stderr, flush=True)
    if rclip is not None:
        least, images = compare_embeddings(index, database)
        if least < LEAST_COSINE or images != count:
            raise LeftOutError(f"the embeddings of {images} images differ: the smallest cosine similarity is {least}")
        rounded, _ = compare_embeddings(half, database)
        tables[0].notes.append(
            f"smallest cosine similarity of rclip's and our embedding of an image: {least:.4f}, in {HALF} {rounded:.4f}"
        )
    return tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.folder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rclip", metavar="PYTHON", help="the Python that has rclip (default: only hf_clip)")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the model and the photographs")
    parser.add_argument("--images", type=at_least_one, default=2000, help="photographs (default 2000)")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="and cores, of everyone")
    options = parser.parse_args(arguments)
    print(headline(describe(options.threads)))
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rclip = options.rclip and os.path.abspath(options.rclip)
    try:
        tables = measure(work, rclip, options.threads, options.images)
    except (LeftOutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for table in tables:
        print(format_table(table), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
