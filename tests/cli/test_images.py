"""Claims about `run_jepa.py` on images: output files, exact resume, loading by other libraries, refusals."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model, IJepaConfig, ViTConfig, ViTImageProcessorPil, ViTModel

from helpers.cli import QUIET, assert_same_weights, start_process, train, weights
from jepa_hf import JepaForRepresentationPrediction
from jepa_hf.cli.main import main as jepa_hf_main
from jepa_hf.cli.train import main

SIZE = "image_size=16,patch_size=4,hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
SMALL = f"{SIZE},intermediate_size=64"
FAST = ["--max_steps", "4", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--save_steps", "2"]
AUGMENTED = [
    "--random_resized_crop",
    "0.4",
    "1.0",
    "--random_flip",
    "--weight_decay",
    "0.04",
    "--weight_decay_end",
    "0.4",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 pictures of differing sizes, in two folders below it."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(40):
        place = folder / ("cats" if number % 2 else "dogs")
        place.mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (16 + number % 5, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def start(images: Path) -> list[str]:
    return ["--model_type", "ijepa", "--config_overrides", SMALL, "--train_file", str(images), *FAST, *AUGMENTED]


@pytest.fixture(scope="module")
def undisturbed(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    output = train(*start, "--output_dir", out, "--do_eval", "--eval_on_start", "--logging_steps", "1")
    return out, output


def refused(capfd: pytest.CaptureFixture[str], argv: Sequence[str | Path]) -> str:
    """The one sentence that a command ends with, and its exit code 2."""
    assert main([*map(str, argv), *QUIET]) == 2
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("run_jepa.py: error: ")
    return sentence


def test_a_run_leaves_a_plain_encoder_its_processor_and_the_full_model(undisturbed: tuple[Path, str]) -> None:
    out, output = undisturbed
    files = {path.name for path in out.iterdir()}
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.json"}
    assert expected | {"training.png", "jepa", "checkpoint-2", "checkpoint-4"} <= files
    assert "modules.json" not in files
    assert "AutoImageProcessor" in output
    assert "tokenizer" not in output
    full = JepaForRepresentationPrediction.from_pretrained(out / "jepa")
    assert (full.config.average_top_k_layers, full.config.pred_num_hidden_layers) == (1, 6)
    exported = AutoModel.from_pretrained(out).state_dict()
    assert all(value.equal(exported[name]) for name, value in full.context_encoder.state_dict().items())
    history = json.loads((out / "metrics.json").read_text())["history"]
    assert [entry["ema_decay"] for entry in history if "ema_decay" in entry] == pytest.approx(
        [0.996, 0.996 + 0.004 / 3, 0.996 + 0.008 / 3, 1.0]
    )
    card = (out / "README.md").read_text()
    assert "image encoder" in card
    assert "random resized crop" in card


@pytest.mark.slow
def test_the_export_loads_for_classification_in_a_process_without_us(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = undisturbed
    program = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, IJepaForImageClassification
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
pixels = processor(images=Image.new("RGB", (30, 20)), return_tensors="pt")
for kind in (IJepaForImageClassification, AutoModelForImageClassification):
    model, info = kind.from_pretrained(sys.argv[1], num_labels=10, output_loading_info=True)
    print(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), tuple(model(**pixels).logits.shape))
assert "jepa_hf" not in sys.modules
"""
    completed = start_process("-c", program, out, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == ["['classifier.bias', 'classifier.weight'] [] (1, 10)"] * 2


def test_a_vit_trains_and_loads_as_a_classifier(images: Path, tmp_path: Path) -> None:
    train(
        "--model_type", "vit", "--config_overrides", SMALL, "--train_file", images, *FAST,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    from transformers import ViTForImageClassification

    _, info = ViTForImageClassification.from_pretrained(tmp_path / "out", num_labels=3, output_loading_info=True)
    assert sorted(info["missing_keys"]) == ["classifier.bias", "classifier.weight"]
    assert sorted(info["unexpected_keys"]) == ["pooler.dense.bias", "pooler.dense.weight"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_resumed_run_ends_with_the_same_weights(
    start: list[str], undisturbed: tuple[Path, str], tmp_path: Path, workers: str
) -> None:
    """Crops, flips, masks and the weight-decay schedule go on where they were, with any number of workers."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed[0], out)
    shutil.rmtree(out / "checkpoint-4")
    run = json.loads((out / "_run.json").read_text())
    (out / "_run.json").write_text(json.dumps({**run, "finished": False}))
    again = [*start, "--do_eval", "--eval_on_start", "--logging_steps", "1", "--dataloader_num_workers", workers]
    assert "checkpoint-2" in train(*again, "--output_dir", out)
    assert_same_weights(out / "jepa", undisturbed[0] / "jepa")
    assert_same_weights(out / "checkpoint-4", undisturbed[0] / "checkpoint-4")


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_a_pretrained_encoder_is_trained_on_at_its_own_size(family: str, images: Path, tmp_path: Path) -> None:
    """Also where a mask token is among its weights, which the objective does not use."""
    settings = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "vit":
        model = ViTModel(ViTConfig(**settings, intermediate_size=64), add_pooling_layer=False)
    else:
        model = Dinov2Model(Dinov2Config(**settings, use_mask_token=True))
    model.save_pretrained(tmp_path / "start")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "start")
    output = train(
        "--model_name_or_path", tmp_path / "start", "--train_file", images, *FAST, "--output_dir", tmp_path / "out"
    )
    assert f"{family} encoder" in output
    assert "pretrained start" in output
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}
    before, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    assert before.keys() == {name for name in after if not name.startswith("pooler.")}
    moved = {name for name, value in before.items() if not value.equal(after[name])}
    assert "embeddings.position_embeddings" in moved
    assert "embeddings.mask_token" not in moved


def test_a_random_start_of_dinov2_leaves_no_parameter_without_gradient() -> None:
    """DDP waits for the gradient of every trainable parameter."""
    from helpers.batches import image_batch

    config = Dinov2Config(
        image_size=8, patch_size=2, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, use_mask_token=True
    )
    from jepa_hf import JepaConfig

    model = JepaForRepresentationPrediction(JepaConfig.for_images(config, pred_num_hidden_layers=1)).train()
    model(**image_batch()).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert missing == []


def test_corrupt_images_are_skipped_counted_and_named(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for name in ("cats/01.png", "dogs/02.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    (folder / "text.png").write_text("no image")
    train(
        "--model_type", "ijepa", "--config_overrides", SMALL, "--train_file", folder, "--output_dir", tmp_path / "out",
        "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--logging_steps", "1",
        "--save_strategy", "no",
    )  # fmt: skip
    history = json.loads((tmp_path / "out/metrics.json").read_text())["history"]
    assert sum(entry.get("rows_without_targets", 0) for entry in history) == 0  # they are left out
    (message,) = (text for text in caplog.messages if "left out" in text)
    assert message.startswith("left out 3 of 41 training images: 2 truncated, 1 that PIL cannot identify")
    for name in ("01.png", "02.png", "text.png"):
        assert name in message


def test_damaged_images_alone_are_refused_before_the_start(
    start: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / f"images/{number}.png").write_text("no image")
    said = refused(capfd, [*start, "--train_file", tmp_path / "images", "--output_dir", tmp_path / "out"])
    assert "No image can be decoded: left out 5 of 5 training images: 5 that PIL cannot identify" in said
    assert not (tmp_path / "out").exists()


def test_one_channel(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("L", (16, 16), number * 20).save(tmp_path / f"{number}.png")
    train(
        "--model_type", "ijepa", "--config_overrides", f"{SMALL},num_channels=1", "--train_file", f"{tmp_path}/*.png",
        *FAST, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert IJepaConfig.from_pretrained(tmp_path / "out").num_channels == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mask_ratio", "0.3"], "mask_ratio is not for the objective images"),
        (["--objective", "span"], "objective 'span' does not go with a ijepa encoder, whose objective is images"),
        (["--objective", "pixels"], "objective must be one of span, images, features"),
        (["--masked_tokens", "mask_token"], "masked_tokens 'mask_token' is not supported for ijepa encoders"),
        (["--target_scale", "0.15"], "target_scale takes two numbers"),
        (["--target_scale", "0.5", "0.2"], "target_scale"),
        (["--mlm_weight", "0.5"], "none is known for ijepa encoders"),
        (["--weight_decay_end", "-1"], "weight_decay_end must not be negative"),
        (["--streaming", "true"], "streaming"),
        (["--config_overrides", "image_size=18,patch_size=4"], "image_size 18 is not a multiple of patch_size 4"),
        (["--image_processor_name", "./nowhere"], "image_processor_name './nowhere'"),
    ],
)
def test_bad_flags_end_with_a_sentence(
    start: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert sentence in refused(capfd, [*start, "--output_dir", tmp_path / "out", *flags])
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_ends_with_a_sentence(
    start: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    sentence = refused(capfd, [*start, "--train_file", tmp_path / "empty", "--output_dir", tmp_path / "out"])
    assert re.search(r"empty' .*image", sentence)


def test_only_visible_patches_go_through_the_context_encoder(images: Path) -> None:
    """Counted where they reach the first layer: as many as the collator lists, not the whole plane."""
    from jepa_hf import DataCollatorForBlockJEPA, JepaConfig

    settings = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = JepaForRepresentationPrediction(JepaConfig.for_images(IJepaConfig(**settings, intermediate_size=64)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    collator = DataCollatorForBlockJEPA(processor, model.encoder_adapter.grid)
    batch = collator([{"image": Image.open(path)} for path in sorted(images.rglob("*.png"))[:6]])
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("context", "target"):
        layer = model.get_encoder(name).layers[0]
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: tuple(inputs[0].shape)}))
    with torch.no_grad():
        model(**batch)
    assert seen == {"context": (6, batch["context_positions"].shape[2], 32), "target": (6, 16, 32)}
    assert batch["context_positions"].shape[2] < 12


def test_a_checkpoint_is_exported_with_its_processor(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    checkpoint = str(undisturbed[0] / "checkpoint-2")
    assert jepa_hf_main(["export", checkpoint, str(tmp_path / "exported"), "--encoder", "target"]) == 0
    exported = AutoModel.from_pretrained(tmp_path / "exported").state_dict()
    full = JepaForRepresentationPrediction.from_pretrained(undisturbed[0] / "checkpoint-2")
    assert all(value.equal(exported[name]) for name, value in full.target_encoder.state_dict().items())
    assert AutoImageProcessor.from_pretrained(tmp_path / "exported").size["height"] == 16
