"""What a process that serves both towers of ViT-B/32 keeps in memory, above `import torch`.

Each row is a process of its own. It imports torch and notes what is resident; then it imports hf_clip or transformers,
loads model and processor, encodes one image and one text, and notes what is resident now and what was at the most. The
file has the row's dtype; int8 is made of the file in bfloat16.

Resident is the sum of two: anonymous memory, and pages of files that the process has touched. The latter are shared by
all processes that serve the same file, and the system can drop them. Both are Linux's own account (`smaps_rollup`).
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_clip.model.variants import get_variant

from .load import WEIGHTS, share_weights, twin_folders, write_processors
from .measuring import OURS, LeftOutError, Row, Table, say
from .peers import STOCK
from .settings import Settings

OPTIONS = ()
NEEDS_CEILING = False
IS_ON_CPU = True
VARIANT = "ViT-B/32"

PROGRAM = """
import json, re, sys, time
import torch

def resident():
    rollup = open("/proc/self/smaps_rollup").read()
    found = {name: 1024 * int(re.search(rf"^{name}:\\s+(\\d+)", rollup, re.M)[1]) for name in ("Rss", "Anonymous")}
    peak = re.search(r"^VmHWM:\\s+(\\d+)", open("/proc/self/status").read(), re.M)
    return found | {"peak": 1024 * int(peak[1])}

folder, threads, dtype, way = json.loads(sys.argv[1])
torch.set_num_threads(threads)
before, start = resident(), time.perf_counter()
from PIL import Image
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
if way == "stock":
    from transformers import CLIPModel as Model, CLIPProcessor as Processor
else:
    from hf_clip import HfClipModel as Model, HfClipProcessor as Processor
model = Model.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
processor = Processor.from_pretrained(folder)
if way == "optimized":
    model.optimize_for_inference()
if way == "int8":
    model.optimize_for_inference(precision="int8")
inputs = processor(text=["a photo of a cat"], images=Image.new("RGB", (640, 480)), return_tensors="pt")
with torch.inference_mode():
    model.get_image_features(pixel_values=inputs["pixel_values"].to(model.dtype))
    model.get_text_features(input_ids=inputs["input_ids"])
seconds, after = time.perf_counter() - start, resident()
print(json.dumps({"seconds": seconds} | {name: after[name] - before[name] for name in after}))
"""

ROWS: list[tuple[str, str, str, str]] = [
    (OURS, "float32", "float32", "plain"),
    (STOCK, "float32", "float32", "stock"),
    (f"{OURS}, optimized", "float32", "float32", "optimized"),
    (OURS, "bf16", "bfloat16", "plain"),
    (STOCK, "bf16", "bfloat16", "stock"),
    (f"{OURS}, optimized", "bf16", "bfloat16", "optimized"),
    (f"{OURS}, optimized", "int8", "bfloat16", "int8"),
]
"""Name, precision of the products, dtype of the file, and what is done with it."""


def serve_alone(folder: Path, threads: int, dtype: str, way: str) -> dict[str, Any]:
    """Serve in a fresh process: seconds, and bytes that were added to `Rss`, `Anonymous` and `peak`."""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise LeftOutError("this system keeps no account of resident memory in /proc")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([str(folder), threads, dtype, way])],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def cast_weights(folders: dict[str, Path], dtype: torch.dtype) -> None:
    """Rewrite the file of weights, which both folders share, in a dtype."""
    path = folders[OURS] / WEIGHTS
    cast = {name: tensor.to(dtype) for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    path.unlink()
    save_file(cast, path, metadata={"format": "pt"})
    share_weights(folders[OURS], folders[STOCK])


def serving(folders: dict[str, Path], title: str, threads: int) -> Table:
    """Measure all rows; the file is in float32 first."""
    table = Table(title, "processes, from `import torch` to the last feature")
    of_file = "float32"
    for name, precision, dtype, way in ROWS:
        if dtype != of_file:
            cast_weights(folders, getattr(torch, dtype))
            of_file = dtype
        say(f"{name}, {precision}")
        try:
            found = serve_alone(folders[STOCK if way == "stock" else OURS], threads, dtype, way)
        except LeftOutError as error:
            table.left_out.append(f"{name} is left out in {precision}: {error}")
            continue
        table.rows.append(Row(name, precision, 1, [found["seconds"]], peak_memory=found["peak"]))
        mib = {key: value / 2**20 for key, value in found.items() if key != "seconds"}
        table.notes.append(
            f"{name}, {precision}: resident {mib['Rss']:.0f} MiB above `import torch`, of which "
            f"{mib['Anonymous']:.0f} anonymous and {mib['Rss'] - mib['Anonymous']:.0f} pages of files; at most "
            f"{mib['peak']:.0f}"
        )
    return table


def run(settings: Settings) -> Iterator[Table]:
    variant = get_variant(VARIANT)
    with twin_folders(variant) as folders:
        write_processors(folders, variant.image_size)
        yield serving(folders, f"both towers of {variant.name} in memory", settings.threads)
