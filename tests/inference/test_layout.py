"""Weights laid out for decoding: the same numbers in another order, the model as it was."""

import pytest
import torch
import torch.nn.functional as F

from minillm.architecture.transformer import Config, Transformer
from minillm.inference.layout import Packed, by_columns, for_decoding

SMALL = dict(vocabulary=61, width=24, layers=2, heads=4, kv_heads=2, head_size=10, hidden=28, context=40)
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")


def build(**options):
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL | options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.ndim == 1))
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, dict(tied=False, qk_norm=True), dict(experts=4)], ids=["tied", "untied", "experts"]
)
def test_the_copy_is_the_same_function(options, batch):
    model, ids = build(**options), torch.randint(61, (batch, 9), generator=torch.Generator().manual_seed(0))
    twin = for_decoding(model, batch=batch)
    torch.testing.assert_close(twin(ids), model(ids), rtol=1e-4, atol=1e-4)  # another order of adding up, two layers
    assert not list(twin.parameters())
    assert not twin.training


def test_the_model_is_left_alone():
    model = build().train()
    before = {name: (p.data_ptr(), p.stride(), p.clone()) for name, p in model.named_parameters()}
    twin = for_decoding(model)
    assert model.training
    assert twin.embedding.data_ptr() == model.embedding.data_ptr()  # rows are taken from it: no copy
    for name, p in model.named_parameters():
        place, stride, value = before[name]
        assert (p.data_ptr(), p.stride()) == (place, stride)
        assert torch.equal(p, value)
        assert p.requires_grad


def test_one_row_reads_columns():
    twin = for_decoding(build())
    block = twin.blocks[0]
    for weight in (block.qkv, block.out, block.gate_up, block.down, twin.unembedding):
        assert weight.stride() == (1, weight.shape[0])


@ONEDNN
def test_several_rows_read_blocks():
    twin = for_decoding(build(), batch=3)
    block = twin.blocks[0]
    for weight in (block.qkv, block.out, block.gate_up, block.down, twin.unembedding):
        assert isinstance(weight, Packed)


def test_without_onednn_several_rows_read_columns(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert for_decoding(build(), batch=3).blocks[0].qkv.stride() == (1, 80)


def test_by_columns_keeps_the_matrix():
    weight = torch.randn(5, 7)
    assert torch.equal(by_columns(weight), weight)
    assert by_columns(weight).t().is_contiguous()


@ONEDNN
@pytest.mark.parametrize("shape", [(4, 33), (2, 3, 33), (1, 1, 33)])
def test_a_packed_matrix_multiplies_as_it_would_unpacked(shape):
    weight, x = torch.randn(50, 33), torch.randn(shape)
    packed = Packed(weight, 4)
    torch.testing.assert_close(F.linear(x, packed), F.linear(x, weight))
    assert packed.shape == weight.shape
    assert packed.untyped_storage().nbytes() == 4  # the values are in `blocks` only


def test_half_precision_needs_no_copy():
    model = build().bfloat16()
    assert for_decoding(model, batch=3) is model
