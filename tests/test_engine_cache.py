"""The cache of decoded tokens: what each hypothesis sees, and its size."""

import pytest
import torch
from transformers import GenerationMixin

from vanilla_transformer.engine_cache import TargetCache


pytestmark = pytest.mark.usefixtures("packed_engine")


@pytest.fixture(scope="session")
def source(padded):
    return dict(zip(("input_ids", "attention_mask"), padded(side="left"), strict=True))


class TestTargetCache:
    """Beams that die and split at random: each sees its own ancestors and nothing else, in little memory."""

    @pytest.mark.parametrize("capacity", [1, 32])
    @pytest.mark.parametrize("width", [1, 2, 5])
    def test_hypotheses_see_their_ancestors(self, monkeypatch, width, capacity):
        monkeypatch.setattr(TargetCache, "CAPACITY", capacity)
        generator = torch.Generator().manual_seed(width)
        rows, heads, layers = 6, 2, 2
        cache = TargetCache(layers, rows, heads, 3, 4, True, torch.device("cpu"))
        histories: list[list[list[float]]] = [[[]] for _ in range(rows)]  # values by row and hypothesis
        wide = 1
        for step in range(60):
            cache.make_room(wide)
            new = torch.rand(rows, wide, generator=generator)
            for layer in range(layers):
                sign = 1 - 2 * layer
                keys, values = cache.append(
                    layer,
                    (sign * new)[:, :, None, None].expand(rows, wide, heads, 3),
                    (sign * new + 1)[:, :, None, None].expand(rows, wide, heads, 4),
                )
                mask = cache.mask_for_heads()
                assert keys.shape == (rows * heads, cache.length, 3)
                assert values.shape == (rows * heads, cache.length, 4)
                assert mask.shape == (rows * heads, wide, cache.length)
                for row in range(len(histories)):
                    for beam in range(wide):
                        history = torch.tensor([*histories[row][beam], float(new[row, beam])])
                        for head in range(heads):
                            seen = mask[row * heads + head, beam] == 0
                            mine = keys[row * heads + head, seen], values[row * heads + head, seen]
                            assert torch.equal(mine[0], (sign * history)[:, None].expand(-1, 3))
                            assert torch.equal(mine[1], (sign * history + 1)[:, None].expand(-1, 4))
            grown = [
                [[*histories[row][beam], float(new[row, beam])] for beam in range(wide)]
                for row in range(len(histories))
            ]
            parents = torch.randint(0, wide, (rows, width), generator=generator)
            cache.move_beams(parents)
            histories = [[grown[row][parent] for parent in parents[row].tolist()] for row in range(rows)]
            wide = width
            if step in (20, 40):  # sentences leave
                kept = torch.tensor([0, 2, 3]) if step == 20 else torch.tensor([1, 2])
                cache.keep(kept)
                histories, rows = [histories[row] for row in kept.tolist()], len(kept)

    def test_memory_follows_the_distinct_histories(self):
        width, steps = 8, 400
        cache = TargetCache(1, 2, 1, 1, 1, True, torch.device("cpu"))
        for step in range(steps):
            wide = width if step else 1
            cache.make_room(wide)
            cache.append(0, torch.zeros(2, wide, 1, 1), torch.zeros(2, wide, 1, 1))
            # All continue the best hypothesis: the common part is stored once.
            cache.move_beams(torch.zeros(2, width, dtype=torch.long))
            columns = cache.keys[0].shape[2]
            assert columns <= max(32, 1.6 * (step + 1) + 16 * width)
        assert columns < steps * width / 4

    @pytest.mark.parametrize("options", [{"num_beams": 5}, {"num_beams": 1}, {"num_beams": 6, "num_beam_groups": 2}])
    def test_its_size_changes_no_output(self, lively_model, source, monkeypatch, options):
        model = lively_model()
        arguments = {**source, **options, "max_new_tokens": 60, "min_new_tokens": 45, "return_dict_in_generate": True}
        outputs = []
        for capacity in (1000, 1):
            monkeypatch.setattr(TargetCache, "CAPACITY", capacity)
            outputs.append(model.generate(**arguments))
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        if "num_beam_groups" not in options:
            assert torch.equal(outputs[0].sequences, GenerationMixin.generate(model, **arguments).sequences)
