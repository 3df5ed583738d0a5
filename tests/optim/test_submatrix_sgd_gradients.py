"""What users do to the gradients of kept rows and columns before the optimizer's step."""

from __future__ import annotations

import pytest
import torch

from batchlab import nn
from batchlab.optim import SubmatrixSGD


def _chain() -> tuple[nn.SubmatrixSequential, SubmatrixSGD]:
    torch.manual_seed(0)
    chain = nn.SubmatrixSequential(
        nn.BatchwiseDropout(0.5),
        torch.nn.Linear(6, 6),
        nn.BatchwiseDropout(0.5),
        torch.nn.Linear(6, 3),
        mode="submatrix",
    )
    return chain, SubmatrixSGD(chain.parameters(), lr=0.1, weight_decay=0.5)


def test_rows_can_be_set_to_zero_and_a_view_says_that_it_cannot_be_written_to() -> None:
    chain, _ = _chain()
    chain(torch.randn(4, 6)).sum().backward()
    gradient = chain[1].weight.grad
    dense = gradient.to_dense()
    assert torch.equal(gradient.view(-1), dense.view(-1))
    assert torch.equal(torch.cat([gradient[1], gradient.t()[2]]), torch.cat([dense[1], dense.t()[2]]))
    for write in (
        lambda: gradient.view(-1).zero_(),
        lambda: gradient.t().mul_(0),
        lambda: gradient[1].fill_(1),
        lambda: torch._foreach_mul_([gradient[1]], 2.0),
        lambda: torch.add(dense[0], 1, out=gradient[0]),
    ):
        with pytest.raises(RuntimeError, match="would be lost"):
            write()
    assert torch.equal(gradient.to_dense(), dense)
    gradient[:3] = 0
    gradient[4, 5] = 7
    dense[:3] = 0
    dense[4, 5] = 7
    assert torch.equal(gradient.to_dense(), dense)


def test_values_clipped_after_accumulation_leave_entries_at_rest() -> None:
    chain, optimizer = _chain()
    weight, took_part = chain[1].weight, torch.zeros(6, 6, dtype=torch.bool)
    before = weight.detach().clone()
    for _ in range(2):
        chain(torch.randn(4, 6)).sum().backward()
        took_part[chain[2].kept[:, None], chain[0].kept] = True
    expected = weight.grad.to_dense().clamp(-0.05, 0.05)
    torch.nn.utils.clip_grad_value_(chain.parameters(), 0.05)
    assert torch.equal(weight.grad.to_dense(), expected)
    optimizer.step()
    assert 0 < took_part.sum() < 36
    stepped = before - 0.1 * (expected + 0.5 * before)
    torch.testing.assert_close(weight.detach(), torch.where(took_part, stepped, before))


def test_a_group_that_asks_for_what_is_not_done_is_refused() -> None:
    parameters = list(torch.nn.Linear(2, 2).parameters())
    for option in ({"maximize": True}, {"dampening": 0.1}):
        with pytest.raises(ValueError, match="SubmatrixSGD does not do"):
            SubmatrixSGD([{"params": parameters, **option}], lr=0.1)
