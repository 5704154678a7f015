"""The Edifice JEPA's functions and their counterparts here, each with the claims that its own tests make."""

import pytest
import torch
from torch import nn

from jepa_hf import FeatureEncoderConfig, FeatureEncoderModel, JepaConfig, JepaForRepresentationPrediction
from jepa_hf.models.losses import smooth_l1
from jepa_hf.models.predictors import SingleTokenPredictor
from jepa_hf.training.ema import match_parameters, update_target

SMALL = {"embed_dim": 16, "predictor_embed_dim": 8, "encoder_depth": 2, "predictor_depth": 2, "num_heads": 4}


def flat(input_dim: int, **options: float) -> JepaForRepresentationPrediction:
    return JepaForRepresentationPrediction(JepaConfig.for_features(input_dim, mode="flat", **options))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_build_gives_a_context_encoder_and_a_predictor_of_its_sizes() -> None:
    """Input 287 and the defaults: 4,812,800 and 859,264 parameters; the small network of its tests: 7,120 and 2,040."""
    model = flat(287)
    assert (size(model.context_encoder), size(model.predictor)) == (4_812_800, 859_264)
    model = flat(32, **SMALL)
    assert (size(model.context_encoder), size(model.predictor)) == (7_120, 2_040)


def test_build_encoder_maps_vectors_to_embeddings() -> None:
    config = FeatureEncoderConfig(
        32, mode="flat", embed_dim=16, encoder_depth=2, num_heads=4, mlp_ratio=4.0, dropout=0.1
    )
    output = FeatureEncoderModel(config).eval()(features=torch.randn(4, 32)).pooler_output
    assert output.shape == (4, 16)
    assert output.isfinite().all()


def test_build_predictor_maps_embeddings_to_embeddings() -> None:
    predictor = SingleTokenPredictor(
        16, 8, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=4.0, dropout=0.1
    ).eval()
    assert size(predictor) == 2_040
    output = predictor(torch.randn(4, 1, 16), *(torch.zeros(4, 1, dtype=torch.long),) * 4)
    assert output.shape == (4, 1, 16)
    assert output.isfinite().all()


@pytest.mark.parametrize(("momentum", "expected"), [(0.5, 5.0), (0.0, 10.0), (1.0, 0.0)])
def test_ema_update_moves_nested_parameters(momentum: float, expected: float) -> None:
    """target <- momentum * target + (1 - momentum) * context: 0 and 10 give 5 at 0.5; 0 copies, 1 keeps."""

    def nested(value: float) -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2)))
        for parameter in module.parameters():
            nn.init.constant_(parameter, value)
        return module

    context, target = nested(10.0), nested(0.0)
    update_target(*match_parameters(context.named_parameters(), target.named_parameters()), momentum)
    assert {value.item() for parameter in target.parameters() for value in parameter.flatten()} == {expected}
    assert {value.item() for parameter in context.parameters() for value in parameter.flatten()} == {10.0}


def test_loss_is_the_mean_smooth_l1() -> None:
    """Zero for equal vectors, never negative, larger for larger distances, beta 1."""
    one = torch.ones(4, 16)
    losses = [smooth_l1(one, other * torch.ones(4, 16)).mean().item() for other in (1.0, 1.1, 5.0)]
    assert losses == pytest.approx([0.0, 0.5 * 0.1**2, 3.5], abs=1e-6)


def test_output_size_defaults_and_momentum() -> None:
    config = JepaConfig.for_features(287)
    assert JepaConfig.for_features(32, **SMALL).hidden_size == 16
    assert config.hidden_size == 256
    assert config.ema_decay_range == (0.996, 0.996)
    encoder = config.encoder_config
    assert (encoder.embed_dim, encoder.encoder_depth, encoder.num_heads, encoder.mlp_ratio) == (256, 6, 8, 4.0)
    assert (encoder.dropout, config.pred_dropout) == (0.1, 0.1)
    assert (config.pred_hidden_size, config.pred_num_hidden_layers, config.pred_num_attention_heads) == (128, 4, 8)
    assert (config.loss, config.smooth_l1_beta) == ("smooth_l1", 1.0)
    with pytest.raises(TypeError, match="input_dim"):
        JepaConfig.for_features()


def test_explicit_values_win() -> None:
    config = JepaConfig.for_features(
        10,
        dropout=0.2,
        pred_dropout=0.0,
        pred_hidden_size=24,
        average_top_k_layers=3,
        loss="l2",
        predictor_embed_dim=64,
    )
    assert (config.encoder_config.dropout, config.pred_dropout) == (0.2, 0.0)
    assert (config.pred_hidden_size, config.average_top_k_layers, config.loss) == (24, 3, "l2")


def test_a_flat_step_is_the_document_s_formula() -> None:
    """Without dropout and normalisation: smooth L1 between predictor(context encoder(view)) and target encoder."""
    torch.manual_seed(0)
    model = flat(32, **SMALL, dropout=0.0, target_norm="none").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vectors, view = torch.randn(2, 5, 32)
    positions = torch.zeros(5, 1, 1, dtype=torch.long)
    output = model(features=vectors, context_features=view, target_positions=positions, target_valid=positions == 0)
    context = model.context_encoder(features=view).pooler_output
    blind = (positions[:, 0],) * 4
    guess = model.predictor(context[:, None], *blind)[:, 0]
    target = model.target_encoder(features=vectors).pooler_output
    torch.testing.assert_close(output.loss, nn.functional.smooth_l1_loss(guess, target))
