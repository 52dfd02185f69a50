"""How long ViT-L/14 takes to load and what it adds to memory, and how soon a fresh process has classified an image.

Loading: `from_pretrained` of a file in the page cache, each time in a process of its own that has imported everything
beforehand; once with the file's own dtype, and once from float16 matrices, as OpenAI's checkpoints are stored, to
float32. Anonymous memory is what a process needs beyond pages of files, which the system can share and drop.

First image: one and the same program on our repository and on a stock one (ViT-B/32), from the start of Python to the
printed scores: import, load, preprocess, encode. Only ours says `import hf_clip`. Further rows are the command
`hf-clip classify` on the same image and labels, with torch and (`--onnx`) with ONNX Runtime alone.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, Variant
from hf_clip.checkpoints.onnx_graphs import ImageTower, TextTower, write_graph
from hf_clip.checkpoints.onnx_int8 import write_quantized
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.extras import missing_packages
from hf_clip.model.bpe import read_merges
from hf_clip.model.variants import get_variant

from .measuring import OURS, Check, Contender, Row, Table, compare, memory_of_this_process, run_alone, say
from .peers import STOCK, weights_folder
from .settings import Settings

OPTIONS = ()
NEEDS_CEILING = False
IS_ON_CPU = True
VARIANT, QUICK_VARIANT = "ViT-L/14", "ViT-B/32"
FIRST_IMAGE_VARIANT = "ViT-B/32"
ROUNDS, QUICK_ROUNDS = 7, 3
LABELS = ["a photo of a cat", "a photo of a dog"]
WEIGHTS = "model.safetensors"
LARGEST_DIFFERENCE_OF_SCORES = 1e-4

PROGRAM = """
import json, sys
import torch
import transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor{its_own_import}

folder, image, labels, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model = AutoModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(text=labels, images=Image.open(image), return_tensors="pt", padding=True)
with torch.inference_mode():
    scores = model(**inputs).logits_per_image.softmax(dim=-1)[0]
print(json.dumps(scores.tolist()))
"""
COMMAND = """
import sys
sys.argv[0] = "hf-clip"  # as the program that an installation makes is called
from hf_clip.commands.program import main

sys.exit(main())
"""
COMMANDS = {
    f"{OURS}: hf-clip classify": [],
    f"{OURS}: classify --onnx": ["--onnx"],
    f"{OURS}: --onnx, int8": ["--onnx", "--precision", "int8"],
}
"""Further rows of the table, and their options. What is printed is rounded to four digits."""

LARGEST_DIFFERENCE_OF_INT8 = 0.05
OWN_IMPORT = {OURS: "\nimport hf_clip", STOCK: ""}


@contextmanager
def twin_folders(variant: Variant) -> Iterator[dict[str, Path]]:
    """The same weights as a repository of ours and as a stock one; the file is there once."""
    with weights_folder(variant) as ours, tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as folder:
        stock = Path(folder)
        config = HfClipConfig.from_pretrained(ours).to_dict()
        stock_config = CLIPConfig(**config)
        stock_config.architectures = ["CLIPModel"]
        stock_config.save_pretrained(stock)
        share_weights(ours, stock)
        yield {OURS: ours, STOCK: stock}


def share_weights(ours: Path, stock: Path) -> None:
    (stock / WEIGHTS).unlink(missing_ok=True)
    os.link(ours / WEIGHTS, stock / WEIGHTS)


def halve_matrices(folders: dict[str, Path]) -> None:
    """Rewrite the weights as OpenAI stores them: matrices in float16, gains and biases in float32."""
    path = folders[OURS] / WEIGHTS
    halves = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in load_file(path).items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(halves, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, path)
    share_weights(folders[OURS], folders[STOCK])


def load_alone(name: str, folder: str, threads: int) -> dict[str, Any]:
    """Seconds of one load into float32, anonymous memory that it has added, and the largest of all, in bytes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    kind: Any = HfClipModel if name == OURS else transformers.CLIPModel
    gc.collect()
    before = memory_of_this_process("RssAnon")
    start = time.perf_counter()
    model = kind.from_pretrained(folder, dtype=torch.float32)
    seconds = time.perf_counter() - start
    after = memory_of_this_process("RssAnon")
    return {
        "seconds": seconds,
        "anonymous": None if before is None or after is None else after - before,
        "peak": memory_of_this_process("VmHWM"),
        "checksum": float(sum(tensor.double().sum() for tensor in model.state_dict().values())),
        "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def loading(folders: dict[str, Path], title: str, rounds: int, threads: int) -> Table:
    """The processes take turns; the first round is a warm-up. The clock is in them, so that imports don't count."""
    table, seen = Table(title, "models"), {name: [] for name in folders}  # type: ignore[var-annotated]
    for turn in range(rounds + 1):
        for name, folder in folders.items():
            say(f"loading, round {turn}, {name}")
            found = run_alone(load_alone, name=name, folder=str(folder), threads=threads)
            if turn:
                seen[name].append(found)
    say("")
    expected = seen[OURS][0]["checksum"]
    for name, several in seen.items():
        if abs(several[0]["checksum"] - expected) > 1e-6 * abs(expected):
            table.left_out.append(f"{name} is left out: its weights add up to {several[0]['checksum']}, not {expected}")
            continue
        table.rows.append(Row(name, "", 1, [one["seconds"] for one in several], peak_memory=several[-1]["peak"]))
        added = several[-1]["anonymous"]
        if added is not None:
            weights = several[-1]["bytes"]
            table.notes.append(
                f"{name}: anonymous memory added {added / 1e9:.2f} GB, {added / weights:.2f} of the weights"
            )
    return table


def write_processors(folders: dict[str, Path], image_size: int) -> None:
    ours = HfClipImageProcessor.for_image_size(image_size)
    vocabulary = find_vocabulary(offline=True)
    tokenizer = HfClipTokenizer.from_vocabulary_file(vocabulary)
    HfClipProcessor(ours, tokenizer).save_pretrained(folders[OURS])
    stock = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=read_merges(vocabulary), model_max_length=77)
    CLIPProcessor(CLIPImageProcessorPil(**ours.to_dict()), stock).save_pretrained(folders[STOCK])


def classify_in_fresh_process(name: str, folder: Path, image: Path, threads: int) -> list[float]:
    arguments = json.dumps([str(folder), str(image), LABELS, threads])
    program = PROGRAM.format(its_own_import=OWN_IMPORT[name])
    command = [sys.executable, "-W", "ignore", "-c", program, arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def export_towers(folder: Path) -> None:
    """Write the graphs of both towers that `hf-clip classify --onnx` reads, in float32 and int8."""
    (folder / "onnx").mkdir()
    model = HfClipModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for graph in (TextTower(model), ImageTower(model)):
        path = folder / "onnx" / f"{graph.name}.onnx"
        write_graph(graph, path)
        write_quantized(path, path.with_stem(f"{graph.name}_quantized"))


def classify_by_command(options: list[str], folder: Path, image: Path, threads: int) -> list[float]:
    """Run `hf-clip classify` in a fresh process; returns the scores in the order of the labels."""
    words = ["classify", str(folder), str(image), "--labels", ",".join(LABELS), "--templates", "{}", *options]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMAND, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    found = {label: float(score) for label, score in re.findall(rf"({'|'.join(LABELS)}) +([\d.]+)", done.stdout)}
    return [found[label] for label in LABELS]


def same_scores(expected: list[float], largest: float = LARGEST_DIFFERENCE_OF_SCORES) -> Check:
    def check(found: list[float]) -> str | None:
        difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        return None if difference <= largest else f"its scores are {found}, not {expected}"

    return check


def first_image(variant: Variant, folders: dict[str, Path], settings: Settings, rounds: int) -> Table:
    write_processors(folders, variant.image_size)
    image = folders[OURS] / "image.png"
    Image.effect_mandelbrot((640, 480), (-2.2, -1.5, 0.8, 1.5), 60).convert("RGB").save(image)
    works: dict[str, Callable[[], list[float]]] = {
        name: partial(classify_in_fresh_process, name, folder, image, settings.threads)
        for name, folder in folders.items()
    }
    expected = works[STOCK]()
    contenders = [Contender(name, work, 1, check=same_scores(expected)) for name, work in works.items()]
    table = Table(
        f"first image of a fresh process, {variant.name}", "programs", ours=(OURS, f"{OURS}: classify --onnx")
    )
    if line := missing_packages("Classifying with ONNX Runtime", "onnx"):
        table.left_out.append(line)
    else:
        export_towers(folders[OURS])
    for name, options in COMMANDS.items():
        if line and "--onnx" in options:
            continue
        work = partial(classify_by_command, options, folders[OURS], image, settings.threads)
        largest = LARGEST_DIFFERENCE_OF_INT8 if "int8" in options else LARGEST_DIFFERENCE_OF_SCORES
        contenders.append(Contender(name, work, 1, check=same_scores(expected, largest)))
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def run(settings: Settings) -> Iterator[Table]:
    rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
    variant = get_variant(settings.choose(VARIANT, QUICK_VARIANT))
    with twin_folders(variant) as folders:
        yield loading(folders, f"loading {variant.name}, float32 as in the file", rounds, settings.threads)
        halve_matrices(folders)
        yield loading(folders, f"loading {variant.name}, float16 matrices to float32", rounds, settings.threads)
    variant = get_variant(FIRST_IMAGE_VARIANT)
    with twin_folders(variant) as folders:
        yield first_image(variant, folders, settings, rounds)
