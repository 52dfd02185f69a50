"""The table of the nine models: complete, consistent, and helpful about wrong names."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from hf_clip import VARIANTS, HfClipConfig
from hf_clip.model.variants import get_variant

SHARED_TABLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "variants.json"


def test_nine_variants_with_distinct_names_slugs_files_and_checksums():
    rows = list(VARIANTS.values())
    assert len(rows) == 9
    for column in ("name", "slug", "checkpoint", "sha256"):
        assert len({getattr(row, column) for row in rows}) == 9
    assert all(len(row.sha256) == 64 and int(row.sha256, 16) for row in rows)


@pytest.mark.skipif(not SHARED_TABLE.is_file(), reason="the separately measured table is not part of the repository")
def test_rows_equal_the_separately_measured_table():
    measured = {row["variant"]: row for row in json.loads(SHARED_TABLE.read_text())["variants"]}
    assert measured.keys() == VARIANTS.keys()
    for name, theirs in measured.items():
        ours = VARIANTS[name]
        for field in theirs.keys() & {field.name for field in fields(ours)}:
            expected = tuple(theirs[field]) if isinstance(theirs[field], list) else theirs[field]
            assert getattr(ours, field) == expected, (name, field)
        assert ours.total_parameters == theirs["total_parameters"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("ViT-L-14", "ViT-L/14"), ("vit-b/32", "ViT-B/32"), ("clip-rn50x4", "RN50x4"), ("RN50x46", "RN50x4")],
)
def test_unknown_variant_names_the_nine_and_the_nearest(wrong: str, meant: str):
    with pytest.raises(ValueError, match="Unknown CLIP variant") as caught:
        HfClipConfig.from_variant(wrong)
    assert f"Did you mean {meant!r}?" in str(caught.value)
    assert all(name in str(caught.value) for name in VARIANTS)


def test_name_unlike_any_variant_gets_no_suggestion():
    with pytest.raises(ValueError, match="the nine are") as caught:
        get_variant("resnet")
    assert "Did you mean" not in str(caught.value)
