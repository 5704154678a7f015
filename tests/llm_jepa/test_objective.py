"""Two views in one row compute what each computes alone, for every way that models know positions and attention."""

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
from jepa_hf.llm_jepa.objective import check_model, decoder_of
from jepa_hf.llm_jepa.view_tokenizer import predictor_tokens

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
    made = tokenizer(padding_side=side)
    made.add_tokens(predictor_tokens(2), special_tokens=True)
    return made


def rows(count: int = 3) -> list[dict[str, Any]]:
    views = PairedViewTokenizer(words(), num_predictor_tokens=2)
    return [views(row) for row in conversations(count)]


def strong(family: str, attention: str) -> PreTrainedModel:
    """With weights that tell positions and layers apart."""
    kind, config, settings = FAMILIES[family]
    made = kind(config(vocab_size=len(words()), attn_implementation=attention, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


@torch.no_grad()
def alone(made: PreTrainedModel, ids: list[int], end: int) -> torch.Tensor:
    return decoder_of(made)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, end]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_among_others_is_computed_as_alone(family: str, attention: str) -> None:
    """Packed and separate, padded on either side; and the loss is the same in all four."""
    made, given, losses = strong(family, attention), rows(), []
    for passes in ("packed", "separate"):
        for side in ("right", "left"):
            batch = DataCollatorForPairedViews(words(side), passes)(given)
            objective = PairedViewObjective()
            objective.attach(made)
            found = made(**batch)
            objective.detach(made)
            losses.append(found.loss.item())
            for at, row in enumerate(given):
                for name, vectors in (("text", found.predictions), ("code", found.targets)):
                    expected = alone(made, row[f"{name}_input_ids"], row[f"{name}_end"])
                    torch.testing.assert_close(
                        vectors[at], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
                    )
    assert max(losses) - min(losses) < 1e-5 * abs(losses[0]) + 1e-5


def batch_of(count: int = 3, **kwargs: Any) -> dict[str, torch.Tensor]:
    return DataCollatorForPairedViews(words(), **kwargs)(rows(count))


def test_the_parts_add_up_with_their_weights() -> None:
    made = model(len(words()))
    batch = batch_of()
    objective = PairedViewObjective(lm_weight=0.5, pair_weight=3.0)
    objective.attach(made)
    found = made(**batch)
    objective.detach(made)
    plain = made(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    cosine = torch.cosine_similarity(found.predictions, found.targets, dim=-1)
    torch.testing.assert_close(found.lm_loss, plain)
    torch.testing.assert_close(found.loss, 0.5 * plain + 3.0 * (1 - cosine).mean())


def test_a_misspelt_name_in_a_batch_is_refused() -> None:
    """Without `view_ends`, the views would be left out of the loss."""
    made, batch = model(len(words())), batch_of()
    PairedViewObjective().attach(made)
    batch["view_end"] = batch.pop("view_ends")
    with pytest.raises(TypeError, match="view_end"):
        made(**batch)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    """Divided by the labels and the rows of the update; a mean of means would differ, the rows being unlike."""
    made, given = model(len(words())), rows(4)
    collator = DataCollatorForPairedViews(words())
    PairedViewObjective(pair_weight=2.0).attach(made)
    whole = made(**collator(given))
    total = torch.stack([whole.num_labels, whole.num_pairs])
    parts = [made(**collator(part), num_items_in_batch=total).loss for part in (given[:1], given[1:])]
    torch.testing.assert_close(sum(parts), whole.loss)
    mean = sum(made(**collator(part)).loss for part in (given[:1], given[1:])) / 2
    assert abs(mean.item() - whole.loss.item()) > 1e-4


@pytest.mark.parametrize(("gradient", "learns"), [("full", True), ("stop", False)])
def test_the_predicted_view_learns_only_where_it_should(gradient: str, learns: bool) -> None:
    """Looked at by a token that stands in the second view alone."""
    made = model(len(words()))
    given = rows(1)
    mine = next(t for t in given[0]["code_input_ids"] if t not in given[0]["text_input_ids"])
    PairedViewObjective(lm_weight=0.0, target_gradient=gradient).attach(made)
    made(**DataCollatorForPairedViews(words())(given)).loss.backward()
    assert bool(made.get_input_embeddings().weight.grad[mine].abs().max() > 0) == learns


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_language_model_head_is_run_where_labels_follow_and_nowhere_else(side: str) -> None:
    """Not on views, nor on prompts; shorter answers are filled up, and one state more has no label to meet."""
    made, shapes = model(len(words())), []
    made.lm_head.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape[:2])))
    given = rows()
    batch = DataCollatorForPairedViews(words(side))(given)
    longest = max(sum(label != -100 for label in row["labels"][1:]) for row in given)
    assert longest + 1 < batch["input_ids"].shape[1] / 2  # there is something to leave out
    PairedViewObjective().attach(made)
    made(**batch)
    assert shapes == [(3, longest + 1)]


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_next_tokens_are_learnt_as_the_model_itself_would(family: str, side: str, on_prompt: bool) -> None:
    """Loss and gradients of all weights, though the head reads other rows."""
    made = strong(family, "sdpa")
    views = PairedViewTokenizer(words(), num_predictor_tokens=2, train_on_prompt=on_prompt)
    batch = DataCollatorForPairedViews(words(side))([views(row) for row in conversations(3)])
    mask = batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    plain = made(batch["input_ids"], attention_mask=mask, position_ids=positions, labels=batch["labels"]).loss
    expected = torch.autograd.grad(plain, list(made.parameters()))
    PairedViewObjective(pair_weight=0.0).attach(made)
    loss = made(**batch).loss
    found = torch.autograd.grad(loss, list(made.parameters()))
    torch.testing.assert_close(loss, plain)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-12)


def test_a_first_token_is_not_predicted_from_padding() -> None:
    """With a loss on prompts too there are as many labels, and the same loss, padded on either side."""
    made, found = model(len(words())), []
    views = PairedViewTokenizer(words(), num_predictor_tokens=2, train_on_prompt=True)
    PairedViewObjective().attach(made)
    for side in ("left", "right"):
        batch = DataCollatorForPairedViews(words(side))([views(row) for row in conversations(3)])
        output = made(**batch)
        found.append((output.num_labels.item(), output.lm_loss.item()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_it_stays_a_language_model_that_generates() -> None:
    made = model(len(words())).eval()
    ids = torch.tensor([[5, 6, 7]])
    before = made.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    PairedViewObjective().attach(made)
    assert torch.equal(made.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), before)
    assert made(input_ids=ids, labels=ids).loss is not None


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """None that another test of this process left behind: its precision could not be changed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_has_weights_and_an_objective_of_its_own(copied: Callable) -> None:
    """Also below what accelerate puts around a forward; a pickled one is a plain model until one is attached."""
    made, batch = model(len(words())), batch_of()
    PairedViewObjective(pair_weight=3.0).attach(made)
    if copied is copy.deepcopy:
        made = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(made)
    expected = made(**batch).loss
    other = copied(made)
    if copied is not copy.deepcopy:
        ids = batch["input_ids"]
        assert other(input_ids=ids, labels=ids).keys() == made(input_ids=ids, labels=ids).keys()
        PairedViewObjective(pair_weight=3.0).attach(other)
    loss = other(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert all(parameter.grad is None for parameter in made.parameters())


def test_an_objective_makes_way_for_the_next_and_leaves_nothing_behind() -> None:
    made, batch = model(len(words())), batch_of()
    before = [set(vars(part)) | set(part._forward_hooks) | set(part._forward_pre_hooks) for part in made.modules()]
    losses = []
    first, second = PairedViewObjective(), PairedViewObjective(pair_weight=0.0)
    for objective in (first, second, first, first):
        objective.attach(made)
        losses.append(made(**batch).loss.item())
    assert losses[0] == losses[2] == losses[3] != losses[1]
    first.detach(made)
    after = [set(vars(part)) | set(part._forward_hooks) | set(part._forward_pre_hooks) for part in made.modules()]
    assert after == before


def test_nothing_is_kept_of_a_pass_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one without enough memory, which `auto_find_batch_size` tries again with fewer rows."""
    made, objective = model(len(words())), PairedViewObjective()
    objective.attach(made)

    def fail(module: Any, given: Any) -> None:
        raise MemoryError

    hook = made.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        made(**batch_of())
    assert objective._states is None
    assert objective._read is None
    hook.remove()
    made(**batch_of())


WITHOUT_POSITIONS = {
    "biases for positions": (BloomForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4)),
    "no attention": (MambaForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4)),
}


@pytest.mark.parametrize("family", WITHOUT_POSITIONS)
def test_a_model_without_positions_reads_views_in_rows_of_their_own(family: str) -> None:
    """Each as alone, padded on either side with the same loss; in one row they are refused, in the check and later."""
    kind, config = WITHOUT_POSITIONS[family]
    config.vocab_size, given, losses = len(words()), rows(), []
    torch.manual_seed(0)
    made = kind(config).eval()
    check_model(made, DataCollatorForPairedViews(words(), "separate"), given[0])
    PairedViewObjective().attach(made)
    for side in ("left", "right"):
        found = made(**DataCollatorForPairedViews(words(side), "separate")(given))
        losses.append(found.loss)
        for at, row in enumerate(given):
            for name, vectors in (("text", found.predictions), ("code", found.targets)):
                expected = alone(made, row[f"{name}_input_ids"], row[f"{name}_end"])
                torch.testing.assert_close(vectors[at], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*losses)
    with pytest.raises(UsageError, match=r"takes no position_ids.*use --view_passes separate"):
        check_model(made, DataCollatorForPairedViews(words()), given[0])
    with pytest.raises(UsageError, match=r"takes no position_ids.*use --view_passes separate"):
        made(**DataCollatorForPairedViews(words())(given))


def test_a_model_with_a_loss_of_its_own_is_refused() -> None:
    """BART's decoder compares a state with its own token; and a mean, whatever it is told to divide by. A mixture of
    experts, whose loss has a part for the router, is not."""
    (given,) = rows(1)
    sizes = {"vocab_size": len(words()), "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64}
    bart = BartForCausalLM(BartConfig(**sizes, decoder_attention_heads=4, max_position_embeddings=128))
    with pytest.raises(UsageError, match="BartForCausalLM has a loss of its own"):
        check_model(bart, DataCollatorForPairedViews(words(), "separate"), given)
    router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 10.0}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=len(words()), **router, **GATED))
    check_model(experts, DataCollatorForPairedViews(words()), given)
    made = model(len(words()))
    check_model(made, DataCollatorForPairedViews(words()), given)
    shared = made.loss_function
    made.loss_function = lambda *args, num_items_in_batch, **rest: shared(*args, **rest)
    with pytest.raises(UsageError, match="LlamaForCausalLM has a loss of its own"):
        check_model(made, DataCollatorForPairedViews(words()), given)


def test_a_model_whose_decoder_is_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' Llama4ForCausalLM says; its output would have logits and no states."""
    made = model(len(words()))
    monkeypatch.setattr(type(made), "get_decoder", lambda self: self)
    with pytest.raises(UsageError, match="does not tell its decoder from its head"):
        PairedViewObjective().attach(made)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_tokens_of_pefts_before_a_row_are_refused(kind: str) -> None:
    """A view is read without them, or sees the conversation: peft then drops positions."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    made = peft.get_peft_model(model(len(words())), config)
    with pytest.raises(UsageError, match="puts tokens of its own before a row"):
        PairedViewObjective().attach(made)


def test_a_model_that_does_not_keep_views_apart_is_refused() -> None:
    """OPT makes a mask of its own where it is given none; in rows of their own its views are right."""
    config = OPTConfig(
        vocab_size=len(words()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, dropout=0.0,
        max_position_embeddings=128, word_embed_proj_dim=32,
    )  # fmt: skip
    (given,) = rows(1)
    made = OPTForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    with pytest.raises(UsageError, match="use --view_passes separate"):
        check_model(made, DataCollatorForPairedViews(words()), given)
    check_model(made, DataCollatorForPairedViews(words(), "separate"), given)
    PairedViewObjective().attach(made)
    losses = [made(**DataCollatorForPairedViews(words(side), "separate")(rows())).loss for side in ("left", "right")]
    torch.testing.assert_close(*losses)
    for family in FAMILIES:
        check_model(strong(family, "sdpa"), DataCollatorForPairedViews(words()), given)


def test_convolutions_with_small_random_weights_are_refused() -> None:
    """They let a ten-thousandth of a neighbour through; attention with such weights lets nothing through."""
    torch.manual_seed(0)
    kinds = ["conv", "full_attention", "conv"]
    hybrid = Lfm2ForCausalLM(Lfm2Config(vocab_size=len(words()), layer_types=kinds, **GATED))
    (given,) = rows(1)
    with pytest.raises(UsageError, match="use --view_passes separate"):
        check_model(hybrid, DataCollatorForPairedViews(words()), given)
    check_model(hybrid, DataCollatorForPairedViews(words(), "separate"), given)
    check_model(model(len(words())), DataCollatorForPairedViews(words()), given)


def test_a_model_that_looks_at_positions_only_in_a_batch_of_one_is_refused() -> None:
    """As transformers' flash attention does; two rows show it, and so must the check."""
    made = strong("llama", "sdpa")
    whole = made.model.forward

    def forgetful(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return whole(input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **kwargs)

    made.model.forward = forgetful
    with pytest.raises(UsageError, match="use --view_passes separate"):
        check_model(made, DataCollatorForPairedViews(words()), rows(1)[0])


@pytest.mark.parametrize("family", ["llama", "learned positions", "a sliding window"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("passes", ["packed", "separate"])
def test_the_teacher_reads_the_second_view_alone(passes: str, side: str, family: str) -> None:
    """One row of it for each conversation, as wide as the longest; what it gives is what it gives of both."""
    made, teacher, given, shapes = strong(family, "sdpa"), strong(family, "sdpa"), rows(4), []
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    decoder = decoder_of(teacher)
    expected = torch.stack([alone(teacher, row["code_input_ids"], row["code_end"]) for row in given])
    decoder.register_forward_hook(lambda module, args, output: shapes.append(output.last_hidden_state.shape))
    PairedViewObjective(target_gradient="ema", teacher=decoder).attach(made)
    batch = DataCollatorForPairedViews(words(side), passes)(given)
    found = made(**batch).targets
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    longest = max(len(row["code_input_ids"]) for row in given)
    width = longest if passes == "packed" else batch["view_input_ids"].shape[-1]
    assert shapes == [(4, width, 32)]


@pytest.mark.parametrize(("passes", "count"), [("packed", 1), ("separate", 2)])
def test_one_pass_reads_conversations_and_views(passes: str, count: int) -> None:
    made, shapes = model(len(words())), []
    made.model.register_forward_hook(lambda module, given, output: shapes.append(output.last_hidden_state.shape))
    PairedViewObjective().attach(made)
    made(**batch_of(view_passes=passes))
    assert len(shapes) == count
