"""The checks that Triton's interpreter makes in these tests find the mistakes that they are there for."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's kernels are not interpreted here", allow_module_level=True)

import triton
import triton.language as tl

from triton_interpreter import to_bf16


class Rows(NamedTuple):
    pointer: Any
    row: int


@triton.jit
def copy_rows(x, y, n, MORE_IN: tl.constexpr, MORE_OUT: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, N)
    values = tl.load(x.pointer + row * x.row + i + SHIFT, mask=i < n + MORE_IN, other=0.0)
    tl.store(y.pointer + row * y.row + i, values, mask=i < n + MORE_OUT)


@triton.jit
def add_up(x, total, N: tl.constexpr, ATOMIC: tl.constexpr, PAST: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + tl.program_id(0) * N + i)
    if ATOMIC:
        tl.atomic_add(total + i + PAST, values)
    else:
        tl.store(total + i, tl.load(total + i) + values)


@triton.jit
def read_two(x, y, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    pointer = tl.where(i < n, x + i, y + (i - n))
    tl.store(out + i, tl.load(pointer))


@triton.jit
def multiply_index(out, factor, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, i * factor)


def copied(x, y, more_in=0, more_out=0, shift=0):
    n = x.shape[1]
    copy_rows[(x.shape[0],)](Rows(x, x.stride(0)), Rows(y, y.stride(0)), n, more_in, more_out, shift, 16)
    return y


def test_sound_kernels_pass():
    x = torch.randn(3, 7)
    assert torch.equal(copied(x, torch.empty(3, 7)), x)
    assert torch.equal(copied(x.repeat(1, 2)[:, 7:], torch.empty(3, 20)[:, 4:11]), x)
    assert torch.equal(copied(x[:1].expand(3, 7), torch.empty(3, 7)), x[:1].expand(3, 7))
    assert copied(x[:0], torch.empty(0, 7)).shape == (0, 7)
    total = torch.zeros(4)
    add_up[(3,)](torch.ones(3, 4), total, 4, True, 0)
    assert torch.equal(total, torch.full((4,), 3.0))
    out = torch.empty(8)
    read_two[(1,)](torch.ones(3), torch.zeros(5), out, 3, 8)
    assert out.tolist() == [1.0] * 3 + [0.0] * 5


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"more_in": 1}, r"copy_rows, program 2: reads 1 elements outside of x.pointer \(3, 7\) .* 1 past its last"),
        ({"more_in": 9}, "program 1: reads 2 elements .* 1 past its last"),
        ({"more_out": 1}, "program 1: writes element 7 of y.pointer .* which program 0 wrote"),
        ({"shift": -1}, "program 0: reads 1 elements outside of x.pointer .* 1 before its first"),
        ({"shift": -8}, "program 0: reads 7 elements outside of x.pointer .* 8 before its first"),
        ({"shift": 2**40}, "program 0: reads 7 elements outside"),
    ],
    ids=lambda v: "_".join(map(str, *v.items())) if isinstance(v, dict) else "",
)
def test_planted_mistakes_are_named(wrong, message):
    with pytest.raises(Exception, match=message):
        copied(torch.randn(3, 7), torch.empty(3, 7), **wrong)


def test_the_last_row_may_not_be_overrun_either():
    with pytest.raises(Exception, match=r"program 0: writes 1 elements outside of y.pointer .* 1 past its last"):
        copied(torch.randn(1, 7), torch.empty(1, 7), more_out=1)


def test_what_lies_between_the_elements_of_a_view_is_not_its_own():
    with pytest.raises(Exception, match=r"program 0: reads 1 elements outside of x.pointer .*between two of its own"):
        copied(torch.randn(3, 20)[:, 4:11], torch.empty(3, 7), more_in=1)
    with pytest.raises(Exception, match=r"writes 1 elements outside of y.pointer .*between two of its own"):
        copied(torch.randn(3, 7), torch.empty(3, 20)[:, 4:11], more_out=1)


def test_a_neighbour_that_is_an_argument_too_does_not_hide_it():
    both = torch.randn(2, 3, 7)
    with pytest.raises(Exception, match=r"program 2: reads 1 elements outside of x.pointer"):
        copied(both[0], both[1], more_in=1)


def test_programs_may_not_meet_but_in_atomics():
    with pytest.raises(Exception, match=r"add_up, program 1: reads element 0 of total .* which program 0 wrote"):
        add_up[(3,)](torch.ones(3, 4), torch.zeros(4), 4, False, 0)
    with pytest.raises(Exception, match=r"add_up, program 0: atomically updates 1 elements outside of total"):
        add_up[(3,)](torch.ones(3, 4), torch.zeros(4), 4, True, 1)


def test_programs_may_not_meet_in_what_is_given_twice_either():
    x = torch.randn(3, 7)
    assert copied(x, x) is x
    with pytest.raises(Exception, match=r"program 1: reads element 7 of x.pointer .* which program 0 wrote"):
        copied(x, x, more_out=1)


def test_each_of_several_tensors_is_checked():
    with pytest.raises(Exception, match=r"reads 1 elements outside of y"):
        read_two[(1,)](torch.ones(3), torch.zeros(4), torch.empty(8), 3, 8)


def test_a_product_beyond_32_bits_is_seen():
    out = torch.zeros(4, dtype=torch.int32)
    multiply_index[(1,)](out, 2**29, 4)
    assert out.tolist() == [0, 2**29, 2**30, 3 * 2**29]
    with pytest.raises(Exception, match="multiply_index: mul overflows int32"):
        multiply_index[(1,)](out, 2**30, 4)


def test_rounding_to_bf16_is_the_hardware_s():
    x = torch.cat([torch.randn(1000), torch.randn(100) * 1e38, torch.tensor([1e-40, -0.0, 3.4e38, float("inf")])])
    assert np.array_equal(to_bf16(x.numpy()).view(np.int16), x.bfloat16().view(torch.int16).numpy())
    nan = torch.from_numpy(to_bf16(np.full(1, np.nan, np.float32)).view(np.int16)).view(torch.bfloat16)
    assert nan.isnan()
