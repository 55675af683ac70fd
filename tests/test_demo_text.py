"""The demo's text and model."""

import pytest
import torch
from helpers.comparing import assert_same

from fusedopt.demo.model import GPT
from fusedopt.demo.text import DEFAULT_BYTES, Text, read_text


class TestText:
    def test_default_is_python_source_and_always_the_same(self):
        text = read_text()
        assert text == read_text()
        assert 10**6 < len(text) <= DEFAULT_BYTES
        assert b"\nimport " in text

    @pytest.mark.parametrize("path", ["nowhere", "."])
    def test_unreadable(self, tmp_path, path):
        with pytest.raises(ValueError, match="cannot read the text"):
            read_text(str(tmp_path / path))

    def test_parts_do_not_overlap(self):
        train_part, held_out = b"t" * 900, b"h" * 100
        text = Text(train_part + held_out, context=8)
        generator = torch.Generator().manual_seed(0)
        tokens, targets = text.batch(2000, generator)
        assert set(tokens.unique().tolist()) | set(targets.unique().tolist()) == {ord("t")}
        tokens, targets = text.held_out(50)
        assert set(tokens.unique().tolist()) | set(targets.unique().tolist()) == {ord("h")}

    def test_targets_follow_tokens(self):
        text = Text(bytes(range(250)), context=16)
        tokens, targets = text.batch(32, torch.Generator().manual_seed(0))
        assert_same(targets, tokens + 1)
        assert len(tokens[:, 0].unique()) > 10

    def test_places_in_a_text_longer_than_float32_can_count(self):
        """Places are computed in integers, for any size; no text of that size is made."""
        text = Text(b"x" * 200, context=4)
        size = 10**9 + 7
        asked = []

        class Windows:
            def __len__(self):
                return size

            def __getitem__(self, places):
                asked.extend(places.tolist())
                return torch.zeros(len(places), 5, dtype=torch.uint8)

        text._held_out = Windows()
        text.held_out(64)
        assert asked == [k * (size - 1) // 63 for k in range(64)]
        assert asked[0] == 0 and asked[-1] == size - 1
        asked.clear()
        text.held_out(1)
        assert asked == [0]

    @pytest.mark.parametrize("size", [0, 1, 89])
    def test_too_small(self, size):
        with pytest.raises(ValueError, match=f"the text has {size} bytes, too few .* 90 are needed"):
            Text(b"x" * size, context=8)
        Text(b"x" * 90, context=8)


def test_the_model_does_not_look_ahead():
    torch.manual_seed(0)
    model = GPT(layers=2, width=64, context=12)
    tokens = torch.randint(256, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = torch.randint(256, (5,))
    before, after = model(tokens), model(changed)
    assert_same(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])
