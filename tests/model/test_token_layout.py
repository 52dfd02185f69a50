"""How ids become rows, against lists that are cut and filled one by one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clip.model.token_layout import Layout

START, END, PAD = 900, 901, 902


def row_of(ids: list[int], layout: Layout) -> list[int]:
    if layout.limit is not None:
        kept = max(layout.limit - layout.special, 0)
        ids = ids[max(len(ids) - kept, 0) :] if layout.truncation_side == "left" else ids[:kept]
    return [START, *ids, END] if layout.add_special_tokens else ids


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 800), max_size=12), max_size=8),
    add_special_tokens=st.booleans(),
    limit=st.none() | st.integers(0, 14),
    truncation_side=st.sampled_from(["left", "right"]),
    padding_side=st.sampled_from(["left", "right"]),
    to_length=st.sampled_from([0, 9, 130]),
    multiple=st.sampled_from([1, 8]),
)
def test_rows_are_those_of_single_texts(texts, **given_settings):
    layout = Layout(is_padded=True, start_id=START, end_id=END, pad_id=PAD, pad_token="", **given_settings)
    ids = np.array([number for text in texts for number in text], dtype=np.int32)
    found = layout.arrange(ids, np.array([len(text) for text in texts], dtype=np.int64))
    rows = [row_of(text, layout) for text in texts]
    width = layout.width(max(map(len, rows), default=layout.special))
    filled = [[PAD] * (width - len(row)) for row in rows]
    is_left = layout.padding_side == "left"
    expected = [pad + row if is_left else row + pad for row, pad in zip(rows, filled, strict=True)]
    shown = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, filled, strict=True)]
    assert found["input_ids"].tolist() == expected
    assert found["attention_mask"].tolist() == (shown if is_left else [mask[::-1] for mask in shown])
    assert {values.dtype for values in found.values()} == {np.dtype(np.int64)}
    assert {values.shape for values in found.values()} == {(len(texts), width)}
