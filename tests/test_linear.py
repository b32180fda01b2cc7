"""The packed product is the plain one, and is taken only where it exists and is faster."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pipeline import linear

PACKS = pytest.mark.skipif(not linear.can_pack(), reason="this build of PyTorch has no packed product")


def example(rows=7, inputs=33, outputs=18):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) for shape in ((2, rows, inputs), (outputs, inputs), (outputs,)))


@PACKS
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("turned", [True, False], ids=["a view", "contiguous"])
def test_the_packed_product_is_the_plain_one(biased, turned):
    x, weight, bias = example()
    if turned:
        weight = weight.T.contiguous().T
    bias = bias if biased else None
    with torch.inference_mode():
        found = linear.packed(weight, bias)(x)
    assert_close(found, F.linear(x, weight, bias))


@PACKS
def test_a_row_has_the_same_bits_whatever_the_others_hold():
    x, weight, bias = example(rows=16)
    product = linear.packed(weight, bias)
    other = torch.cat([x[:1], 100 * x[1:]])
    assert torch.equal(product(x)[0], product(other)[0])


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_are_never_packed(monkeypatch, kind):
    monkeypatch.setattr(linear, "prefers_packed", lambda: True)
    monkeypatch.setattr(linear, "packed", lambda *given: pytest.fail("packed"))
    x, weight, bias = (tensor.to(kind) for tensor in example())
    assert torch.equal(linear.linear(weight, bias)(x), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("maker", "able", "packs"),
    [("AuthenticAMD", True, True), ("GenuineIntel", True, False), ("AuthenticAMD", False, False)],
)
def test_packed_weights_are_taken_by_the_maker_of_the_processor(monkeypatch, maker, able, packs):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(linear, "processor", lambda: maker)
    monkeypatch.setattr(linear, "can_pack", lambda: able)
    linear.prefers_packed.cache_clear()
    try:
        assert linear.prefers_packed() is packs
    finally:
        linear.prefers_packed.cache_clear()


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_a_build_without_the_packed_product_is_no_error(monkeypatch, error):
    def missing(weight, bias):
        raise error("no such operator")

    monkeypatch.setattr(linear, "packed", missing)
    linear.can_pack.cache_clear()
    try:
        assert linear.can_pack() is False
    finally:
        linear.can_pack.cache_clear()


def test_the_processor_has_a_maker():
    assert linear.processor()
