"""A copy laid out for decoding computes what the model computes, and leaves the model alone."""

import pytest
import torch

from minillm.architecture.transformer import Config, Transformer
from minillm.inference.generate import generate
from minillm.inference.layout import by_columns, for_decoding

CONFIG = Config(vocabulary=70, width=32, layers=2, heads=4, kv_heads=2, head_size=8, hidden=48, context=64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Transformer(CONFIG)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_copy_gives_the_same_logits_and_tokens(model, batch):
    twin = for_decoding(model, batch=batch)
    ids = torch.randint(0, 70, (batch, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(twin(ids), model(ids), rtol=1e-4, atol=1e-4)  # sums in another order, logits of size 6
    assert torch.equal(generate(twin, ids, new_tokens=20), generate(model, ids, new_tokens=20))


def test_the_model_is_left_alone_and_the_copy_does_not_follow_it(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = for_decoding(model)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = twin(ids)
        for p in model.parameters():
            p.mul_(1.0)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        model.blocks[0].out.zero_()
        assert torch.equal(twin(ids), expected)
        assert not torch.equal(model(ids), expected)


def test_other_models_are_used_as_they_are(model):
    half = model.to(torch.bfloat16)
    assert for_decoding(half) is half


def test_columns_keep_shape_and_values():
    weight = torch.randn(3, 5)
    assert by_columns(weight).stride() == (1, 3)
    assert torch.equal(by_columns(weight), weight)
