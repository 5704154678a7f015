"""Search for CIFAR-10 settings: one lever at a time, several variants side by side on each GPU.

    python benchmarks/images/cifar10_hparam_search.py --train_file train.parquet \
        --variants variants.json --out table.jsonl

The images stay on the GPU, so that the variants do not wait for each other's loaders; model, masks and losses are the
package's own. Settings are judged on the last 5,000 training images, which no variant trains or fits its probe on; the
test split is not read. A variant is a JSON object of changes to `BASE`.
"""

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import IJepaConfig

from jepa_hf import JepaConfig, JepaForRepresentationPrediction
from jepa_hf.evaluation.scoring import knn_predict, linear_probe
from jepa_hf.masking.base_collator import pad_true_indices
from jepa_hf.masking.block_sampling import BlockSampler
from jepa_hf.masking.counter_rng import sample_keys
from jepa_hf.models import targets
from jepa_hf.models.losses import covariance_loss, sigreg, variance_loss
from jepa_hf.models.positions import gather_positions
from jepa_hf.monitoring.metrics import effective_rank, mean_pairwise_cosine
from jepa_hf.training.ema import interpolate_schedule, match_parameters

_TARGET_VECTORS = targets._target_vectors  # the library's

BASE = {
    "epochs": 12, "batch": 256, "learning_rate": 1e-3, "weight_decay": 0.05, "weight_decay_end": 0.05, "warmup": 0.1,
    "ema": (0.996, 1.0), "sincos": True, "seed": 0, "hidden_size": 192, "layers": 6, "heads": 3, "patch": 4,
    "num_targets": 4, "target_scale": (0.15, 0.2), "context_scale": (0.85, 1.0), "num_context": None,
    "keep_blocks_inside": True, "pooled": {}, "jitter": 0.0, "crop": 0.4, "patch_scale": None,
    "center": None, "views": False,
    "jepa": {
        "average_top_k_layers": 1, "pred_num_hidden_layers": 3, "variance_weight": 1.0, "covariance_weight": 0.04,
    },
}  # fmt: skip
LIMIT = int(os.environ.get("LIMIT", "60000"))  # images that are read, for a trial
FITTED, HELD_OUT = 20_000, min(5000, LIMIT // 10)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def images(path: str) -> tuple[np.ndarray, np.ndarray]:
    table = pq.read_table(path)
    column = next(name for name in table.column_names if name in ("image", "img"))
    rows = table[column].to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows])
    return pixels, np.array(table["label"].to_pylist())


def augment(pixels: torch.Tensor, low: float) -> torch.Tensor:
    """Random resized crops of an area from `low` to 1, and flips: uint8 `[B, 3, H, W]` to float."""
    count, device = len(pixels), pixels.device
    area = low + (1 - low) * torch.rand(count, device=device)
    ratio = torch.exp((torch.rand(count, device=device) * 2 - 1) * np.log(4 / 3))
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x = (torch.rand(count, device=device) * 2 - 1) * (1 - wide)
    y = (torch.rand(count, device=device) * 2 - 1) * (1 - high)
    flip = (torch.rand(count, device=device) < 0.5).float() * 2 - 1
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([wide * flip, zero, x], 1), torch.stack([zero, high, y], 1)], 1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return normalize(F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False))


def jitter(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    """Other brightness, contrast and saturation for each image, and one in five grey: for the context's view alone."""
    shape = (len(pixels), 1, 1, 1)
    brightness, contrast, saturation = (1 + strength * (2 * torch.rand(shape, device=DEVICE) - 1) for _ in range(3))
    light = (pixels + 1) * brightness - 1
    mean = light.mean(dim=(1, 2, 3), keepdim=True)
    light = mean + (light - mean) * contrast
    grey = light.mean(dim=1, keepdim=True)
    saturation = torch.where(torch.rand(shape, device=DEVICE) < 0.2, 0.0, saturation)
    return grey + (light - grey) * saturation


def standardize(states: torch.Tensor, center: str) -> torch.Tensor:
    """Targets `[B, L, D]` less their batch mean, of each position or of all, at unit variance per feature."""
    centred = states - states.mean(dim=0 if center == "position" else (0, 1), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=(0, 1), keepdim=True) + 1e-5)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def mask_bank(settings: dict, grid: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Masks of 32,768 samples, on the device: each step draws from them."""
    names = ("num_targets", "target_scale", "context_scale", "keep_blocks_inside")
    shape = {name: settings[name] for name in names}
    sampler = BlockSampler(grid, **shape)
    keys = sample_keys(np.arange(32768, dtype=np.uint64), settings["seed"], 0)
    targets, context = sampler.sample(keys, settings["num_context"] or None)
    positions, valid = pad_true_indices(targets.reshape(-1, targets.shape[-1]), (sampler.largest_target,))
    seen, seen_valid = pad_true_indices(context)
    shaped = (x.reshape(*targets.shape[:2], -1) for x in (positions, valid))
    return tuple(torch.from_numpy(x).to(DEVICE) for x in (*shaped, seen[:, None], seen_valid[:, None]))


@torch.no_grad()
def features(encoder: torch.nn.Module, pixels: torch.Tensor, layers: int) -> dict[str, torch.Tensor]:
    """Mean-pooled features: of the output, and of the last layers side by side."""
    last, several = [], []
    for part in pixels.split(2000):
        with torch.autocast(DEVICE, torch.bfloat16):
            output = encoder(pixel_values=normalize(part), output_hidden_states=True)
        last.append(output.last_hidden_state.float().mean(1))
        states = output.hidden_states[-layers:]
        several.append(torch.cat([F.layer_norm(s.float(), s.shape[-1:]).mean(1) for s in states], 1))
    return {"last": torch.cat(last), "several": torch.cat(several)}


def accuracies(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Linear probe and kNN on the held-out images in per cent, fitted on the first 20,000 others."""
    found, classes = vectors.cpu().numpy(), labels.cpu().numpy()
    fitted = min(FITTED, len(found) - HELD_OUT)
    train, test, answers = (found[:fitted], classes[:fitted]), found[-HELD_OUT:], classes[-HELD_OUT:]
    guesses = (linear_probe(*train, test)[0], knn_predict(*train, test))
    linear, nearest = (round(100 * float((guess == answers).mean()), 1) for guess in guesses)
    return linear, nearest


def run(pixels: np.ndarray, labels: np.ndarray, variant: dict) -> dict:
    settings = {**BASE, **variant, "jepa": {**BASE["jepa"], **variant.get("jepa", {})}}
    torch.manual_seed(settings["seed"])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    labels = torch.from_numpy(labels).to(DEVICE)
    train = pixels[:-HELD_OUT]
    side = pixels.shape[-1]
    encoder = IJepaConfig(
        hidden_size=settings["hidden_size"], num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"], intermediate_size=4 * settings["hidden_size"], image_size=side,
        patch_size=settings["patch"],
    )  # fmt: skip
    config = JepaConfig(encoder, **settings["jepa"])
    model = JepaForRepresentationPrediction(config).to(DEVICE).train()
    grid = model.encoder_adapter.grid
    with torch.no_grad():
        for one in (model.context_encoder, model.target_encoder):
            projection, table = one.embeddings.patch_embeddings.projection.weight, one.embeddings.position_embeddings
            if settings["patch_scale"]:  # times transformers' standard deviation
                projection.copy_(torch.randn_like(projection) * 0.02 * settings["patch_scale"])
            if not settings["sincos"]:
                table.copy_(torch.randn_like(table) * 0.02)
        match_both = zip(model.context_encoder.parameters(), model.target_encoder.parameters(), strict=True)
        for source, average in match_both:
            average.copy_(source)
    per_epoch = len(train) // settings["batch"]
    steps = settings["epochs"] * per_epoch
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    rate, shrink, decay = (torch.zeros((), device=DEVICE) for _ in range(3))
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True, capturable=DEVICE == "cuda")
    sources, averages = match_parameters(
        model.context_encoder.named_parameters(), model.target_encoder.named_parameters()
    )
    if settings["jitter"] or settings["views"]:
        encode_visible = model.encoder_adapter.encode_visible

        def encode_other_view(encoder, inputs, *rest, **flags):
            view = augment(train[index], settings["crop"]) if settings["views"] else inputs["pixel_values"]
            return encode_visible(encoder, {"pixel_values": jitter(view, settings["jitter"])}, *rest, **flags)

        model.encoder_adapter.encode_visible = encode_other_view

    def target_vectors(config, layers, batch):
        """The library's, over all positions, which are then averaged or standardized."""

        def normalized(states):
            states = targets._normalize(config.target_norm, states.float(), batch)
            if settings["views"]:  # positions of two crops do not match: the image's mean is the target everywhere
                states = states.mean(1, keepdim=True).expand_as(states)
            return standardize(states, settings["center"]) if settings["center"] else states

        vectors = sum(map(normalized, layers))
        if len(layers) > 1:
            vectors = normalized(vectors / len(layers))
        vectors = gather_positions(vectors, batch.positions.reshape(len(batch.samples), -1))
        return vectors.reshape(*batch.positions.shape, -1)

    changes_targets = settings["center"] or settings["views"]
    targets._target_vectors = target_vectors if changes_targets else _TARGET_VECTORS
    bank = mask_bank(settings, grid)
    names = ("target_positions", "target_valid", "context_positions", "context_valid")
    index = torch.zeros(settings["batch"], dtype=torch.long, device=DEVICE)

    def update() -> torch.Tensor:
        """One step, all of it on the device, so that it can be captured as a CUDA graph."""
        masked = torch.randint(len(bank[0]), (settings["batch"],), device=DEVICE)
        batch = {name: value[masked] for name, value in zip(names, bank, strict=True)}
        batch["pixel_values"] = augment(train[index], settings["crop"])
        with torch.autocast(DEVICE, torch.bfloat16):
            output = model(**batch, output_hidden_states=bool(settings["pooled"]))
        loss = output.loss
        if settings["pooled"]:  # the same terms on the mean of an image's tokens
            mean = output.context_state.float().mean(1)
            everything = torch.ones(len(mean), dtype=torch.bool, device=DEVICE)
            for name, weight in settings["pooled"].items():
                term = {"variance": variance_loss, "covariance": covariance_loss, "sigreg": sigreg}[name]
                loss = loss + weight * term(mean, everything)
        loss.backward()
        with torch.no_grad():
            torch._foreach_mul_(matrices, shrink)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, torch._foreach_mul(sources, 1 - decay))
        return output.prediction_loss

    def set_schedules(step: int) -> None:
        progress = step / steps
        now = settings["learning_rate"] * min((step + 1) / (settings["warmup"] * steps), 1.0)
        if progress > settings["warmup"]:
            now *= 0.5 * (1 + np.cos(np.pi * (progress - settings["warmup"]) / (1 - settings["warmup"])))
        low, high = settings["weight_decay"], settings["weight_decay_end"]
        rate.fill_(now)
        shrink.fill_(1 - now * (high + (low - high) * 0.5 * (1 + np.cos(np.pi * progress))))
        decay.fill_(interpolate_schedule(step + 1, steps, *settings["ema"], "linear"))

    graph = None
    if DEVICE == "cuda" and "NO_GRAPH" not in os.environ:
        set_schedules(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for turn in range(13):
                if turn == 3:
                    torch.cuda.synchronize()
                    begin = time.time()
                update()
                optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            print(f"without a graph {10 / (time.time() - begin):.1f} steps/s", file=sys.stderr, flush=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = update()
    begin = time.time()
    for step in range(steps):
        at = step % per_epoch * settings["batch"]
        if at == 0:
            order = torch.randperm(len(train), device=DEVICE)
        index.copy_(order[at : at + settings["batch"]])
        set_schedules(step)
        if graph is None:
            loss = update()
            optimizer.zero_grad(set_to_none=True)
        else:
            graph.replay()
        if step % 1000 == 999:
            speed = (step + 1) / (time.time() - begin)
            print(f"step {step + 1} of {steps}, {loss.item():.4f}, {speed:.1f} steps/s", file=sys.stderr, flush=True)
    last_loss = round(loss.item(), 4)
    seconds = time.time() - begin
    model.eval()
    result = {
        "variant": variant,
        "seconds": round(seconds, 1),
        "steps_per_s": round(steps / seconds, 1),
        "loss": last_loss,
    }
    for which in ("context", "target"):
        vectors_by_layer = features(model.get_encoder(which), pixels, settings["layers"] // 2)
        for name, vectors in vectors_by_layer.items():
            linear, knn_accuracy = accuracies(vectors, labels)
            result[f"{which}_{name}_linear"] = linear
            if name == "last":
                result[f"{which}_knn"] = knn_accuracy
        last = vectors_by_layer["last"]
        result[f"{which}_rank"] = round(effective_rank(last[:4000]).item(), 1)
        result[f"{which}_cosine"] = round(mean_pairwise_cosine(last[:4000]).item(), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--variants", help="a JSON file: a list of variants")
    parser.add_argument("--out", help="a file to write rows to, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no variant later than this")
    parser.add_argument("--shard", default="0/1", help="i/n: of the variants, numbers i, i + n, ...")
    options = parser.parse_args()
    begin = time.time()
    pixels, labels = (array[:LIMIT] for array in images(options.train_file))
    shard, shards = map(int, options.shard.split("/"))
    for variant in json.loads(Path(options.variants).read_text())[shard::shards]:
        if time.time() - begin > options.seconds:
            break
        try:
            row = json.dumps(run(pixels, labels, variant))
        except (RuntimeError, ValueError) as error:
            row = json.dumps({"variant": variant, "error": str(error)[:500]})
        print(row, flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(row + "\n")


if __name__ == "__main__":
    main()
