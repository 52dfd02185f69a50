"""Where results should end: the cutoff of a search against flat thresholds, on three data sets that have labels.

    python -m benchmarks.search.cutoff FOLDER

FOLDER/clip-digits-vit is the model of `python -m demo`; it and two others are trained there if they are missing, which
takes some minutes each. Each index lacks some classes, so that some queries have no answer. F1 is that of the images
shown, with a limit of none, and 1 where none is right and none is shown; its mean is taken over queries of a kind
(nothing, one property, two, all), then over kinds.

The flat thresholds are the best of a fine grid: `own` with the labels of the same queries, `split` with those of other
indexes of the same data set, which lack other classes, and `others` with those of the other two data sets.

Dimensions: I images, Q queries, D embedding.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.__main__ import run as run_demo
from demo.digits import COLOURS as INKS
from demo.digits import COMBINATIONS, DIGITS, Combination, draw, load_split_digits, untrained_combinations
from hf_clip import HfClipModel, HfClipProcessor, encode_images, encode_texts
from hf_clip.search.exact_scan import EmbeddingMatrix, sample_places
from hf_clip.search.reference_nouns import REFERENCE_TEXTS
from hf_clip.search.result_cutoff import IMAGE_GATES, REFERENCE_IMAGES, TEXT_GATES, least_score, measure_references

from ..machine import describe, headline
from .made_models import train_model
from .photo_crops import FLIPS, GROUPS, NAMES, TINTS, caption, load_photograph, make_crop
from .scenes import COLOURS, GROUND_TEXTS, GROUNDS, SHAPES, THINGS, Scene, draw_scene, random_scene

IMAGES, IMAGE_QUERIES, TRAINED_PAIRS = 3000, 300, 30_000
SEEDS = (11, 12, 13)
"""Of what the indexes lack and hold. Those with which the constants of the cutoff were chosen are others."""

NEIGHBOURS = 20

Facts = frozenset[str]
"""What is true of an image."""


class Query(NamedTuple):
    """A text, and the facts of an image that it fits."""

    kind: str
    text: str
    facts: Facts


Shown = tuple[Path, list[Facts], list[Image.Image], list[Query]]
"""A model, an index's images with what they show, and queries."""


@dataclass
class Judged:
    """Queries over one index, with what is right.

    Attributes:
        name: Of the data set.
        matrix: (I, D).
        scores: (Q, I).
        right: (Q, I) bool.
        kinds: Of each query.
        least: (Q,) the least score of a result by the cutoff.
    """

    name: str
    matrix: EmbeddingMatrix
    scores: Tensor
    right: Tensor
    kinds: list[str]
    least: Tensor

    def mean(self, values: Tensor) -> float:
        """Mean over queries of a kind, then over kinds."""
        kinds = np.array(self.kinds)
        return float(np.mean([values[torch.from_numpy(kinds == kind)].mean() for kind in sorted(set(self.kinds))]))

    def f1(self, shown: Tensor) -> Tensor:
        hits, total = (shown & self.right).sum(dim=1), shown.sum(dim=1) + self.right.sum(dim=1)
        return torch.where(total == 0, 1.0, 2 * hits / total.clamp(min=1))

    def flat(self, threshold: float) -> float:
        return self.mean(self.f1(self.scores >= threshold))

    def recall(self, scores: Tensor, k: int, least: Tensor | float = -torch.inf) -> float:
        """Share of the k first that are right, of at most as many as there are."""
        has_some = self.right.any(dim=1)
        best = scores[has_some].topk(k, dim=1)
        floor = least[has_some, None] if isinstance(least, Tensor) else least
        hits = (self.right[has_some].gather(1, best.indices) & (best.values >= floor)).sum(dim=1)
        return float((hits / self.right[has_some].sum(dim=1).clamp(max=k)).mean())


def article(word: str) -> str:
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def show_digits(folder: Path, choose: random.Random) -> Shown:
    model = folder / "clip-digits-vit"
    if not (model / "model.safetensors").is_file():
        run_demo("vit", folder, 0)
    trained = sorted(set(COMBINATIONS) - untrained_combinations(0), key=COMBINATIONS.index)

    def facts(one: Combination) -> Facts:
        return frozenset({DIGITS[one.digit], f"{one.ink} ink", f"{one.paper} paper"})

    gone = {*choose.sample(DIGITS, 2), f"{choose.choice(list(INKS))} ink", f"{choose.choice(list(INKS))} paper"}
    kept = choose.sample([one for one in trained if not facts(one) & gone], 120)
    shown = choose.choices(kept, [1 / (rank + 3) for rank in range(len(kept))], k=IMAGES)
    strokes, labels = load_split_digits(0)[1]
    by_digit = [(labels == digit).nonzero()[:, 0].tolist() for digit in range(10)]
    chosen = torch.tensor([choose.choice(by_digit[one.digit]) for one in shown])
    size = HfClipModel.from_pretrained(model).config.vision_config.image_size
    drawn = draw(strokes[chosen], shown, size, torch.Generator().manual_seed(0))
    queries = [Query("one", f"a photo of {article(digit)}", frozenset({digit})) for digit in DIGITS]
    queries += [Query("one", fact, frozenset({fact})) for ink in INKS for fact in (f"{ink} ink", f"{ink} paper")]
    for digit, ink in sorted({(DIGITS[one.digit], one.ink) for one in trained}):
        queries.append(Query("two", f"a photo of {article(ink)} {digit}", frozenset({digit, f"{ink} ink"})))
    asked = [one for one in trained if one in kept or facts(one) & gone]
    queries += [Query("all", one.caption(), facts(one)) for one in asked]
    return model, [facts(one) for one in shown], [Image.fromarray(pixels) for pixels in drawn], queries


def show_scenes(folder: Path, choose: random.Random) -> Shown:
    train = random.Random(1)
    seen = [random_scene(train, THINGS, list(GROUNDS)) for _ in range(TRAINED_PAIRS)]
    texts = [scene.caption(train) for scene in seen]
    model = train_model(folder / "scenes", (np.asarray(draw_scene(scene, train)) for scene in seen), texts, 450)
    shapes, colour, ground = choose.sample(SHAPES, 2), choose.choice(list(COLOURS)), choose.choice(GROUNDS)
    things = [thing for thing in THINGS if thing.shape not in shapes and thing.colour != colour]
    grounds = [one for one in GROUNDS if one != ground]
    pool = [random_scene(choose, choose.sample(things, 30), grounds) for _ in range(250)]
    shown = choose.choices(pool, [1 / (rank + 3) for rank in range(len(pool))], k=IMAGES)

    def facts(scene: Scene) -> Facts:
        return frozenset({scene.ground}.union(*({thing.text(), thing.shape} for thing in scene.things)))

    queries = [Query("two", thing.text(), frozenset({thing.text()})) for thing in THINGS]
    queries += [Query("one", article(shape), frozenset({shape})) for shape in SHAPES]
    queries += [Query("one", GROUND_TEXTS[one], frozenset({one})) for one in GROUNDS]
    for shape, one in itertools.product(SHAPES, GROUNDS):
        queries.append(Query("two", f"{article(shape)} on {GROUND_TEXTS[one]}", frozenset({shape, one})))
    others = [random_scene(choose, THINGS, list(GROUNDS)) for _ in range(120)]
    for scene in dict.fromkeys([*pool[:120], *others]):
        said = " and ".join(sorted(thing.text() for thing in scene.things))
        queries.append(Query("all", f"{said} on {GROUND_TEXTS[scene.ground]}", facts(scene)))
    return model, [facts(scene) for scene in shown], [draw_scene(scene, choose) for scene in shown], queries


def show_photos(folder: Path, choose: random.Random) -> Shown:
    photos = {name: load_photograph(name) for name in NAMES}
    train = random.Random(1)
    seen = [(train.choice(list(NAMES)), train.choice(FLIPS), train.choice(list(TINTS))) for _ in range(TRAINED_PAIRS)]
    texts = [caption(*one, train) for one in seen]
    crops = (np.asarray(make_crop(photos[name], False, flip, tint, train)) for name, flip, tint in seen)
    model = train_model(folder / "photos", crops, texts, 250)
    inside, tints = choose.sample(list(NAMES), 13), choose.sample(list(TINTS), 2)
    names = choose.choices(inside, [1 / (rank + 2) for rank in range(len(inside))], k=IMAGES)
    shown = [(name, choose.choice(FLIPS), choose.choice(tints)) for name in names]
    images = [make_crop(photos[name], True, flip, tint, choose) for name, flip, tint in shown]
    groups = {name: {group for group, members in GROUPS.items() if name in members} for name in NAMES}
    facts = [frozenset({*one, *groups[one[0]]}) for one in shown]
    queries = [Query("one", f"a photo of {text}", frozenset({text})) for text in (*NAMES, *GROUPS)]
    for name, tint in itertools.product(NAMES, filter(None, TINTS)):
        queries.append(Query("two", f"a photo of {name}{tint}", frozenset({name, tint})))
        queries.append(Query("all", f"a photo of {name}{FLIPS[1]}{tint}", frozenset({name, FLIPS[1], tint})))
    return model, facts, images, queries


def judge(name: str, given: Shown) -> tuple[Judged, Judged]:
    """Encode a data set: queries by text, and by images that are not in the index, some without any of their kind."""
    folder, shown, images, queries = given
    model, processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
    features = encode_images(model, processor, images, batch_size=256)
    matrix = EmbeddingMatrix(torch.arange(IMAGES), features.half())
    texts = encode_texts(model, processor, [query.text for query in queries], truncation=True)
    nouns = encode_texts(model, processor, list(REFERENCE_TEXTS), truncation=True)
    right = torch.tensor([[query.facts <= facts for facts in shown] for query in queries])
    kinds = [query.kind if some else "none" for query, some in zip(queries, right.any(dim=1), strict=True)]
    scores, reference = matrix.similarities(texts), measure_references(matrix, nouns, TEXT_GATES)
    least = torch.tensor([least_score(row, reference, TEXT_GATES) for row in scores])
    by_text = Judged(f"{name}, by text", matrix, scores, right, kinds, least)

    choose = random.Random(0)
    labels = [" ".join(sorted(facts - {*FLIPS})) for facts in shown]
    gone = set(choose.sample(sorted(set(labels)), max(1, len(set(labels)) // 5)))
    asked = choose.sample(range(IMAGES), IMAGE_QUERIES)
    kept = torch.tensor(sorted({n for n in range(IMAGES) if labels[n] not in gone} - set(asked)))
    matrix = EmbeddingMatrix(kept, features[kept].half())
    right = torch.tensor([[labels[n] == labels[place] for place in kept.tolist()] for n in asked])
    places = sample_places(len(kept), REFERENCE_IMAGES)
    reference = measure_references(matrix, matrix.embeddings[places].float(), IMAGE_GATES, places)
    scores = matrix.similarities(features[asked])
    least = torch.tensor([least_score(row, reference, IMAGE_GATES) for row in scores])
    kinds = ["some" if any_right else "none" for any_right in right.any(dim=1)]
    return by_text, Judged(f"{name}, by image", matrix, scores, right, kinds, least)


def best_threshold(sets: Sequence[Judged]) -> float:
    grid = torch.linspace(0, 1, 201).tolist()
    return max(grid, key=lambda threshold: sum(judged.flat(threshold) for judged in sets))


def without_hubs(judged: Judged) -> Tensor:
    """Scores less half of each image's mean similarity to its nearest neighbours (CSLS, Conneau et al. 2018)."""
    features = judged.matrix.embeddings.float()
    similar = features @ features.T
    similar.fill_diagonal_(-torch.inf)
    return judged.scores - 0.5 * similar.topk(NEIGHBOURS, dim=1).values.mean(dim=1)


COLUMNS = ("top 20", "flat own", "split", "others", "cutoff", "none own", "cutoff", "R@10 all", "own", "cutoff")


def measure_set(runs: list[list[Judged]], which: int, seed: int) -> list[float]:
    """The values of `COLUMNS` for one data set in one run."""
    judged = runs[seed][which]
    own = best_threshold([judged])
    split = best_threshold([run[which] for run in runs if run is not runs[seed]])
    others = best_threshold([other for other in runs[seed] if other is not judged])
    shown = judged.scores >= judged.least[:, None]
    none = ~judged.right.any(dim=1)
    twenty = judged.scores >= judged.scores.topk(20, dim=1).values[:, -1:]
    f1 = [judged.mean(judged.f1(twenty)), *(judged.flat(threshold) for threshold in (own, split, others))]
    f1.append(judged.mean(judged.f1(shown)))
    refused = [float((~found[none].any(dim=1)).float().mean()) for found in (judged.scores >= own, shown)]
    recall = [judged.recall(judged.scores, 10, least) for least in (-torch.inf, own, judged.least)]
    return [*f1, *refused, *recall]


def print_cutoffs(runs: list[list[Judged]]) -> None:
    print(f"{'':18}", *(f"{name:>8}" for name in COLUMNS))
    for which, judged in enumerate(runs[0]):
        values = np.mean([measure_set(runs, which, seed) for seed in range(len(runs))], axis=0)
        print(f"{judged.name:18}", *(f"{value:>8.3f}" for value in values))


def print_hubs(runs: list[list[Judged]]) -> None:
    print("\nrecall@1, 5, 10 as they are → less half of the similarity to neighbours")
    for same in zip(*runs, strict=True):
        found = []
        for k in (1, 5, 10):
            before = np.mean([judged.recall(judged.scores, k) for judged in same])
            after = np.mean([judged.recall(without_hubs(judged), k) for judged in same])
            found.append(f"{before:.3f} → {after:.3f}")
        print(f"{same[0].name:18}", "   ".join(found))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the data and the models, which a second run finds there")
    folder = parser.parse_args(arguments).folder
    makers = {"digits": show_digits, "scenes": show_scenes, "photos": show_photos}
    by_text: list[list[Judged]] = []
    by_image: list[list[Judged]] = []
    for seed in SEEDS:
        pairs = [judge(name, make(folder, random.Random(seed))) for name, make in makers.items()]
        by_text.append([pair[0] for pair in pairs])
        by_image.append([pair[1] for pair in pairs])
    print(headline(describe(torch.get_num_threads())))
    for runs in (by_text, by_image):
        print_cutoffs(runs)
    for runs in (by_text, by_image):
        print_hubs(runs)


if __name__ == "__main__":
    main()
