"""Report of a run: one self-contained HTML page without scripts."""

import base64
import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ..data.image_decoding import decode_image
from ..errors import UsageError
from ..evaluation.embedder import Embedder
from ..evaluation.names import METRIC_LABELS
from ..hub.export import JEPA_FOLDER
from ..hub.loading import hidden_loading_bars
from ..models.configuration_jepa import JepaConfig
from ..models.encoder_adapters import encoder_adapter_for
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..monitoring.assessment import (
    Assessment,
    History,
    Severity,
    Verdict,
    assess_samples,
    format_percent,
    judge,
    metric_series,
)
from ..monitoring.metrics import effective_rank, mean_pairwise_cosine, singular_values
from ..monitoring.training_plots import LLM_PANELS, PANELS, Panel
from ..monitoring.view_health import term_weights
from ..training.checkpoints import STATE_FILE, latest_valid_checkpoint
from ..training.run_directory import RUN_FILE, read_run, versions
from ..utils.atomic_files import atomic_write
from ..utils.counts import counted
from .figures import panel_svg, scatter_svg, spectrum_svg
from .run_samples import RunSamples, load_run_samples

REPORT_FILE = "report.html"
EVALUATION_FILE = "evaluation/evaluation.json"

_QUERIES, _NEIGHBOURS = 6, 3
_TEXT_SHOWN = 160  # characters
_THUMBNAIL = 96  # pixels
_PNG, _SVG = "image/png", "image/svg+xml"

# The most informative settings; the page lists all of them below.
_MAIN_SETTINGS = (
    "model_name_or_path", "model_type", "config_overrides", "train_file", "dataset_name", "max_seq_length",
    "masked_tokens", "predictor_type", "loss", "average_top_k_layers", "target_norm", "mask_ratio", "mean_span_length",
    "num_masks", "ema_decay", "ema_decay_end", "learning_rate", "per_device_train_batch_size", "max_steps",
    "num_train_epochs", "seed",
)  # fmt: skip

# Names of the encoders on the page.
_ENCODERS = {"context": "context encoder", "target": "target encoder", "random": "random weights"}

_MASK_CAPTIONS = {
    "text": "The first texts. Marked tokens are hidden from the context encoder and have to be predicted.",
    "images": "The first images: the part that the context encoder receives, and the blocks to predict.",
    "features": "The first samples. Shaded parts are hidden from the context encoder and have to be predicted.",
    "any": "The first samples, and the parts that are hidden from the context encoder and have to be predicted.",
}


@dataclass(frozen=True)
class Run:
    """Contents of a run's directory.

    `status` is a sentence about the progress. Before the first checkpoint, `model`, the directory of the full model, is
    None. Settings and versions are empty if they are unknown.
    """

    folder: Path
    status: str
    history: History
    max_steps: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    model: Path | None = None

    @property
    def loss_weights(self) -> dict[str, float] | None:
        """Weights of the terms of LLM-JEPA's loss by their names in the log; None for an encoder."""
        if self.settings.get("objective") != "llm":
            return None
        return term_weights(self.settings)


@dataclass(frozen=True)
class Representations:
    """Mean-pooled vectors of samples, float32 `[N, D]`, by encoder: "context", "target" and "random" weights."""

    samples: RunSamples
    modality: str
    vectors: dict[str, np.ndarray]


def write_report(
    run_dir: str | Path, output: str | Path | None = None, max_samples: int = 1000, evaluation: str | Path | None = None
) -> Verdict:
    """Write the page about a run.

    Args:
        run_dir: output directory of a run of `run_jepa.py`, finished or not.
        output: the file to write. Default: `run_dir/report.html`.
        max_samples: maximum number of the run's samples for the spectrum, the map and the
            neighbours.
        evaluation: `evaluation.json` of `jepa-hf evaluate`. Default:
            `run_dir/evaluation/evaluation.json` if it exists.

    Returns:
        The verdict on the run.

    Raises:
        UsageError: the directory holds no run, a file is damaged, or the output cannot be written.
    """
    if max_samples < 2:
        raise UsageError(f"Expected max_samples to be at least 2, got {max_samples}.")
    run = load_run(run_dir)
    output = Path(run_dir) / REPORT_FILE if output is None else Path(output)
    with _writing(output):
        if output.is_dir() or not output.parent.is_dir():
            raise UsageError(f"Output {str(output)!r} is not a file in an existing folder. Name one that is.")
        if not os.access(output.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    evaluation_content = _load_evaluation(run.folder, evaluation)
    representations: Representations | str | None = None
    if run.loss_weights is None:
        try:
            representations = compute_representations(run, max_samples)
        except UsageError as error:
            representations = str(error)
    page, run_verdict = render(run, representations, evaluation_content)
    with _writing(output), atomic_write(output) as new:
        new.write_text(page, encoding="utf-8", errors="replace")
    return run_verdict


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"Output {str(output)!r} cannot be written ({error.strerror}). Name another.") from None


# ---- reading the run


def load_run(run_dir: str | Path) -> Run:
    """Read the directory of a run; refuse one without a run or with a damaged file."""
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UsageError(f"The run directory {str(run_dir)!r} does not exist. Name the output_dir of a run.")
    has_record = (folder / RUN_FILE).is_file()
    record: dict[str, Any] = (
        read_run(folder) if has_record else {"settings": {}, "finished": True, "stopped_early": False, "versions": {}}
    )
    metrics, (checkpoint, _) = folder / "metrics.json", latest_valid_checkpoint(folder, contents=False)
    if not has_record and not metrics.is_file() and checkpoint is None:
        raise UsageError(
            f"{str(run_dir)!r} holds no run: no {RUN_FILE}, metrics.json or checkpoint. Name the output_dir of a run."
        )
    max_steps: int | None = None
    ended = record["finished"] or record["stopped_early"]
    if metrics.is_file() and (ended or checkpoint is None):
        (history, max_steps), status = _history(metrics, "history"), "The run finished"
        if record["stopped_early"]:
            status = "The watchdog stopped the run (--stop_on_collapse)"
    elif checkpoint is not None:
        history, max_steps = _history(checkpoint / STATE_FILE, "log_history")
        status = f"The run is not finished; this page shows {checkpoint.name},"
    else:
        history, status = [], "The run has started, but has saved no checkpoint yet"
    steps = max((entry["step"] for entry in history if "step" in entry), default=0)
    if not ended and checkpoint is not None:
        steps = int(checkpoint.name.rpartition("-")[2])
    if record["settings"] and not record["settings"].get("do_train", True):
        status = "This run only evaluated a model"
    elif history:
        status += f" after {counted(steps, 'step')}"
    models = [folder / JEPA_FOLDER] if ended else []
    if checkpoint is not None:
        models.append(checkpoint)
    model = next((path for path in models if (path / "config.json").is_file()), None)
    return Run(folder, f"{status.rstrip(',')}.", history, max_steps, record["settings"], record["versions"], model)


def _history(path: Path, key: str) -> tuple[History, int | None]:
    """Read the log entries and the planned number of steps."""
    content = _read_json(path)
    history = content.get(key) if isinstance(content, dict) else None
    if (
        not isinstance(history, list)
        or not all(isinstance(entry, dict) and isinstance(entry.get("step", 0), int) for entry in history)
        or not isinstance(content.get("max_steps", 0), int)
    ):
        raise UsageError(f"{path} is damaged: {key!r} is not a list of log entries. Restore it, or train again.")
    return history, content.get("max_steps")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}). Restore it.") from None


def _load_evaluation(folder: Path, evaluation: str | Path | None) -> Any:
    path = folder / EVALUATION_FILE if evaluation is None else Path(evaluation)
    if not path.is_file():
        if evaluation is None:
            return None
        raise UsageError(f"The evaluation {str(path)!r} is not a file. Name an evaluation.json of jepa-hf evaluate.")
    content = _read_json(path)
    try:
        _evaluation(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path} is not an evaluation of jepa-hf evaluate. Evaluate again.") from None
    return content


def compute_representations(run: Run, max_samples: int) -> Representations:
    """Embed samples of the run's data with the trained encoders and with random weights.

    Raises:
        UsageError: the model or the data is missing or cannot be read.
    """
    if run.model is None:
        raise UsageError("The run has saved no model yet.")
    if not run.settings:
        raise UsageError(f"The run directory has no {RUN_FILE}, which names the run's data.")
    context = Embedder.from_pretrained(run.model, max_seq_length=run.settings.get("max_seq_length"))
    samples = load_run_samples(run.settings, context.modality, max_samples, context.feature_column_names)
    if len(samples.samples) < 2:
        raise UsageError("The run's data has a single sample, which has no neighbours.")
    with hidden_loading_bars():
        model = JepaForRepresentationPrediction.from_pretrained(run.model)
    encoders = {"context": context}
    for name, encoder in (("target", model.target_encoder), ("random", _random_init_encoder(model, run.settings))):
        encoders[name] = Embedder(encoder, context.processing_class, name=name, max_seq_length=context.max_seq_length)
    show_progress = sys.stderr.isatty()
    vectors = {
        name: embedder.embed(samples.samples, show_progress=show_progress)["mean"]
        for name, embedder in encoders.items()
    }
    return Representations(samples, context.modality, vectors)


def _random_init_encoder(model: JepaForRepresentationPrediction, settings: dict[str, Any]) -> PreTrainedModel:
    """Build the context encoder with random weights from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(int(settings.get("seed", 42)))
        start = JepaForRepresentationPrediction._from_config(model.config)
    if model.encoder_adapter.modality == "features":
        # The standardization is computed from the data, not trained.
        trained = model.context_encoder
        start.set_standardization(trained.feature_mean, trained.feature_std)
    return cast(PreTrainedModel, start.context_encoder)


# ---- the page


def render(run: Run, represented: Representations | str | None, evaluation: Any = None) -> tuple[str, Verdict]:
    """Render the page as HTML, and judge the run.

    Args:
        run: the run.
        represented: vectors of samples, or the reason that there are none; None for a language model, whose page has
            the tables of its card instead of masks, probes and samples.
        evaluation: content of the `evaluation.json` of `jepa-hf evaluate`; None if there is none.
    """
    of_samples = None
    if represented is None:
        curves, readings = _curves(LLM_PANELS, run.history)
        sections = [_card(run.folder)]
    else:
        config = _config(run.model)
        curves, readings = _curves(PANELS, run.history, None if config is None else config.hidden_size)
        modality = "any" if config is None else encoder_adapter_for(config.encoder_config).modality
        sections = [
            _section("What was masked", _masks(run.folder, modality)),
            _section("Probes", _evaluation(evaluation, run.folder)),
        ]
        if isinstance(represented, str):
            sections.append(_no_samples(represented))
        else:
            of_samples, samples = _samples(represented)
            sections.append(samples)
            readings.append(of_samples)
    run_verdict = judge(run.history, run.max_steps, str(run.folder), of_samples, run.loss_weights)
    body = [
        f"<h1>{escape(run.folder.resolve().name)}</h1>",
        f'<p class="soft">{escape(run.status)} {escape(str(run.folder))}</p>',
        _verdict(run_verdict, [reading.sentence for reading in readings if reading.severity >= Severity.WARNING]),
        _section("Loss and health", curves),
        *sections,
        _section("Settings", _settings(run.settings)),
        _section("Versions", _versions(run.versions)),
    ]
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    title = escape(f"{run.folder.resolve().name}: {run_verdict.severity.name.lower().replace('_', ' ')}")
    return template.substitute(title=title, body="\n".join(body)), run_verdict


def _verdict(run_verdict: Verdict, readings: Sequence[str]) -> str:
    first = f"{run_verdict.title}. {run_verdict.reasons[0]} {run_verdict.skill}".strip()
    sentences = dict.fromkeys((*run_verdict.reasons[1:], *readings, f"Next: {run_verdict.advice}"))
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    kind = run_verdict.severity.name.lower()
    return f'<div class="verdict {kind}"><strong>{escape(first)}</strong><ul>{items}</ul></div>'


def _curves(panels: Sequence[Panel], history: History, width: int | None = None) -> tuple[str, list[Assessment]]:
    """Draw the panels whose curves are in the log, each with its reading."""
    figures, readings = [], []
    for panel in panels:
        if any(metric_series(history, name) for name, _ in panel.curves):
            readings.append(panel.assess(history, panel.curves, width))
            figures.append(_figure(panel.title, _svg_image(panel_svg(panel, history), panel.title), readings[-1]))
    if not figures:
        return "<p>The log is empty.</p>", readings
    return _panels(figures), readings


def _card(folder: Path) -> str:
    """Render the tables of a language model's card: how it was trained, and the last evaluation."""
    card = folder / "README.md"
    if not card.is_file():
        return _section("Model card", "<p>The run directory has no README.md yet.</p>")
    sections = []
    for title, text in re.findall(r"^## (.+)\n([^#]*)", card.read_text(encoding="utf-8"), re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
        if cells:
            header, _, *rows = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in row] for row in cells]
            sections.append(_section(escape(title), _table(header, rows)))
    return "\n".join(sections)


def _masks(folder: Path, modality: str) -> str:
    picture = folder / "masks.png"
    if not picture.is_file():
        return (
            "<p>The run directory has no masks.png. To draw one, use <code>jepa-hf masks</code> with the run's "
            "flags.</p>"
        )
    image = _image(picture.read_bytes(), _PNG, "what was masked", 'class="white"')
    return f"<figure>{image}<figcaption>{_MASK_CAPTIONS[modality]}</figcaption></figure>"


def _evaluation(evaluation: Any, folder: Path) -> str:
    if evaluation is None:
        command = f"jepa-hf evaluate {folder} --tasks FILE --output_dir {folder / 'evaluation'}"
        return f"<p>This run has not been evaluated. To do so, use <code>{escape(command)}</code>.</p>"
    scores = evaluation["scores"]
    columns = list(dict.fromkeys((score["task"], score["metric"]) for score in scores))
    header = ("task", "metric", "model", "pooling", "score", "95 % interval", "difference to first model", "samples")
    rows = [
        (
            score["task"],
            METRIC_LABELS.get(score["metric"], score["metric"]),
            score["model"],
            score["pooling"],
            f"{100 * score['value']:.1f}",
            _interval(score),
            _difference(score),
            f"{score['n']:,}",
        )
        for score in sorted(scores, key=lambda score: columns.index((score["task"], score["metric"])))
    ]
    intro = (
        "Scores × 100 of frozen representations on test samples. If the interval of a difference contains 0, these "
        "samples do not show which of the two models is better."
    )
    return f"<p>{intro}</p>{_table(header, rows)}"


def _interval(score: dict[str, Any], sign: str = "") -> str:
    low, high = score["confidence_interval"]
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _difference(score: dict[str, Any]) -> str:
    difference = score.get("difference_to_first_model")
    return "" if difference is None else f"{100 * difference['value']:+.1f} ({_interval(difference, '+')})"


def _no_samples(reason: str) -> str:
    return _section(
        "Representations",
        f"<p>Spectrum, map and neighbours are missing: {escape(reason.removesuffix('.'))}.</p>"
        "<p>They need the run's data. Relative paths in the run's settings start at the folder in which the report is "
        "made.</p>",
    )


def _samples(represented: Representations) -> tuple[Assessment, str]:
    """Render spectrum, map and neighbours; the assessment is that of the spectrum."""
    samples, vectors = represented.samples, represented.vectors
    tensors = {name: torch.from_numpy(values) for name, values in vectors.items()}
    ranks = {name: effective_rank(tensor).item() for name, tensor in tensors.items()}
    cosines = {name: mean_pairwise_cosine(tensor).item() for name, tensor in tensors.items()}
    reading = assess_samples(ranks, cosines, vectors["context"].shape[1])
    spectrum = spectrum_svg(
        {_ENCODERS[name]: relative_singular_values(values) for name, values in vectors.items()},
        {_ENCODERS[name]: rank for name, rank in ranks.items()},
    )
    figures = [
        _figure("Singular values", _svg_image(spectrum, "singular values of the vectors"), reading),
        _map_figure(represented),
    ]
    details = [f"{samples.held_out:,} held out from training"]
    if samples.damaged:
        details.append(f"{samples.damaged:,} damaged ones skipped")
    intro = (
        f'<p class="soft">From {counted(len(samples.samples), "sample")} of the run\'s data ({", ".join(details)}). '
        "The vector of a sample is the mean over its positions.</p>"
    )
    neighbours = _section("Nearest neighbours", _neighbours(represented))
    return reading, _section("Representations", intro + _panels(figures)) + neighbours


def _map_figure(represented: Representations) -> str:
    vectors = represented.vectors["context"]
    points, share = principal_components(vectors)
    labels = _informative_labels(represented.samples.labels)
    caption = (
        "Each dot is a sample, at the first two principal components of the context encoder's vectors, which explain "
        f"{format_percent(share)} of the variance. The distance of the vectors from their mean is "
        f"{100 * np.linalg.norm(relative_singular_values(vectors)):.2g} % of their length (both root mean square)."
    )
    if labels is not None:
        caption += f" {_label_agreement(vectors, labels)}"
    return _figure(
        "Map of the samples", _svg_image(scatter_svg(points, labels), "map of the samples"), Assessment(caption)
    )


def _neighbours(represented: Representations) -> str:
    samples = represented.samples
    num_candidates = samples.held_out if samples.held_out >= _QUERIES else len(samples.samples)
    queries = np.unique(np.linspace(0, num_candidates - 1, _QUERIES).astype(int))
    nearest, cosines = nearest_neighbours(represented.vectors["context"], queries, _NEIGHBOURS)
    ranks = ("nearest", "second nearest", "third nearest")[: nearest.shape[1]]
    head = "".join(f"<th>{name}</th>" for name in ("sample", *ranks))
    rows = []
    for query, neighbours, query_cosines in zip(queries, nearest, cosines, strict=True):
        cells = [_sample(represented, query)]
        for neighbour, cosine in zip(neighbours, query_cosines, strict=True):
            cells.append(_sample(represented, neighbour, f"cosine {cosine:.4f}"))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        "<p>Some samples and their nearest neighbours by cosine. Neighbours should have something in common.</p>"
        f'<div class="scroll"><table class="neighbours"><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _sample(represented: Representations, index: int, *remarks: str) -> str:
    """Render a sample as a text, a thumbnail or its row number; below it label and remarks."""
    samples = represented.samples
    below = [*([] if samples.labels is None else [f"label {_short(samples.labels[index])}"]), *remarks]
    match represented.modality:
        case "text":
            content = escape(_short(samples.samples[index]))
        case "images":
            content = _thumbnail(samples.samples[index], samples.rows[index])
        case _:
            content = escape(samples.rows[index])
    return f'{content}<div class="soft">{escape(", ".join(below))}</div>'


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_SHOWN else f"{text[: _TEXT_SHOWN - 1]}…"


def _thumbnail(stored: dict[str, Any], name: str) -> str:
    image = decode_image(stored, "RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # Enlarge small images, such as CIFAR's, by an integer factor.
    factor = max(_THUMBNAIL // max(image.size), 1)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return _image(file.getvalue(), _PNG, name)


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return f"<p>Unknown: the run directory has no {RUN_FILE}.</p>"
    unused = "num_train_epochs" if settings.get("max_steps", -1) > 0 else "max_steps"
    main = [(name, settings[name]) for name in _MAIN_SETTINGS if settings.get(name) is not None and name != unused]
    header = ("setting", "value")
    main, listed = ([(name, _setting(value)) for name, value in part] for part in (main, sorted(settings.items())))
    all_settings = _table(header, listed)
    return f"{_table(header, main)}<details><summary>All settings</summary>{all_settings}</details>"


def _setting(value: Any) -> str:
    """Format a setting as a recipe has it.

    >>> _setting(None), _setting(True), _setting([0.15, 0.2]), _setting({"num_cycles": 2, "min_lr": None})
    ('not set', 'true', '0.15, 0.2', 'num_cycles: 2, min_lr: not set')
    """
    if isinstance(value, dict) and value:
        return ", ".join(f"{name}: {_setting(part)}" for name, part in value.items())
    if isinstance(value, list) and value:
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value or isinstance(value, (int, float)) else "not set"


def _versions(run_versions: dict[str, str]) -> str:
    current = versions()
    names = (*current, *(set(run_versions) - set(current)))
    rows = [(name, run_versions.get(name, "unknown"), current.get(name, "")) for name in names]
    return _table(("package", "version in the run", "version for this page"), rows)


# ---- numbers of the page


def relative_singular_values(vectors: np.ndarray) -> np.ndarray:
    """Return the centered vectors' singular values over the vectors' Frobenius norm, descending.

    Their squares are shares of the mean squared length, so all are small if the vectors hardly
    differ: `[N, D]` -> `[min(N, D)]`.
    """
    tensor = torch.from_numpy(vectors).double()
    return (singular_values(tensor) / tensor.norm().clamp_min(1e-12)).numpy()


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the first two principal components `[N, 2]`, and their share of the variance."""
    centered = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    rank = min(2, len(singular))
    points[:, :rank] = left[:, :rank] * singular[:rank]
    return points, float(np.square(singular[:2]).sum() / max(np.square(singular).sum(), 1e-300))


def nearest_neighbours(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the vectors nearest to each query by cosine, other than the query itself.

    Returns:
        Numbers and cosines of the neighbours, `[Q, count]`, the nearest first.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit[queries] @ unit.T
    cosines[np.arange(len(queries)), queries] = -np.inf
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def _informative_labels(labels: list[str] | None) -> list[str] | None:
    """Return the labels if they group the samples; None if all are equal or most are distinct."""
    if labels is None or not 1 < len(set(labels)) <= len(labels) / 2:
        return None
    return labels


def _label_agreement(vectors: np.ndarray, labels: list[str]) -> str:
    names = np.array(labels)
    nearest, _ = nearest_neighbours(vectors, np.arange(len(vectors)), 1)
    share = float((names[nearest[:, 0]] == names).mean())
    counts = np.unique(names, return_counts=True)[1]
    chance = float((counts * (counts - 1)).sum() / (len(names) * (len(names) - 1)))
    shares = format_percent(share), format_percent(chance)
    return "{} of the samples have the label of their nearest neighbour (chance: {}).".format(*shares)


# ---- HTML


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}"


def _panels(figures: Iterable[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def _figure(title: str, image: str, reading: Assessment) -> str:
    level = reading.severity.name.lower() if reading.severity > Severity.NOT_ASSESSED else ""
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
    """Return the model's config; None if it cannot be loaded, which the page then mentions."""
    try:
        return None if model is None else JepaConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        return None
