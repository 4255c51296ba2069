"""``orthogonalised`` keeps the singular vectors of a matrix, and makes its singular values nearly one."""

import pytest
import torch

from megagap.ops.orthogonal import COEFFICIENTS, ITERATIONS, orthogonalised

SHAPES = [(24, 24), (8, 40), (40, 8)]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_polynomial_is_applied_to_the_singular_values_and_to_nothing_else(shape):
    given = matrix(*shape)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    values = values / given.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalised(given), left @ values.diag() @ right)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 0.0), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_between_two_thirds_and_one_and_a_quarter(shape, dtype, slack):
    found = orthogonalised(matrix(*shape, dtype)).double()
    values = torch.linalg.svdvals(found)
    # A square matrix has values near 0, which rise by a factor of 3.4445 in an iteration.
    values = values if shape[0] != shape[1] else values[: 3 * shape[0] // 4]
    assert values.min() > 0.65 - slack and values.max() < 1.25 + slack and found.is_contiguous()


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_the_size_of_the_matrix_does_not_matter(scale):
    given = matrix(6, 9, torch.float32)
    torch.testing.assert_close(orthogonalised(given * scale), orthogonalised(given), rtol=1e-4, atol=1e-5)


def test_zeros_stay_zeros_and_what_is_nearly_zero_stays_small():
    assert torch.equal(orthogonalised(torch.zeros(4, 6)), torch.zeros(4, 6))
    assert orthogonalised(matrix(4, 6, torch.float32) * 1e-25).abs().max() < 1e-3
