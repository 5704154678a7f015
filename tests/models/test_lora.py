"""LoRA: only the adapters are trained and averaged, the start is exact, and what is exported is a plain encoder."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, ViTModel

from helpers.batches import image_batch, image_config, rows, text_batch
from helpers.cli import QUIET, start_process, train
from helpers.runs import StopAfter, ema_of, largest_difference, trainer, weights
from helpers.tiny_models import CORPUS, FAMILIES, save_tiny_encoder, tiny_tokenizer, write_lines
from jepa_hf import JepaForRepresentationPrediction, UsageError
from jepa_hf.cli.main import main
from jepa_hf.hub.averaging import average_with_start
from jepa_hf.hub.export import export_masked_lm, export_run
from jepa_hf.models.lora import is_lora_parameter
from jepa_hf.training.ema import interpolate_schedule

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
PREDICTORS = ("predictor.", "pooled_predictor.")


def adapted(family: str, folder: Path, **kwargs: Any) -> tuple[JepaForRepresentationPrediction, str]:
    """A model with adapters around a saved encoder, and where that lies."""
    name = save_tiny_encoder(family, folder / "start", std=0.1, head="mlm" if kwargs.get("mlm_weight") else None)
    return JepaForRepresentationPrediction.from_encoder_pretrained(name, lora=LORA, **kwargs), name


def moved(model: JepaForRepresentationPrediction) -> None:
    """Give all adapters values of their own, as in the middle of a run."""
    generator = torch.Generator().manual_seed(1)  # the common one gives the order of the samples
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora_parameter(name):
                parameter.normal_(std=0.3, generator=generator)


@torch.no_grad()
def states(encoder: torch.nn.Module, family: str = "bert") -> torch.Tensor:
    batch = tiny_tokenizer(family)(CORPUS[:2], return_tensors="pt", padding=True, truncation=True, max_length=24)
    return encoder.eval()(**batch).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_computes_what_the_pretrained_encoder_does(family: str, tmp_path: Path) -> None:
    """Also in the loss: adapters whose product is 0 change neither view."""
    model, name = adapted(family, tmp_path)
    plain = JepaForRepresentationPrediction.from_encoder_pretrained(name)
    plain.predictor.load_state_dict(model.predictor.state_dict())
    for which in ("context", "target"):
        assert torch.equal(states(model.get_encoder(which), family), states(plain.get_encoder(which), family))
    batch = text_batch(family, model.config.masked_tokens)
    assert torch.equal(model(**batch).loss, plain(**batch).loss)


def test_an_average_with_the_start_scales_the_adapters(tmp_path: Path) -> None:
    """0.25 of the start and 0.75 of the merged weights; adapters that do more than add are refused."""
    model, name = adapted("bert", tmp_path)
    moved(model)
    start = weights(AutoModel.from_pretrained(name))
    trained = weights(model.merged_encoder())
    average_with_start(model, "context", 0.25)
    for parameter, value in weights(model.merged_encoder()).items():
        if parameter.startswith("pooler."):
            continue  # not trained
        torch.testing.assert_close(value, 0.25 * start[parameter] + 0.75 * trained[parameter])
    model.config.lora = {**LORA, "use_dora": True}
    with pytest.raises(UsageError, match="use_dora True cannot be averaged"):
        average_with_start(model, "context", 0.25)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_exported_it_is_a_plain_encoder_with_the_same_output(family: str, tmp_path: Path) -> None:
    model, _ = adapted(family, tmp_path)
    moved(model)
    export_run(model, tmp_path / "out", tiny_tokenizer(family), which="both")
    for which, folder in (("context", "out"), ("target", "out/target_encoder")):
        exported = AutoModel.from_pretrained(tmp_path / folder)
        assert not [name for name, _ in exported.named_parameters() if "lora" in name or "base_layer" in name]
        expected = states(model.get_encoder(which), family)
        torch.testing.assert_close(states(exported, family), expected, rtol=1e-4, atol=1e-4)
    assert (states(model.get_encoder("context"), family) - states(exported, family)).abs().max() > 0.01
    # The model goes on with its adapters.
    assert [name for name, _ in model.context_encoder.named_parameters() if is_lora_parameter(name)]


def test_the_full_model_is_saved_with_its_adapters_and_loads_as_it_was(tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path)
    moved(model)
    model.save_pretrained(tmp_path / "jepa")
    loaded = JepaForRepresentationPrediction.from_pretrained(tmp_path / "jepa")
    assert largest_difference(weights(loaded), weights(model)) == 0.0
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_adapters_around_a_jepa_that_was_trained_without_are_refused(tmp_path: Path) -> None:
    """Its weights have other names; its encoder, which is exported with it, can be adapted."""
    name = save_tiny_encoder("bert", tmp_path / "start", std=0.1)
    JepaForRepresentationPrediction.from_encoder_pretrained(name).save_pretrained(tmp_path / "jepa")
    with pytest.raises(UsageError, match="name the plain encoder in"):
        JepaForRepresentationPrediction.from_any_pretrained(str(tmp_path / "jepa"), lora=LORA)


def test_only_adapters_and_predictor_are_trained_and_the_target_is_their_average(tmp_path: Path) -> None:
    """The frozen weights keep every bit in both encoders; the target's adapters follow the closed form."""
    model, _ = adapted("bert", tmp_path)
    before = weights(model)
    run = trainer(tmp_path / "out", model, ema_decay=0.5, ema_decay_end=0.9, max_steps=3)
    seen = [weights(model.context_encoder)]
    run.add_callback(_Keep(seen))
    run.train()
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    still = {name for name in before if name not in changed}
    assert all(is_lora_parameter(name) or name.startswith(PREDICTORS) for name in changed)
    assert not [name for name in still if is_lora_parameter(name) or name.startswith(PREDICTORS)]
    expected = {name: value.clone() for name, value in seen[0].items() if is_lora_parameter(name)}
    for step in (1, 2, 3):
        decay = interpolate_schedule(step, 3, 0.5, 0.9)
        expected = {name: decay * value + (1 - decay) * seen[step][name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(after[f"target_encoder.{name}"], value, rtol=1e-5, atol=1e-7)
    assert all(len(part) == len(expected) for part in ema_of(run).pairs)


class _Keep(StopAfter):
    """Keeps the context encoder's weights after each step."""

    def __init__(self, seen: list[dict[str, torch.Tensor]]):
        super().__init__(10**9)
        self.seen = seen

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(weights(model.context_encoder))


def test_a_run_with_adapters_goes_on_exactly(tmp_path: Path) -> None:
    """Bit for bit, with dropout before the adapters."""

    def start(folder: str) -> Any:
        torch.manual_seed(0)
        model, _ = adapted("bert", tmp_path / folder)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return trainer(tmp_path / folder / "out", model, data=rows("bert", 40), **settings)

    full = start("whole")
    full.train()
    first = start("cut")
    first.add_callback(StopAfter(3))
    first.train()
    second = start("cut")
    moved(second.model)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "out" / "checkpoint-3"))
    assert largest_difference(weights(second.model), weights(full.model)) == 0.0


def test_images_have_them_too(tmp_path: Path) -> None:
    """Where only visible patches go through the encoder."""
    torch.manual_seed(0)
    ViTModel(image_config(), add_pooling_layer=False).save_pretrained(tmp_path / "start")
    model = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "start"), lora=LORA)
    plain = JepaForRepresentationPrediction.from_encoder_pretrained(str(tmp_path / "start"))
    plain.predictor.load_state_dict(model.predictor.state_dict())
    assert torch.equal(model(**image_batch()).loss, plain(**image_batch()).loss)
    moved(model)
    export_run(model, tmp_path / "out")
    pixels = image_batch()["pixel_values"]
    with torch.no_grad():
        expected = model.context_encoder(pixel_values=pixels).last_hidden_state
        given = ViTModel.from_pretrained(tmp_path / "out").eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_a_masked_language_model_is_exported_with_them_merged(tmp_path: Path) -> None:
    model, _ = adapted("bert", tmp_path, mlm_weight=0.5)
    moved(model)
    export_masked_lm(model, tmp_path / "mlm", tiny_tokenizer("bert"))
    masked_lm = AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm")
    torch.testing.assert_close(states(masked_lm.base_model), states(model.context_encoder), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    """Trains, says how much of it is trained, and the result loads in a process that cannot import peft."""
    name = save_tiny_encoder("bert", tmp_path / "start", std=0.1)
    data = write_lines(tmp_path / "data.txt", CORPUS[:40])
    flags = ("--model_name_or_path", name, "--train_file", data, "--max_steps", "2", "--output_dir", tmp_path / "out")
    output = train(*flags, "--use_peft", "--lora_r", "2", "--lora_target_modules", "query", "value")
    assert "trained, in adapters" in output
    model = JepaForRepresentationPrediction.from_pretrained(tmp_path / "out" / "jepa")
    assert model.config.lora["r"] == 2
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if is_lora_parameter(n)} == {
        "query",
        "value",
    }
    code = (
        "import sys; sys.modules['peft'] = None; from transformers import AutoModel; AutoModel.from_pretrained('out')"
    )
    loaded = start_process("-c", code, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank": 4}, "Expected lora to hold arguments of peft.LoraConfig"),
        ({"r": 0}, "^lora_r, the adapters' rank, must be an integer of at least 1, not 0.$"),
        ({"r": -3}, "at least 1, not -3.$"),
        ({"r": True}, "at least 1, not True.$"),
        ({"r": 2.5}, "at least 1, not 2.5.$"),
        ({"lora_dropout": 1.0}, r"^lora_dropout must be in \[0, 1\), not 1.0.$"),
        ({"lora_dropout": -0.5}, r"^lora_dropout must be in \[0, 1\), not -0.5.$"),
        ({"lora_dropout": float("nan")}, r"^lora_dropout must be in \[0, 1\), not nan.$"),
        ({"target_modules": ["no_such_layer"]}, "No module of the encoder matches lora's target_modules"),
    ],
)
def test_settings_that_cannot_be_are_refused(lora: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    name = save_tiny_encoder("bert", tmp_path)
    with pytest.raises(UsageError, match=sentence):
        JepaForRepresentationPrediction.from_encoder_pretrained(name, lora=lora)


def test_without_peft_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_tiny_encoder("bert", tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'jepa_hf\[peft\]'"):
        JepaForRepresentationPrediction.from_encoder_pretrained(name, lora=LORA)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--smoke_test",), "use_peft trains adapters of a pretrained model"),
        (("--lora_r", "0"), "lora_r, the adapters' rank, must be an integer of at least 1, not 0"),
        (("--lora_dropout", "1.5"), "lora_dropout must be in [0, 1), not 1.5"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    flags: tuple[str, ...], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one sentence that names the flag, before anything is written."""
    start = ("--model_name_or_path", save_tiny_encoder("bert", tmp_path / "start"))
    data = ("--train_file", write_lines(tmp_path / "data.txt", CORPUS[:40]))
    out = ("--output_dir", tmp_path / "out", *QUIET)
    given = (*flags, *out) if "--smoke_test" in flags else (*start, *data, *flags, *out)
    assert main(["train", "--use_peft", *map(str, given)]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("jepa-hf train: error: ")
    assert sentence in line
    assert not (tmp_path / "out").exists()
