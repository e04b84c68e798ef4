"""How far a result may be from its oracle: as far as rounding takes it, and no further."""

import torch
from torch import Tensor


def assert_within_rounding(actual: Tensor, oracle: Tensor, dense: Tensor) -> None:
    """Allow twice the error of dense torch at the same dtype; the oracle is float64."""
    assert actual.dtype == dense.dtype, f"{actual.dtype} cannot be judged by {dense.dtype}"
    assert actual.shape == oracle.shape == dense.shape, f"{actual.shape}, {oracle.shape}, {dense.shape}"
    own, theirs = ((x.double() - oracle).abs().max() for x in (actual, dense))
    budget = 2 * theirs + torch.finfo(actual.dtype).eps * oracle.abs().max()
    assert own <= budget, f"off by {own:.2e}, budget {budget:.2e}"


def assert_same_maths(actual: Tensor, oracle: Tensor, *, terms: int) -> None:
    """Compare two float64 computations of one formula.

    A sum of n terms is off by at most n units of rounding times the size of its terms. Scores, softmax, output and the
    three sums of the backward pass are no more than six sums in a row, each of at most ``terms`` terms; 8 leaves room
    for exp and log. Infinities have to agree exactly.

    Args:
        actual: float64.
        oracle: float64, of the same shape.
        terms: keys plus width, the most terms in a sum.
    """
    assert actual.dtype == oracle.dtype == torch.float64, f"{actual.dtype}, {oracle.dtype}"
    assert actual.shape == oracle.shape, f"{actual.shape}, {oracle.shape}"
    is_finite = oracle.isfinite()
    assert torch.equal(actual[~is_finite], oracle[~is_finite]), "infinities differ"
    if not is_finite.any():
        return
    off = (actual - oracle)[is_finite].abs().max()
    budget = 8 * terms * torch.finfo(torch.float64).eps * oracle[is_finite].abs().max().clamp(min=1)
    assert off <= budget, f"off by {off:.2e}, budget {budget:.2e}"
