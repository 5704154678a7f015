"""The report of a run: one HTML page that needs no network and runs no script."""

import base64
import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.image_decoding import decode_image
from ..errors import UsageError
from ..evaluation.embedder import Embedder
from ..hub.export import JEPA_FOLDER
from ..models.backbones import backbone_for
from ..models.configuration_jepa import JepaConfig
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..monitoring.assessment import (
    MEASURED,
    History,
    Level,
    Reading,
    curve,
    percent,
    read_findings,
    read_samples,
    reasons,
    verdict,
)
from ..monitoring.metrics import effective_rank, mean_pairwise_cosine
from ..monitoring.training_plots import PANELS
from ..training.checkpoints import STATE_FILE, newest_whole
from ..training.run_directory import RUN_FILE, read_run, versions
from ..utils.atomic_files import whole_file
from .figures import map_svg, panel_svg, spectrum_svg
from .run_samples import RunSamples, load_run_samples

REPORT_FILE = "report.html"
EVALUATION_FILE = "evaluation/evaluation.json"

_QUERIES, _NEIGHBOURS = 6, 3
_TEXT_SHOWN = 160  # characters of a text
_THUMBNAIL = 96  # pixels
_PNG, _SVG = "image/png", "image/svg+xml"

# Settings that say most; all of them follow.
_MAIN_SETTINGS = (
    "model_name_or_path", "model_type", "config_overrides", "train_file", "dataset_name", "max_seq_length",
    "context_mode", "predictor_type", "loss", "target_layers", "target_norm", "mask_ratio", "mean_span_length",
    "num_masks", "ema_decay", "ema_decay_end", "learning_rate", "per_device_train_batch_size", "max_steps",
    "num_train_epochs", "seed",
)  # fmt: skip

# What metrics are called on the page, where not by their names.
_METRICS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman's correlation"}

# What the encoders are called on the page.
_ENCODERS = {"context": "context encoder", "target": "target encoder", "random": "random weights"}

_MASKED = {
    "text": "Of the first texts: what is hidden from the context encoder, and to be predicted, is marked.",
    "images": "Of the first images: what the context encoder sees, and the blocks to be predicted.",
    "features": "Of the first samples: what is hidden from the context encoder, and to be predicted, is shaded.",
    "any": "Of the first samples: what is hidden from the context encoder, and to be predicted.",
}


@dataclass(frozen=True)
class Run:
    """What a run left in its directory.

    Args:
        folder: the directory.
        status: how far it got, a sentence.
        history: what was logged, `trainer.state.log_history`.
        max_steps: the length that it was to have, None where it has logged nothing.
        settings: all arguments; empty where the directory does not note them.
        versions: of the packages that trained it, by name; empty where the directory does not note them.
        model: where the full model lies, None before the first checkpoint.
    """

    folder: Path
    status: str
    history: History
    max_steps: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model: Path | None = None


@dataclass(frozen=True)
class Representations:
    """One vector per sample, from the trained encoders and from the same network with random weights.

    Args:
        samples: whose vectors they are.
        modality: what the samples are.
        vectors: mean-pooled, float32 `[N, D]`, by encoder: "context", "target", "random".
    """

    samples: RunSamples
    modality: str
    vectors: dict[str, np.ndarray]


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    max_samples: int = 1000,
    evaluation: str | Path | None = None,
) -> Reading:
    """Write the page about a run.

    Args:
        run_dir: what a run of `run_jepa.py` wrote, finished or not.
        output: the file to write, default `run_dir/report.html`.
        max_samples: samples of the run's data behind spectrum, map and neighbours, at most.
        evaluation: what `jepa-hf evaluate` wrote, default `run_dir/evaluation/evaluation.json` where there is one.

    Returns:
        The verdict over the run.

    Raises:
        UsageError: no run there, a damaged file, or an output that cannot be written.
    """
    if max_samples < 2:
        raise UsageError(f"max_samples must be at least 2, not {max_samples}")
    run = load_run(run_dir)
    output = Path(run_dir) / REPORT_FILE if output is None else Path(output)
    with _writing(output):
        if output.is_dir() or not output.parent.is_dir():
            raise UsageError(f"output {str(output)!r} is a folder, or lies in none; name a file in an existing folder")
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    evaluated = _load_evaluation(run.folder, evaluation)
    represented: Representations | str
    try:
        represented = represent(run, max_samples)
    except UsageError as error:
        represented = str(error)
    page, judged = render(run, represented, evaluated)
    with _writing(output), whole_file(output) as new:
        new.write_text(page, encoding="utf-8", errors="replace")
    return judged


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"output {str(output)!r} cannot be written ({error.strerror}); name another place") from None


# ---- gathering


def load_run(run_dir: str | Path) -> Run:
    """What a run left in its directory.

    Raises:
        UsageError: no run there, or a damaged file.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UsageError(f"run directory {str(run_dir)!r} does not exist; name the output_dir of a run")
    noted = read_run(folder) if (folder / RUN_FILE).is_file() else {"settings": {}, "finished": True, "versions": {}}
    if noted["settings"].get("objective") == "llm":
        raise UsageError(
            f"{str(run_dir)!r} holds a run of a language model, and the report is about encoders: look at its "
            "README.md, metrics.json and training.png"
        )
    metrics, (checkpoint, _) = folder / "metrics.json", newest_whole(folder, contents=False)
    if not (folder / RUN_FILE).is_file() and not metrics.is_file() and checkpoint is None:
        raise UsageError(
            f"{str(run_dir)!r} holds no run (no {RUN_FILE}, metrics.json or checkpoint); name its output_dir"
        )
    if metrics.is_file() and (noted["finished"] or checkpoint is None):
        (history, max_steps), status = _history(metrics, "history"), "The run is finished"
    elif checkpoint is not None:
        history, max_steps = _history(checkpoint / STATE_FILE, "log_history")
        status = f"The run is not finished: this is its state at {checkpoint.name}"
    else:
        history, max_steps = [], None
        status = "The run has begun and saved no checkpoint yet, so there is nothing to show of it"
    steps = max((entry["step"] for entry in history if "step" in entry), default=0)
    if noted["settings"] and not noted["settings"].get("do_train", True):
        status = "This run only evaluated a model"
    elif history:
        status += f", after {steps:,} steps"
    models = [folder / JEPA_FOLDER] if noted["finished"] else []
    models = [place for place in (*models, checkpoint) if place is not None and (place / "config.json").is_file()]
    model = models[0] if models else None
    return Run(folder, f"{status}.", history, max_steps, noted["settings"], noted["versions"], model)


def _history(path: Path, key: str) -> tuple[History, int | None]:
    """What was logged, and the length of the run in steps."""
    content = _read_json(path)
    history = content.get(key) if isinstance(content, dict) else None
    if (
        not isinstance(history, list)
        or not all(isinstance(entry, dict) and isinstance(entry.get("step", 0), int) for entry in history)
        or not isinstance(content.get("max_steps", 0), int)
    ):
        raise UsageError(f"{path} is damaged (it holds no list {key} of what was logged); restore it, or train again")
    return history, content.get("max_steps")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}); restore it") from None


def _load_evaluation(folder: Path, evaluation: str | Path | None) -> Any:
    path = folder / EVALUATION_FILE if evaluation is None else Path(evaluation)
    if evaluation is None and not path.is_file():
        return None
    if not path.is_file():
        raise UsageError(f"evaluation {str(path)!r} is no file; name what `jepa-hf evaluate` wrote")
    content = _read_json(path)
    try:
        _evaluation(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path} is not what `jepa-hf evaluate` writes; make it anew") from None
    return content


def represent(run: Run, max_samples: int) -> Representations:
    """Vectors of the run's own samples.

    Raises:
        UsageError: there is no model, its data is not there any more, or either cannot be read.
    """
    if run.model is None:
        raise UsageError("the run has saved no model yet")
    if not run.settings:
        raise UsageError(f"the directory does not note the run's data ({RUN_FILE} is not there)")
    context = Embedder.from_pretrained(run.model, max_seq_length=run.settings.get("max_seq_length"))
    samples = load_run_samples(run.settings, context.modality, max_samples)
    if len(samples.samples) < 2:
        raise UsageError("the run's data has a single sample, and one alone has no neighbours")
    model = JepaForRepresentationPrediction.from_pretrained(run.model)
    encoders = {"context": context}
    for name, encoder in (("target", model.target_encoder), ("random", _random_start(model, run.settings))):
        encoders[name] = Embedder(encoder, context.processing_class, name=name, max_seq_length=context.max_seq_length)
    watched = sys.stderr.isatty()
    vectors = {
        name: embedder.embed(samples.samples, show_progress=watched)["mean"] for name, embedder in encoders.items()
    }
    return Representations(samples, context.modality, vectors)


def _random_start(model: JepaForRepresentationPrediction, settings: dict[str, Any]) -> torch.nn.Module:
    """The same encoder with random weights, of the run's seed; of features it knows mean and spread too."""
    with torch.random.fork_rng():
        torch.manual_seed(int(settings.get("seed", 42)))
        start = JepaForRepresentationPrediction._from_config(model.config)
    if model.backbone.modality == "features":
        trained = model.context_encoder
        start.set_standardization(trained.feature_mean, trained.feature_std)
    return start.context_encoder


# ---- the page


def render(run: Run, represented: Representations | str, evaluation: Any = None) -> tuple[str, Reading]:
    """The page, and its verdict.

    Args:
        represented: vectors of samples, or a sentence that says why there are none.
        evaluation: the content of what `jepa-hf evaluate` wrote, None where there is none.
    """
    config = _config(run.model)
    curves, readings = _curves(run.history, None if config is None else config.hidden_size)
    samples = _no_samples(represented) if isinstance(represented, str) else _samples(represented, readings)
    readings += read_findings(run.history, run.max_steps)
    judged = verdict(readings, measured=bool(curve(run.history, f"{MEASURED}constant_prediction_loss")))
    modality = "any" if config is None else backbone_for(config.encoder_config).modality
    body = [
        f"<h1>{escape(run.folder.resolve().name)}</h1>",
        f'<p class="soft">{escape(run.status)} {escape(str(run.folder))}</p>',
        _verdict(judged, reasons(readings)),
        _section("Loss and health", curves),
        _section("What was masked", _masks(run.folder, modality)),
        _section("Probes", _evaluation(evaluation, run.folder)),
        samples,
        _section("Settings", _settings(run.settings)),
        _section("Versions", _versions(run.versions)),
    ]
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    title = escape(f"{run.folder.resolve().name}: {judged.level.name.lower().replace('_', ' ')}")
    return template.substitute(title=title, body="\n".join(body)), judged


def _verdict(judged: Reading, sentences: Sequence[str]) -> str:
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return (
        f'<div class="verdict {judged.level.name.lower()}"><strong>{escape(judged.sentence)}</strong>'
        f"<ul>{listed}</ul></div>"
    )


def _curves(history: History, width: int | None) -> tuple[str, list[Reading]]:
    """The panels that the log has a curve for, each with its sentence."""
    figures, readings = [], []
    for panel in PANELS:
        if not any(curve(history, name) for name, _ in panel.curves):
            continue
        readings.append(panel.read(history, panel.curves, width))
        figures.append(_figure(panel.title, _svg_image(panel_svg(panel, history), panel.title), readings[-1]))
    if not figures:
        return "<p>Nothing was logged yet.</p>", readings
    return _panels(figures), readings


def _masks(folder: Path, modality: str) -> str:
    picture = folder / "masks.png"
    if not picture.is_file():
        return "<p>The directory has no masks.png; <code>jepa-hf masks</code> with the run's flags draws one.</p>"
    image = _image(picture.read_bytes(), _PNG, "what was masked", 'class="white"')
    return f"<figure>{image}<figcaption>{_MASKED[modality]}</figcaption></figure>"


def _evaluation(evaluation: Any, folder: Path) -> str:
    if evaluation is None:
        command = f"jepa-hf evaluate {folder} --tasks FILE --output_dir {folder / 'evaluation'}"
        return f"<p>There are no probes of this run yet; <code>{escape(command)}</code> makes them.</p>"
    scores = evaluation["scores"]
    columns = list(dict.fromkeys((score["task"], score["metric"]) for score in scores))
    header = ("task", "metric", "model", "pooling", "score", "95 % interval", "difference to the first", "samples")
    rows = [
        (
            score["task"],
            _METRICS.get(score["metric"], score["metric"]),
            score["model"],
            score["pooling"],
            f"{100 * score['value']:.1f}",
            _interval(score),
            _difference(score),
            f"{score['n']:,}",
        )
        for score in sorted(scores, key=lambda score: columns.index((score["task"], score["metric"])))
    ]
    told = (
        "Scores × 100 of frozen representations on test samples. Where the interval of a difference to the first model "
        "holds 0, these samples do not tell the two apart."
    )
    return f"<p>{told}</p>{_table(header, rows)}"


def _interval(score: dict[str, Any], sign: str = "") -> str:
    low, high = score["confidence_interval"]
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _difference(score: dict[str, Any]) -> str:
    found = score.get("difference_to_first_model")
    return "" if found is None else f"{100 * found['value']:+.1f} ({_interval(found, '+')})"


def _no_samples(reason: str) -> str:
    return _section(
        "Representations",
        f"<p>Spectrum, map and neighbours are left out: {escape(reason)}. They come from the run's own data, which is "
        "looked for where the run's settings say, from the folder in which the report is made.</p>",
    )


def _samples(represented: Representations, readings: list[Reading]) -> str:
    """Spectrum, map and neighbours; the spectrum's reading joins the others."""
    samples, vectors = represented.samples, represented.vectors
    tensors = {name: torch.from_numpy(values) for name, values in vectors.items()}
    ranks = {name: effective_rank(tensor).item() for name, tensor in tensors.items()}
    cosines = {name: mean_pairwise_cosine(tensor).item() for name, tensor in tensors.items()}
    reading = read_samples(ranks, cosines, vectors["context"].shape[1])
    readings.append(reading)
    spectrum = spectrum_svg(
        {_ENCODERS[name]: singular_values(values) for name, values in vectors.items()},
        {_ENCODERS[name]: rank for name, rank in ranks.items()},
    )
    points, share = principal_components(vectors["context"])
    labels = _useful(samples.labels)
    told = (
        f"Each dot is a sample, placed by the two directions in which the context encoder's vectors vary most, which "
        f"hold {percent(share)} of the variance. Vectors lie {_apart(vectors['context'])} of their length from their "
        "mean."
    )
    if labels is not None:
        told += f" {_label_agreement(vectors['context'], labels)}"
    figures = [
        _figure("Singular values", _svg_image(spectrum, "singular values of the vectors"), reading),
        _figure("Map of the samples", _svg_image(map_svg(points, labels), "map of the samples"), Reading(told)),
    ]
    counted = len(samples.samples)
    source = f"{counted:,} samples of the run's data, {samples.held_out:,} of them held out of the training"
    if samples.damaged:
        source += f" (damaged and left out: {samples.damaged:,})"
    intro = f'<p class="soft">From {source}: one vector for each, the mean over its positions.</p>'
    return _section("Representations", intro + _panels(figures)) + _section(
        "Nearest neighbours", _neighbours(represented)
    )


def _neighbours(represented: Representations) -> str:
    samples = represented.samples
    among = samples.held_out if samples.held_out >= _QUERIES else len(samples.samples)
    queries = np.unique(np.linspace(0, among - 1, _QUERIES).astype(int))
    nearest, cosines = nearest_neighbours(represented.vectors["context"], queries, _NEIGHBOURS)
    head = "".join(f"<th>{name}</th>" for name in ("sample", *("nearest", "second", "third")[: nearest.shape[1]]))
    rows = []
    for query, found, similar in zip(queries, nearest, cosines, strict=True):
        cells = [_sample(represented, query)]
        for at, cosine in zip(found, similar, strict=True):
            cells.append(_sample(represented, at, f"cosine {cosine:.4f}"))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        "<p>Samples and those whose vectors are nearest by cosine, out of the same samples: they should have something "
        'in common.</p><div class="scroll"><table class="neighbours">'
        f"<tr>{head}</tr>{''.join(rows)}</table></div>"
    )


def _sample(represented: Representations, at: int, *remarks: str) -> str:
    """A sample in a cell: a text, a thumbnail, or the number of its row; below it its label, and what is remarked."""
    samples = represented.samples
    below = [*([] if samples.labels is None else [f"label {_short(samples.labels[at])}"]), *remarks]
    match represented.modality:
        case "text":
            shown = escape(_short(samples.samples[at]))
        case "images":
            shown = _thumbnail(samples.samples[at], samples.rows[at])
        case _:
            shown = escape(samples.rows[at])
    return f'{shown}<div class="soft">{escape(", ".join(below))}</div>'


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_SHOWN else f"{text[: _TEXT_SHOWN - 1]}…"


def _thumbnail(stored: dict[str, Any], name: str) -> str:
    image = decode_image(stored, "RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # Small images, such as CIFAR's, are shown larger, in whole pixels.
    times = max(_THUMBNAIL // max(image.size), 1)
    image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return _image(file.getvalue(), _PNG, name)


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return f"<p>The directory does not note them ({RUN_FILE} is not there).</p>"
    idle = ("num_train_epochs",) if settings.get("max_steps", -1) > 0 else ("max_steps",)
    main = [(name, settings[name]) for name in _MAIN_SETTINGS if settings.get(name) is not None and name not in idle]
    everything = _table(("setting", "value"), sorted(settings.items()))
    return f"{_table(('setting', 'value'), main)}<details><summary>All settings</summary>{everything}</details>"


def _versions(trained: dict[str, str]) -> str:
    here = versions()
    rows = [(name, trained.get(name, "not noted"), here.get(name, "")) for name in (*here, *(set(trained) - set(here)))]
    return _table(("package", "of the run", "of this page"), rows)


# ---- numbers of the page


def singular_values(vectors: np.ndarray) -> np.ndarray:
    """Of the centred vectors, `[N, D]` -> `[min(N, D)]`, descending, in units of the root mean square length.

    Their squares are shares of the mean squared length: small throughout where vectors hardly differ.
    """
    vectors = vectors.astype(np.float64)
    length = np.linalg.norm(vectors)
    return np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) / max(length, 1e-12)


def _apart(vectors: np.ndarray) -> str:
    """How far vectors lie from their mean, over their lengths, both root mean squares."""
    return f"{100 * np.linalg.norm(singular_values(vectors)):.2g} %"


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """The first two principal components of the vectors, `[N, D]` -> `[N, 2]`, and their share of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    kept = min(2, len(singular))
    points[:, :kept] = left[:, :kept] * singular[:kept]
    return points, float(np.square(singular[:2]).sum() / max(np.square(singular).sum(), 1e-300))


def nearest_neighbours(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each query, the vectors nearest to it by cosine, itself left out.

    Args:
        vectors: `[N, D]`.
        queries: numbers of Q vectors.
        count: neighbours of each; N − 1 at most.

    Returns:
        Their numbers and cosines, `[Q, count]`, the nearest first.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit[queries] @ unit.T
    cosines[np.arange(len(queries)), queries] = -np.inf
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def _useful(labels: list[str] | None) -> list[str] | None:
    """Labels that several samples share; numbers that are different for nearly every sample say nothing."""
    if labels is None or not 1 < len(set(labels)) <= len(labels) / 2:
        return None
    return labels


def _label_agreement(vectors: np.ndarray, labels: list[str]) -> str:
    names = np.array(labels)
    nearest, _ = nearest_neighbours(vectors, np.arange(len(vectors)), 1)
    same = float((names[nearest[:, 0]] == names).mean())
    counts = np.unique(names, return_counts=True)[1]
    chance = float((counts * (counts - 1)).sum() / (len(names) * (len(names) - 1)))
    return f"{percent(same)} of them have the label of their nearest neighbour; chance gives {percent(chance)}."


# ---- HTML


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}"


def _panels(figures: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def _figure(title: str, image: str, reading: Reading) -> str:
    level = reading.level.name.lower() if reading.level > Level.UNJUDGED else ""
    return (
        f"<figure><h3>{escape(title)}</h3>{image}"
        f'<figcaption class="{level}">{escape(reading.sentence)}</figcaption></figure>'
    )


def _svg_image(svg: str, description: str) -> str:
    return _image(svg.encode(), _SVG, description)


def _image(content: bytes, kind: str, description: str, attributes: str = "") -> str:
    data = base64.b64encode(content).decode()
    return f'<img src="data:{kind};base64,{data}" alt="{escape(description)}" {attributes}>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _config(model: Path | None) -> JepaConfig | None:
    """The model's, where there is one that can be read; if not, the page says so where it misses the vectors."""
    try:
        return None if model is None else JepaConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        return None
