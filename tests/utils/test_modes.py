"""A model is in evaluation mode for the time being only."""

import pytest
from torch import nn

from jepa_hf.utils.modes import evaluation_mode


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_after_an_error(training: bool) -> None:
    """Dropout would stay off for the rest of a training that survives the error."""
    model = nn.Sequential(nn.Dropout()).train(training)
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.training
        assert not model[0].training
        raise KeyError
    assert model.training == model[0].training == training
