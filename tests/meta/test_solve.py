"""The batched solve against torch's own, its gradient against finite differences, and what a failed task gets."""

from __future__ import annotations

import pytest
import torch

from metatrain.meta.solve import solve


def drawn(tasks: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(tasks, size, size + 2, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(tasks, size, generator=generator, dtype=torch.float64).to(dtype)


def system(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT + torch.eye(x.shape[1], dtype=x.dtype)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 40])
def test_solution_and_gradient_are_those_of_a_general_solve(size: int):
    x, y = (t.requires_grad_() for t in drawn(3, size))
    found = solve(system(x), y)
    expected = torch.linalg.solve(system(x), y.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 1, found.numel(), dtype=x.dtype).view_as(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (x, y)),
        torch.autograd.grad((expected * weights).sum(), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_finite_differences():
    x, y = (t.requires_grad_() for t in drawn(2, 4))
    assert torch.autograd.gradcheck(lambda x, y: solve(system(x), y), (x, y))
    assert torch.autograd.gradcheck(lambda y: solve(system(x.detach()), y), (y,))


def test_float32_is_within_rounding():
    (x, y), (x_32, y_32) = drawn(64, 33), drawn(64, 33, torch.float32)
    torch.testing.assert_close(solve(system(x_32), y_32).double(), solve(system(x), y), rtol=1e-4, atol=1e-5)


def test_a_failed_task_is_not_a_number_and_the_others_are_untouched():
    x, y = drawn(4, 3)
    whole = system(x)
    broken = whole.clone()
    broken[1] = -broken[1]
    broken[2, 0, 0] = torch.nan
    found = solve(broken, y)
    assert found[1:3].isnan().all()
    torch.testing.assert_close(found[[0, 3]], solve(whole, y)[[0, 3]], rtol=0, atol=0)


def test_a_second_derivative_is_refused_not_dropped():
    x, y = (t.requires_grad_() for t in drawn(1, 3))
    (first,) = torch.autograd.grad(solve(system(x), y).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
