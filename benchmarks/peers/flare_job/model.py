"""The model that the server starts from."""

import torch

TENSORS = 20


class Weights(torch.nn.Module):
    def __init__(self, elements: int):
        super().__init__()
        self.elements = elements
        torch.manual_seed(0)
        self.layers = torch.nn.ParameterList(torch.randn(elements) for _ in range(TENSORS))
