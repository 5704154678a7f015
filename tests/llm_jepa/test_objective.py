"""Packed views equal their single encodings for all kinds of positions and attention; the loss is that of LLM-JEPA."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.llm import conversations, model, tokenizer
from jepa_hf import UsageError
from jepa_hf.llm_jepa import DataCollatorForPairedViews, PairedViewObjective, PairedViewTokenizer
from jepa_hf.llm_jepa.decoder import get_decoder
from jepa_hf.llm_jepa.predictor_tokens import predictor_tokens
from jepa_hf.llm_jepa.view_isolation import verify_view_isolation

COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
COMMON |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GATED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GATED, "head_dim": 8}),
    "a sliding window": (MistralForCausalLM, MistralConfig, {**GATED, "sliding_window": 4}),
    "layers of two kinds": (Gemma3ForCausalLM, Gemma3TextConfig, {**GATED, "head_dim": 8, "sliding_window": 4}),
    "learned positions": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": None, "eos_token_id": None}
        | dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
    ),
    "partial rotary": (GPTNeoXForCausalLM, GPTNeoXConfig, {**COMMON, "intermediate_size": 64}),
}


def words(side: str = "right") -> Any:
    llm = tokenizer(padding_side=side)
    llm.add_tokens(predictor_tokens(2), special_tokens=True)
    return llm


def rows(count: int = 3) -> list[dict[str, Any]]:
    views = PairedViewTokenizer(words(), num_predictor_tokens=2)
    return [views(row) for row in conversations(count)]


def strong(family: str, attention: str) -> PreTrainedModel:
    """Return a model whose weights distinguish positions and layers."""
    kind, config, settings = FAMILIES[family]
    llm = kind(config(vocab_size=len(words()), attn_implementation=attention, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return llm


@torch.no_grad()
def alone(llm: PreTrainedModel, ids: list[int], end: int) -> torch.Tensor:
    return get_decoder(llm)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, end]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_encoded_independently(family: str, attention: str) -> None:
    """Packed or separate, padded on either side: views equal their single encodings, and the losses are equal."""
    llm, samples, losses = strong(family, attention), rows(), []
    for passes in ("packed", "separate"):
        for side in ("right", "left"):
            batch = DataCollatorForPairedViews(words(side), passes)(samples)
            objective = PairedViewObjective()
            objective.attach(llm)
            actual = llm(**batch)
            objective.detach(llm)
            losses.append(actual.loss.item())
            for at, row in enumerate(samples):
                for name, vectors in (("text", actual.predictions), ("code", actual.targets)):
                    expected = alone(llm, row[f"{name}_input_ids"], row[f"{name}_end"])
                    torch.testing.assert_close(
                        vectors[at], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
                    )
    assert max(losses) - min(losses) < 1e-5 * abs(losses[0]) + 1e-5


def batch_of(count: int = 3, **kwargs: Any) -> dict[str, torch.Tensor]:
    return DataCollatorForPairedViews(words(), **kwargs)(rows(count))


def test_parts_add_up_with_their_weights() -> None:
    """The loss is the weighted sum of its parts."""
    llm = model(len(words()))
    batch = batch_of()
    objective = PairedViewObjective(lm_weight=0.5, jepa_weight=3.0)
    objective.attach(llm)
    actual = llm(**batch)
    objective.detach(llm)
    plain = llm(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    cosine = torch.cosine_similarity(actual.predictions, actual.targets, dim=-1)
    torch.testing.assert_close(actual.lm_loss, plain)
    torch.testing.assert_close(actual.loss, 0.5 * plain + 3.0 * (1 - cosine).mean())


def test_misspelt_batch_key_is_refused() -> None:
    """A misspelt `view_ends` raises; it must not silently drop the views from the loss."""
    llm, batch = model(len(words())), batch_of()
    PairedViewObjective().attach(llm)
    batch["view_end"] = batch.pop("view_ends")
    with pytest.raises(TypeError, match="view_end"):
        llm(**batch)


def test_micro_batches_add_up() -> None:
    """Micro-batches of unequal rows add up to the batch; a mean of means would differ."""
    llm, samples = model(len(words())), rows(4)
    collator = DataCollatorForPairedViews(words())
    PairedViewObjective(jepa_weight=2.0).attach(llm)
    full = llm(**collator(samples))
    total = torch.stack([full.num_labels, full.num_pairs])
    parts = [llm(**collator(part), num_items_in_batch=total).loss for part in (samples[:1], samples[1:])]
    torch.testing.assert_close(sum(parts), full.loss)
    mean = sum(llm(**collator(part)).loss for part in (samples[:1], samples[1:])) / 2
    assert abs(mean.item() - full.loss.item()) > 1e-4


@pytest.mark.parametrize(("gradient", "learns"), [("full", True), ("stop", False)])
def test_target_gradient(gradient: str, learns: bool) -> None:
    """Gradients reach a token of the second view only with target_gradient full."""
    llm = model(len(words()))
    samples = rows(1)
    mine = next(t for t in samples[0]["code_input_ids"] if t not in samples[0]["text_input_ids"])
    PairedViewObjective(lm_weight=0.0, target_gradient=gradient).attach(llm)
    llm(**DataCollatorForPairedViews(words())(samples)).loss.backward()
    assert bool(llm.get_input_embeddings().weight.grad[mine].abs().max() > 0) == learns


@pytest.mark.parametrize("side", ["right", "left"])
def test_head_runs_on_labelled_positions_only(side: str) -> None:
    """The head reads neither views nor prompts; shorter answers are filled up, plus one state without a label."""
    llm, shapes = model(len(words())), []
    llm.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    samples = rows()
    batch = DataCollatorForPairedViews(words(side))(samples)
    longest = max(sum(label != -100 for label in row["labels"][1:]) for row in samples)
    assert longest + 1 < batch["input_ids"].shape[1] / 2  # there is something to leave out
    PairedViewObjective().attach(llm)
    llm(**batch)
    assert shapes == [(3, longest + 1)]


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lm_loss_equals_the_models_own(family: str, side: str, on_prompt: bool) -> None:
    """Next-token loss and all gradients equal those of the original forward."""
    llm = strong(family, "sdpa")
    views = PairedViewTokenizer(words(), num_predictor_tokens=2, train_on_prompt=on_prompt)
    batch = DataCollatorForPairedViews(words(side))([views(row) for row in conversations(3)])
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    plain = llm(batch["input_ids"], attention_mask=mask, position_ids=positions, labels=batch["labels"]).loss
    expected = torch.autograd.grad(plain, list(llm.parameters()))
    PairedViewObjective(jepa_weight=0.0).attach(llm)
    loss = llm(**batch).loss
    actual = torch.autograd.grad(loss, list(llm.parameters()))
    torch.testing.assert_close(loss, plain)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-12)


def test_first_token_is_not_predicted_from_padding() -> None:
    """With labels on prompts, either padding side gives as many labels and the same loss."""
    llm, actual = model(len(words())), []
    views = PairedViewTokenizer(words(), num_predictor_tokens=2, train_on_prompt=True)
    PairedViewObjective().attach(llm)
    for side in ("left", "right"):
        batch = DataCollatorForPairedViews(words(side))([views(row) for row in conversations(3)])
        output = llm(**batch)
        actual.append((output.num_labels.item(), output.lm_loss.item()))
    assert actual[0] == pytest.approx(actual[1], rel=1e-5)


def test_model_still_generates() -> None:
    """A model with an objective generates what it generated before."""
    llm = model(len(words())).eval()
    ids = torch.tensor([[5, 6, 7]])
    before = llm.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    PairedViewObjective().attach(llm)
    assert torch.equal(llm.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), before)
    assert llm(input_ids=ids, labels=ids).loss is not None


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Reset accelerate's state: another test may have fixed the precision in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))], ids=["copy", "pickle"])
def test_model_copies_have_their_own_objective(copied: Callable) -> None:
    """Copies have their own objective, also under accelerate's wrapped forward; an unpickled one is plain."""
    llm, batch = model(len(words())), batch_of()
    PairedViewObjective(jepa_weight=3.0).attach(llm)
    if copied is copy.deepcopy:
        llm = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(llm)
    expected = llm(**batch).loss
    other = copied(llm)
    if copied is not copy.deepcopy:
        ids = batch["input_ids"]
        assert other(input_ids=ids, labels=ids).keys() == llm(input_ids=ids, labels=ids).keys()
        PairedViewObjective(jepa_weight=3.0).attach(other)
    loss = other(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_attaching_replaces_the_objective() -> None:
    """A second objective replaces the first; detaching restores the model."""
    llm, batch = model(len(words())), batch_of()
    before = [set(vars(part)) | set(part._forward_hooks) | set(part._forward_pre_hooks) for part in llm.modules()]
    losses = []
    first, second = PairedViewObjective(), PairedViewObjective(jepa_weight=0.0)
    for objective in (first, second, first, first):
        objective.attach(llm)
        losses.append(llm(**batch).loss.item())
    assert losses[0] == losses[2] == losses[3] != losses[1]
    first.detach(llm)
    after = [set(vars(part)) | set(part._forward_hooks) | set(part._forward_pre_hooks) for part in llm.modules()]
    assert after == before


def test_failed_pass_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails, for example out of memory with `auto_find_batch_size`, leaves no state behind."""
    llm, objective = model(len(words())), PairedViewObjective()
    objective.attach(llm)

    def fail(module: Any, inputs: Any) -> None:
        raise MemoryError

    hook = llm.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        llm(**batch_of())
    assert objective._states is None
    assert objective._selected_positions is None
    hook.remove()
    llm(**batch_of())


WITHOUT_POSITIONS = {
    "biases for positions": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4)),
    "no attention": (MambaForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4)),
}


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_models_without_position_ids(family: str) -> None:
    """They encode separate views correctly on either padding side; packed views are refused, in the check and later."""
    kind, config = WITHOUT_POSITIONS[family]
    config.vocab_size, samples, losses = len(words()), rows(), []
    torch.manual_seed(0)
    llm = kind(config).eval()
    verify_view_isolation(llm, DataCollatorForPairedViews(words(), "separate"), samples[0])
    PairedViewObjective().attach(llm)
    for side in ("left", "right"):
        actual = llm(**DataCollatorForPairedViews(words(side), "separate")(samples))
        losses.append(actual.loss)
        for at, row in enumerate(samples):
            for name, vectors in (("text", actual.predictions), ("code", actual.targets)):
                expected = alone(llm, row[f"{name}_input_ids"], row[f"{name}_end"])
                torch.testing.assert_close(vectors[at], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*losses)
    with pytest.raises(UsageError, match=r"takes no position_ids.*use --view_passes separate"):
        verify_view_isolation(llm, DataCollatorForPairedViews(words()), samples[0])
    with pytest.raises(UsageError, match=r"takes no position_ids.*use --view_passes separate"):
        llm(**DataCollatorForPairedViews(words())(samples))


def test_nonstandard_loss_is_refused() -> None:
    """Refused: unshifted labels (BART), and a mean that ignores `num_items_in_batch`. A router loss is accepted."""
    (samples,) = rows(1)
    sizes = {"vocab_size": len(words()), "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64}
    bart = BartForCausalLM(BartConfig(**sizes, decoder_attention_heads=4, max_position_embeddings=128))
    with pytest.raises(UsageError, match="BartForCausalLM has a loss of its own"):
        verify_view_isolation(bart, DataCollatorForPairedViews(words(), "separate"), samples)
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 10.0}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=len(words()), **router, **GATED))
    verify_view_isolation(experts, DataCollatorForPairedViews(words()), samples)
    llm = model(len(words()))
    verify_view_isolation(llm, DataCollatorForPairedViews(words()), samples)
    shared = llm.loss_function
    llm.loss_function = lambda *args, num_items_in_batch, **rest: shared(*args, **rest)
    with pytest.raises(UsageError, match="LlamaForCausalLM has a loss of its own"):
        verify_view_isolation(llm, DataCollatorForPairedViews(words()), samples)


def test_model_that_is_its_own_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models, such as Llama4ForCausalLM, return themselves as decoder: the output has no states."""
    llm = model(len(words()))
    monkeypatch.setattr(type(llm), "get_decoder", lambda self: self)
    with pytest.raises(UsageError, match="does not separate its decoder from its head"):
        PairedViewObjective().attach(llm)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_is_refused(kind: str) -> None:
    """peft's virtual tokens are refused, because views would be encoded without them."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    llm = peft.get_peft_model(model(len(words())), config)
    with pytest.raises(UsageError, match="puts tokens of its own before a row"):
        PairedViewObjective().attach(llm)


def test_model_that_mixes_views_is_refused() -> None:
    """OPT, which builds its own mask and mixes packed views, is refused; separate views are accepted."""
    config = OPTConfig(
        vocab_size=len(words()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, dropout=0.0,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    (samples,) = rows(1)
    llm = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.normal_(std=0.3)
    with pytest.raises(UsageError, match="use --view_passes separate"):
        verify_view_isolation(llm, DataCollatorForPairedViews(words()), samples)
    verify_view_isolation(llm, DataCollatorForPairedViews(words(), "separate"), samples)
    PairedViewObjective().attach(llm)
    losses = [llm(**DataCollatorForPairedViews(words(side), "separate")(rows())).loss for side in ("left", "right")]
    torch.testing.assert_close(*losses)
    for family in FAMILIES:
        verify_view_isolation(strong(family, "sdpa"), DataCollatorForPairedViews(words()), samples)


def test_convolutions_with_small_weights_are_refused() -> None:
    """The check detects convolutions that pass 1e-4 of a neighbour's value."""
    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv"]
    hybrid = Lfm2ForCausalLM(Lfm2Config(vocab_size=len(words()), layer_types=kinds, **GATED))
    (samples,) = rows(1)
    with pytest.raises(UsageError, match="use --view_passes separate"):
        verify_view_isolation(hybrid, DataCollatorForPairedViews(words()), samples)
    verify_view_isolation(hybrid, DataCollatorForPairedViews(words(), "separate"), samples)
    verify_view_isolation(model(len(words())), DataCollatorForPairedViews(words()), samples)


def test_check_uses_more_than_one_row() -> None:
    """A model that reads positions only in a batch of one row (as flash attention does) is refused."""
    llm = strong("llama", "sdpa")
    original = llm.model.forward

    def forgetful(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return original(input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **kwargs)

    llm.model.forward = forgetful
    with pytest.raises(UsageError, match="use --view_passes separate"):
        verify_view_isolation(llm, DataCollatorForPairedViews(words()), rows(1)[0])


@pytest.mark.parametrize("family", ["llama", "learned positions", "a sliding window"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("passes", ["packed", "separate"])
def test_teacher_encodes_the_second_view_only(passes: str, side: str, family: str) -> None:
    """Its rows are as wide as the longest second view, and its output equals that of both views."""
    llm, teacher, samples, shapes = strong(family, "sdpa"), strong(family, "sdpa"), rows(4), []
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    decoder = get_decoder(teacher)
    expected = torch.stack([alone(teacher, row["code_input_ids"], row["code_end"]) for row in samples])
    decoder.register_forward_hook(lambda module, args, output: shapes.append(output.last_hidden_state.shape))
    PairedViewObjective(target_gradient="ema", teacher=decoder).attach(llm)
    batch = DataCollatorForPairedViews(words(side), passes)(samples)
    actual = llm(**batch).targets
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    longest = max(len(row["code_input_ids"]) for row in samples)
    width = longest if passes == "packed" else batch["view_input_ids"].shape[-1]
    assert shapes == [(4, width, 32)]


@pytest.mark.parametrize(("passes", "count"), [("packed", 1), ("separate", 2)])
def test_number_of_passes(passes: str, count: int) -> None:
    """Packed views need one pass, separate ones two."""
    llm, shapes = model(len(words())), []
    llm.model.register_forward_hook(lambda module, inputs, output: shapes.append(output.last_hidden_state.shape))
    PairedViewObjective().attach(llm)
    llm(**batch_of(view_passes=passes))
    assert len(shapes) == count
