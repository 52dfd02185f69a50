"""Where one check of `benchmarks.gpu.process` runs, and how it says what it found."""

import json
import os
from typing import Any

import torch

from hf_clip import HfClipModel
from hf_clip.training.gathering import process_index

from ..peers import Batch
from .models import Implementations, caption_lengths, make_batch, variant_of

MARK = "ROW "
"""What the line of a row begins with."""
PAIRS = 12


class Place:
    """Where a scenario runs, and how it says what it found. Only the first process prints."""

    def __init__(self, device: str, is_dry: bool):
        self.kind, self.is_dry = device, is_dry
        self.device = device
        if device == "cuda":
            of_own = torch.cuda.device_count() >= int(os.environ.get("WORLD_SIZE", "1"))
            self.device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) if of_own else 0}"
            torch.cuda.set_device(self.device)

    def say(self, what: str, **row: Any) -> None:
        if process_index() == 0:
            print(MARK + json.dumps({"what": what} | row), flush=True)

    def check(self, what: str, value: float, at_most: float, note: str = "") -> None:
        self.say(what, value=value, at_most=at_most, note=note)

    def expect(self, what: str, is_so: bool, note: str = "") -> None:
        self.say(what, is_so=bool(is_so), note=note)

    def model_and_batch(self, name: str, pairs: int, is_tiny: bool = True) -> tuple[HfClipModel, Batch]:
        variant = variant_of(name, self.is_dry or is_tiny)
        batch = make_batch(variant, pairs, caption_lengths(pairs), self.device)
        return Implementations(variant, self.device).ours(), batch
