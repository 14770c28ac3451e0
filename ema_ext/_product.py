"""Products of many coefficients, and the carries that they bring from piece to piece.

A product over a long stretch soon leaves the range of float64, though what it is multiplied with
may bring it back: 2 ** 1500 times 1e-300 is a fine number. Here it has an exponent of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

#: Factors multiplied at a time. Those that stay within 2 ** +-64 on the average, as coefficients
#: do, cannot leave float64 meanwhile; others are multiplied once more by mantissas.
BLOCK = 16
#: Beyond 2 ** +-REACH every float64 but 0 becomes infinite, or 0.
REACH = 2200
#: Numbers that a fold prepares at a time: they stay in the cache.
FOLD_BLOCK = 2**16


class Product(NamedTuple):
    """mantissa * 2 ** exponent, both float64, of the shape of a state or one that expands to it.

    |mantissa| lies in [0.5, 1); or it is 0, infinite or NaN, where the product itself is.
    """

    mantissa: Tensor
    exponent: Tensor

    @staticmethod
    def of(factors: Tensor, dim: int) -> Product:
        """The product of float64 factors along ``dim``; 1 where there are none."""
        mantissa = factors.movedim(dim, -1)
        exponent = mantissa.new_zeros(mantissa.shape[:-1])
        while True:
            length = mantissa.shape[-1]
            count = max(-(-length // BLOCK), 1)
            missing = count * BLOCK - length
            blocks = pad(mantissa, (0, missing), value=1.0) if missing else mantissa
            blocks = blocks.reshape(*blocks.shape[:-1], count, BLOCK)
            mantissa, shift = _multiplied(blocks)
            exponent = exponent + shift.sum(-1)
            if count == 1:
                return Product(mantissa[..., 0], exponent)

    @staticmethod
    def power(base: Tensor, log: Tensor, steps: int) -> Product:
        """base ** steps, steps >= 1, from log|base|, which may be known better than base is."""
        total = log * (steps / math.log(2))
        exponent = total.floor() + 1
        usual = total.isfinite()
        mantissa = torch.where(usual, torch.exp2(total - exponent), base.abs())
        if steps % 2:
            mantissa = mantissa.copysign(base)
        return Product(mantissa, torch.where(usual, exponent, 0.0))

    @staticmethod
    def chain(products: Sequence[Product]) -> Product:
        """The product of products of one shape."""
        if len(products) == 1:
            return products[0]
        stacked = Product.stack(products)
        product = Product.of(stacked.mantissa, 0)
        return Product(product.mantissa, product.exponent + stacked.exponent.sum(0))

    @staticmethod
    def stack(products: Sequence[Product]) -> Product:
        """Several side by side, along a new first dimension."""
        mantissas, exponents = zip(*products, strict=True)
        return Product(torch.stack(mantissas), torch.stack(exponents))


def fold(aggregates: Tensor, products: Product, start: Tensor) -> Tensor:
    """The state before the first piece, which is ``start``, and after each: (pieces + 1, *rows).

    A piece takes a state to aggregate + product * state. What is not finite behaves as in the loop:
    an infinite state stays so through any product but 0, whatever underflows.
    """
    pieces, rows = len(aggregates), max(start.numel(), 1)
    states = aggregates.new_empty((pieces + 1, *aggregates.shape[1:]))
    states[0] = start
    step = max(1, FOLD_BLOCK // rows)
    for first in range(0, pieces, step):
        here = slice(first, first + step)
        scales = _scales(products.exponent[here])
        for i, (aggregate, mantissa, *factors) in enumerate(
            zip(aggregates[here], products.mantissa[here], *scales, strict=True), first
        ):
            carried = mantissa * states[i]
            for factor in factors:
                carried *= factor
            torch.add(aggregate, carried, out=states[i + 1])
    return states


def _scales(exponent: Tensor) -> list[Tensor]:
    """Four powers of two whose product is 2 ** exponent: multiplied with one after the other, none
    leaves the range of float64 where the result does not."""
    whole = exponent.clamp(-REACH, REACH).long()
    return [((((whole + i) >> 2) + 1023) << 52).view(torch.float64) for i in range(4)]


def _multiplied(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The products along the last dimension, as mantissas and exponents."""
    product = blocks.prod(-1)
    mantissa, exponent = _frexp(product)
    size = product.abs()
    lost = ~((size > 2.0**-1000) & (size < 2.0**1000))
    if bool(lost.any()):
        mantissas, exponents = _frexp(blocks[lost])
        mantissa[lost], shift = _frexp(mantissas.prod(-1))
        exponent[lost] = exponents.sum(-1) + shift
    return mantissa, exponent


def _frexp(value: Tensor) -> tuple[Tensor, Tensor]:
    mantissa, exponent = torch.frexp(value)
    return mantissa, torch.where(value.isfinite(), exponent, 0).double()
