import torch

from megagap.ops import swiglu


def test_result_and_gradients_equal_the_formula_in_float64():
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(5, 7, generator=generator) for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    y = swiglu(gate, up)
    y.backward(grad)
    g, u, above = gate.detach().double(), up.detach().double(), grad.double()
    sigmoid = 1 / (1 + torch.exp(-g))
    for got, wanted in (
        (y, g * sigmoid * u),
        (gate.grad, above * u * sigmoid * (1 + g * (1 - sigmoid))),
        (up.grad, above * g * sigmoid),
    ):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
