"""Training and evaluation mode of models."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for the time being; its mode is restored, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
