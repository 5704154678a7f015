"""Claims about the predictors: what they read, and what they do not."""

import math

import pytest
import torch

from helpers.batches import scale_weights, text_batch, tiny_jepa
from jepa_hf.models.packed_sequences import block_diagonal_mask, document_position_ids, gather_document_ids
from jepa_hf.models.positions import gather_positions, rotary_angles, sincos_positions
from jepa_hf.models.predictors import MLPPredictor, TransformerPredictor

N, C, T, WIDTH, LENGTH = 3, 6, 4, 16, 12


@pytest.fixture
def predictor() -> TransformerPredictor:
    model = TransformerPredictor(
        hidden_size=32, width=WIDTH, num_hidden_layers=2, num_attention_heads=4, grid=(LENGTH,)
    )
    scale_weights(model)
    return model.eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Context and targets that do not overlap; the last two of the context and the last target are padding."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(N)])
    return {
        "context": torch.randn(N, C, 32, generator=generator),
        "context_positions": order[:, :C],
        "context_valid": (torch.arange(C) < C - 2).expand(N, -1).clone(),
        "target_positions": order[:, C : C + T],
        "target_valid": (torch.arange(T) < T - 1).expand(N, -1).clone(),
    }


def test_invalid_context_is_not_read(predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]) -> None:
    before = predictor(**inputs)
    changed = dict(inputs, context=inputs["context"].clone(), context_positions=inputs["context_positions"].clone())
    changed["context"][:, -2:] = 100.0
    changed["context_positions"][:, -2:] = 0
    torch.testing.assert_close(predictor(**changed)[:, :-1], before[:, :-1], rtol=0, atol=1e-5)
    # Valid context is read.
    changed["context"][:, 0] += 1.0
    assert (predictor(**changed) - before)[:, :-1].abs().amax(dim=(1, 2)).min() > 0.1


def test_invalid_targets_are_not_read(predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]) -> None:
    before = predictor(**inputs)
    changed = dict(inputs, target_positions=inputs["target_positions"].clone())
    changed["target_positions"][:, -1] = inputs["target_positions"][:, 0]
    torch.testing.assert_close(predictor(**changed)[:, :-1], before[:, :-1], rtol=0, atol=1e-5)


def test_permuting_the_targets_permutes_the_predictions(
    predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]
) -> None:
    before = predictor(**inputs)
    order = torch.tensor([2, 0, 3, 1])
    permuted = dict(
        inputs, target_positions=inputs["target_positions"][:, order], target_valid=inputs["target_valid"][:, order]
    )
    after = predictor(**permuted)
    torch.testing.assert_close(
        after[inputs["target_valid"][:, order]], before[:, order][inputs["target_valid"][:, order]]
    )
    assert (after - before)[:, 0].abs().max() > 0.1  # the order itself matters to what stands where


def test_permuting_the_context_changes_nothing(
    predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]
) -> None:
    order = torch.tensor([3, 5, 1, 0, 4, 2])
    permuted = inputs | {name: inputs[name][:, order] for name in ("context", "context_positions", "context_valid")}
    torch.testing.assert_close(predictor(**permuted), predictor(**inputs), rtol=0, atol=1e-5)
    # Where a vector stands does matter.
    moved = dict(inputs, context_positions=inputs["context_positions"][:, order])
    assert (predictor(**moved) - predictor(**inputs)).abs().max() > 0.1


def test_a_prediction_depends_on_the_position_of_its_target(
    predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]
) -> None:
    moved = dict(inputs, target_positions=inputs["target_positions"].clone())
    free = [next(p for p in range(LENGTH) if p not in {*row.tolist()}) for row in inputs["target_positions"]]
    moved["target_positions"][:, 0] = torch.tensor(free)
    assert (predictor(**moved) - predictor(**inputs))[:, 0].abs().amax(dim=-1).min() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_block_gives_the_targets_what_it_gives_them_among_all_positions(
    packed: bool, predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]
) -> None:
    """Predictions equal those of a reference that runs every block on all positions."""
    positions = torch.cat([inputs["context_positions"], inputs["target_positions"]], dim=1)
    valid = torch.cat([inputs["context_valid"], inputs["target_valid"]], dim=1)
    mask = valid[:, None, None, :]
    if packed:
        inputs["document_ids"] = (torch.arange(LENGTH) >= 5).long().expand(N, -1)
        mask = block_diagonal_mask(gather_document_ids(inputs["document_ids"], positions, valid))
        positions = document_position_ids(inputs["document_ids"]).gather(1, positions)
    tokens = torch.cat([predictor.embed(inputs["context"]), predictor.mask_token.expand(N, T, -1)], dim=1)
    states = tokens + predictor.position_embeddings[positions]
    angles = rotary_angles(positions, WIDTH // 4)[:, None]
    for layer in predictor.layers:
        states = layer(states, mask, (angles.cos(), angles.sin()))
    expected = predictor.proj(predictor.norm(states))[:, C:]
    torch.testing.assert_close(predictor(**inputs)[inputs["target_valid"]], expected[inputs["target_valid"]])


def test_apart_from_the_table_predictions_depend_on_distances_alone(
    predictor: TransformerPredictor, inputs: dict[str, torch.Tensor]
) -> None:
    """Without the table, moving all positions by a constant changes nothing; moving the targets alone does."""
    with torch.no_grad():
        predictor.position_embeddings = torch.nn.Parameter(torch.zeros(3 * LENGTH, WIDTH))
    before = predictor(**inputs)[inputs["target_valid"]]
    targets_moved = inputs | {"target_positions": inputs["target_positions"] + LENGTH}
    all_moved = targets_moved | {"context_positions": inputs["context_positions"] + LENGTH}
    torch.testing.assert_close(predictor(**all_moved)[inputs["target_valid"]], before, rtol=0, atol=1e-5)
    assert (predictor(**targets_moved)[inputs["target_valid"]] - before).abs().amax(dim=-1).min() > 0.01


def textbook_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor, dropout_p: float = 0.0
) -> torch.Tensor:
    """NaN where nothing may be attended to, which torch's own kernels hide on some devices and in some versions."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~attn_mask, float("-inf")).softmax(dim=-1) @ value


def test_a_row_without_any_valid_position_gives_no_nan_and_no_nan_gradient(
    predictor: TransformerPredictor, inputs: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", textbook_attention)
    full = predictor(**inputs)
    empty = dict(inputs, context_valid=inputs["context_valid"].clone(), target_valid=inputs["target_valid"].clone())
    empty["context_valid"][1], empty["target_valid"][1] = False, False
    predictions = predictor(**empty)
    assert predictions.isfinite().all()
    torch.testing.assert_close(predictions[[0, 2]], full[[0, 2]])
    predictions.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in predictor.parameters())


@pytest.mark.parametrize("grid", [(LENGTH,), (3, 4)])
def test_lines_have_a_learned_table_and_planes_a_fixed_one(grid: tuple[int, ...]) -> None:
    model = TransformerPredictor(hidden_size=32, width=WIDTH, num_hidden_layers=1, num_attention_heads=4, grid=grid)
    assert model.position_embeddings.shape == (12, WIDTH)
    assert ("position_embeddings" in dict(model.named_parameters())) == (len(grid) == 1)
    assert ("position_embeddings" in model.state_dict()) == (len(grid) == 1)


def test_sincos_rows_are_distinct_and_follow_the_formula() -> None:
    rows, columns, width = 5, 7, 12
    table = sincos_positions((rows, columns), width)
    assert table.shape == (rows * columns, width)
    distance = torch.cdist(table, table)
    assert (distance + torch.eye(rows * columns)).min() > 0.1
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            expected = [
                function(place / 10000 ** (index / quarter))
                for place in (row, column)
                for function in (math.sin, math.cos)
                for index in range(quarter)
            ]
            torch.testing.assert_close(table[row * columns + column], torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_mlp_predictor_is_two_linear_maps_around_a_gelu_at_the_target_positions() -> None:
    model = MLPPredictor(hidden_size=32, mlp_ratio=1.5)
    scale_weights(model)
    context, positions = torch.randn(2, 7, 32), torch.tensor([[3, 0], [6, 3]])
    valid = torch.ones(2, 2, dtype=torch.bool)
    predictions = model(
        context, torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool), positions, valid
    )
    assert model.fc1.weight.shape == (48, 32)
    for row in range(2):
        for column in range(2):
            hidden = model.fc1.weight @ context[row, positions[row, column]] + model.fc1.bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            expected = model.fc2.weight @ hidden + model.fc2.bias
            torch.testing.assert_close(predictions[row, column], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_dropout_is_active_in_training_only(kind: str, inputs: dict[str, torch.Tensor]) -> None:
    model: torch.nn.Module = TransformerPredictor(32, WIDTH, 1, 4, (LENGTH,), dropout=0.5)
    if kind == "mlp":
        model = MLPPredictor(32, dropout=0.5)
        inputs["target_positions"] = inputs["target_positions"] % C
    scale_weights(model)
    assert torch.equal(model.eval()(**inputs), model(**inputs))
    assert not torch.equal(model.train()(**inputs), model(**inputs))


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_kept_mask_tokens_are_no_context_for_the_transformer_predictor(family: str) -> None:
    # Outputs of the context encoder are disturbed where [MASK] tokens stand, then where they do not.
    model = tiny_jepa(family, "mask_token", "transformer")
    batch = text_batch(family, "mask_token")
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, (positions, valid) in enumerate(zip(batch["target_positions"], batch["target_valid"], strict=True)):
        hidden[row, positions[0][valid[0]]] = True
    assert torch.equal(hidden, batch["context_input_ids"] != batch["input_ids"])

    def predictions(where: torch.Tensor | None) -> torch.Tensor:
        def disturb(_module: object, args: tuple) -> tuple:
            states, *others = args
            return (states if where is None else states + 10.0 * where[..., None], *others)

        handle = model.predictor.register_forward_pre_hook(disturb)
        try:
            return model(**batch).predictions[batch["target_valid"]]
        finally:
            handle.remove()

    undisturbed = predictions(None)
    torch.testing.assert_close(predictions(hidden), undisturbed, rtol=0, atol=1e-5)
    assert (predictions(batch["attention_mask"].bool() & ~hidden) - undisturbed).abs().max() > 0.1
    padding = ~batch["attention_mask"].bool()
    assert padding.any()
    torch.testing.assert_close(predictions(padding), undisturbed, rtol=0, atol=1e-5)


def test_the_mlp_predictor_reads_the_mask_tokens_and_nothing_else() -> None:
    model = tiny_jepa("bert", "mask_token", "mlp")
    batch = text_batch("bert", "mask_token")
    seen: list[torch.Tensor] = []
    model.predictor.fc1.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    output = model(**batch, output_hidden_states=True)
    expected = gather_positions(output.context_state, batch["target_positions"].flatten(0, 1))
    assert torch.equal(seen[0], expected)
