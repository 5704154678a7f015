"""`Embedder`: one pooled vector per text, image or feature vector, from any frozen encoder."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from ..data.feature_columns import abbreviate
from ..data.feature_datasets import check_precision
from ..data.image_decoding import decode_image, failure_reason
from ..errors import UsageError, one_line
from ..hub.loading import load_or_usage_error
from ..models.configuration_jepa import JepaConfig
from ..models.encoder_adapters import encoder_adapter_for
from ..models.encoders import encoder_and_loading_info
from ..models.losses import layer_norm_no_affine, masked_mean
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..models.text_adapters import TextEncoderAdapter
from ..training.run_directory import check_has_model
from ..utils.types import ProcessingClass
from .names import POOLINGS
from .progress import progress_bar
from .samples import list_features, list_images, list_texts

logger = logging.getLogger(__name__)

_MODALITIES = {"input_ids": "text", "pixel_values": "images", "features": "features"}


class Embedder:
    """A frozen encoder with its tokenizer or image processor; embeds each sample as one vector.

    The poolings, each `[N, D]`:

    - "mean": mean of the last hidden states over all tokens but padding, as mean pooling in
      sentence-transformers. For images: mean over the patches.
    - "cls": last hidden state of the first token, which must be a [CLS] token.
    - "layers": like "mean", but of the average of the upper half of the layers, each normalized
      over D without affine parameters. These are the targets of data2vec (Baevski et al. 2022,
      section 3.3) and of this package.

    Args:
        encoder: plain transformers model that reads `input_ids`, `pixel_values` or `features`.
        processing_class: its tokenizer or image processor; None for feature vectors.
        name: name in tables and messages. Default: its `name_or_path`.
        batch_size: samples per batch.
        max_seq_length: truncate texts to this many tokens, special tokens included. Default: the
            smaller of the encoder's and the tokenizer's limit.
        device: default: the GPU if available, else the CPU.

    Raises:
        UsageError: the model is not an encoder, its tokenizer or image processor is missing, or a
            number is out of range.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        processing_class: ProcessingClass | None = None,
        *,
        name: str | None = None,
        batch_size: int = 64,
        max_seq_length: int | None = None,
        device: str | None = None,
    ):
        self.name = str(encoder.config.name_or_path) if name is None else name
        _check_is_encoder(encoder.config, self.name)
        if encoder.main_input_name not in _MODALITIES:
            raise UsageError(
                f"{self.name!r} reads {encoder.main_input_name}. Give an encoder of texts, images or feature vectors."
            )
        self.modality = _MODALITIES[encoder.main_input_name]
        # Without tokenizer files AutoTokenizer builds one that has special tokens only.
        if self.modality == "text" and (
            not isinstance(processing_class, PreTrainedTokenizerBase)
            or set(processing_class.get_vocab().values()) <= set(processing_class.all_special_ids)
        ):
            raise UsageError(f"{self.name!r} lacks its tokenizer. Save it in the same directory.")
        if self.modality == "images" and not isinstance(processing_class, BaseImageProcessor):
            raise UsageError(f"{self.name!r} lacks its image processor. Save it in the same directory.")
        if batch_size < 1:
            raise UsageError(f"Expected batch_size to be at least 1, got {batch_size}.")
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.max_seq_length = (
            self._resolve_max_length(encoder.config, max_seq_length) if self.modality == "text" else None
        )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder = encoder.eval()
        self.encoder.to(device=self.device)
        self._messages: set[str] = set()

    @property
    def feature_column_names(self) -> list[str] | None:
        """Columns of features that the encoder reads, in order; None if unknown, or for other modalities."""
        return self.encoder.config.feature_column_names if self.modality == "features" else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        batch_size: int = 64,
        max_seq_length: int | None = None,
        device: str | None = None,
        **hub_kwargs: Any,
    ) -> Self:
        """Load an encoder in float32, with its tokenizer or image processor.

        Args:
            name_or_path: directory or Hub name of an encoder that `AutoModel` loads, or of a JEPA
                model of this package (`out/jepa` or a checkpoint), whose context encoder is used.
            batch_size: see `Embedder`.
            max_seq_length: see `Embedder`.
            device: see `Embedder`.
            hub_kwargs: arguments of `from_pretrained`: `revision`, `token`, `cache_dir`, `trust_remote_code`.

        Raises:
            UsageError: the model cannot be loaded, or is not an encoder.
        """
        name = str(name_or_path)
        check_has_model("", name)
        hub_kwargs = {"trust_remote_code": False, **hub_kwargs}  # None would prompt on the terminal
        config = load_or_usage_error(name, AutoConfig.from_pretrained, hub_kwargs)
        _check_is_encoder(config, name)
        if isinstance(config, JepaConfig):
            encoder = load_or_usage_error(
                name, JepaForRepresentationPrediction.from_pretrained, hub_kwargs
            ).get_encoder()
        else:
            encoder = _load_encoder(name, config, hub_kwargs)
        loaders = {"input_ids": AutoTokenizer.from_pretrained, "pixel_values": AutoImageProcessor.from_pretrained}
        loader = loaders.get(encoder.main_input_name)
        processor = loader and load_or_usage_error(name, loader, hub_kwargs)
        embedder = cls(
            encoder, processor, name=name, batch_size=batch_size, max_seq_length=max_seq_length, device=device
        )
        if embedder.feature_column_names is not None:
            logger.info("%s reads the columns %s", name, abbreviate(embedder.feature_column_names))
        return embedder

    def embed(
        self,
        samples: Any,
        pooling: str | Sequence[str] = ("mean",),
        show_progress: bool = False,
        feature_column_names: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Embed samples as one vector per sample and pooling.

        Samples are batched by length. The batches do not change the result.

        Args:
            samples: one input of the encoder, or an iterable of them: strings; images (PIL, paths,
                bytes, dicts of `bytes` and `path`, or uint8 arrays `[H, W]` or `[H, W, C]`); or
                feature vectors `[F]` or series `[T, F]`. Features also as a table (DataFrame,
                Dataset, or dicts by column name), whose columns are found by name.
            pooling: any of "mean", "cls" and "layers".
            show_progress: whether to show a progress bar.
            feature_column_names: names of the features in `samples`, by which those of the encoder
                are found. Default: they are in the encoder's order.

        Returns:
            By pooling, float32 `[N, D]` in the order of the samples; `[D]` for a single one.

        Raises:
            UsageError: there are no samples, a pooling is unknown, "cls" is requested without a
                [CLS] token, the encoder cannot read a sample, or representations are not finite.
        """
        pooling = (pooling,) if isinstance(pooling, str) else pooling
        match self.modality:
            case "text":
                rows, single = list_texts(samples)
            case "images":
                rows, single = list_images(samples)
            case _:
                row_dims = 2 if self.encoder.config.mode == "time" else 1
                rows, single, names = list_features(samples, row_dims, self.feature_column_names)
                feature_column_names = names or feature_column_names
        results = self.embed_list(rows, pooling, show_progress, feature_column_names)
        return {name: vectors[0] for name, vectors in results.items()} if single else results

    def _column_order(self, names: Sequence[str] | None) -> list[int] | None:
        """Return the places of the encoder's columns among these; None if they are the same, or unknown.

        Raises:
            UsageError: a column is missing, or repeated.
        """
        expected = self.feature_column_names
        repeated = [name for name, count in Counter(names or ()).items() if count > 1]
        if repeated:
            raise UsageError(f"The features have the column {repeated[0]!r} more than once. Rename or remove one.")
        if names is None or expected == list(names):
            return None
        if expected is None:
            message = "was trained without column names; columns are read in the order of the table"
        elif len(expected) != self.encoder.config.input_dim or len(names) == 1:  # a column of lists
            return None
        else:
            missing = sorted(set(expected) - set(names), key=expected.index)
            if missing:
                raise UsageError(
                    f"{self.name!r} reads the column {missing[0]!r}, which the features lack, as {len(missing)} of its "
                    f"{len(expected)} columns ({abbreviate(expected)}). Give the table that it was trained on."
                )
            ignored = sorted(set(names) - set(expected), key=list(names).index)
            message = f"does not read the columns {abbreviate(ignored)}" if ignored else ""
        if message and message not in self._messages:
            logger.info("%s %s", self.name, message)
            self._messages.add(message)
        places = {name: place for place, name in enumerate(names)}
        return None if expected is None else [places[name] for name in expected]

    @torch.inference_mode()
    def embed_list(
        self,
        samples: Sequence[Any],
        pooling: Sequence[str] = ("mean",),
        show_progress: bool = False,
        feature_column_names: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Embed a list of samples, as `embed` does: float32 `[N, D]` by pooling."""
        for name in pooling:
            if name not in POOLINGS:
                raise UsageError(f"Expected pooling to be one of {', '.join(POOLINGS)}, got {name!r}.")
        if len(samples) == 0:
            raise UsageError("Got no samples to embed. Give at least one.")
        match self.modality:
            case "text":
                rows: Sequence[Any] = self._token_rows(samples)
            case "features":
                rows = self._feature_rows(samples, feature_column_names)
            case _:
                rows = samples
        lengths = [0 if self.modality == "images" else len(row) for row in rows]
        # The longest first, so that running out of memory shows at once.
        order = np.argsort(np.negative(lengths), kind="stable")
        results: dict[str, np.ndarray] = {}
        with progress_bar(len(rows), self.name, "samples", show_progress) as bar:
            for begin in range(0, len(order), self.batch_size):
                batch_rows = order[begin : begin + self.batch_size]
                for name, pooled in self._pooled(self._batch(rows, batch_rows), pooling).items():
                    if name not in results:
                        results[name] = np.empty((len(rows), pooled.shape[1]), dtype=np.float32)
                    results[name][batch_rows] = pooled.float().cpu().numpy()
                bar.update(len(batch_rows))
        for vectors in results.values():
            if not np.isfinite(vectors).all():
                raise UsageError(
                    f"{self.name!r} gives representations that are not finite. Its weights are damaged; restore them."
                )
        return results

    # ---- from samples to batches

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The processing class of a text encoder."""
        return cast(PreTrainedTokenizerBase, self.processing_class)

    def _resolve_max_length(self, config: PreTrainedConfig, max_seq_length: int | None) -> int:
        """Return the maximum number of tokens of a text."""
        limit = self._tokenizer.model_max_length
        if "max_position_embeddings" in config.to_dict():  # encoders with relative positions have no limit
            limit = min(limit, cast(TextEncoderAdapter, encoder_adapter_for(config)).max_length)
        if max_seq_length is not None and not 1 <= max_seq_length <= limit:
            raise UsageError(
                f"Expected max_seq_length from 1 to {limit}, the limit of {self.name!r}, got {max_seq_length}."
            )
        return max_seq_length or limit

    def _token_rows(self, samples: Sequence[Any]) -> list[torch.Tensor]:
        """Tokenize texts, each to long `[L]`."""
        for number, sample in enumerate(samples):
            if not isinstance(sample, str):
                raise UsageError(f"{self.name!r} reads texts, but sample {number + 1} is {type(sample).__name__}.")
        # Tokenizers without a limit have a huge one, which overflows.
        limit = self.max_seq_length if self.max_seq_length and self.max_seq_length < 2**31 else None
        rows: list[torch.Tensor] = []
        for begin in range(0, len(samples), 1000):
            texts = list(samples[begin : begin + 1000])
            tokens = self._tokenizer(texts, truncation=limit is not None, max_length=limit)
            rows += map(torch.tensor, tokens["input_ids"])
        empty = next((number for number, row in enumerate(rows) if not len(row)), None)
        if empty is not None:
            raise UsageError(f"Sample {empty + 1} has no tokens. Leave it out.")
        return rows

    def _feature_rows(self, samples: Sequence[Any], names: Sequence[str] | None) -> list[torch.Tensor]:
        """Convert features to the encoder's columns, each to float32 `[F]` or `[T, F]`."""
        columns = self._column_order(names)
        config = self.encoder.config
        shape = ["steps", config.input_dim] if config.mode == "time" else [config.input_dim]
        rows, precise_rows = [], []
        for number, sample in enumerate(samples, 1):
            try:
                precise = np.asarray(sample)
                row = torch.from_numpy(np.array(precise, dtype=np.float32))
            except (TypeError, ValueError):
                raise UsageError(
                    f"{self.name!r} reads features, but sample {number} is not a rectangular array of numbers."
                ) from None
            if columns is not None and names is not None:
                if row.shape[-1:] != (len(names),):
                    raise UsageError(
                        f"Expected {len(names)} features, as feature_column_names has, got the shape "
                        f"{list(row.shape)} in sample {number}. Name each feature."
                    )
                row, precise = row[..., columns], precise[..., columns]
            if row.dim() != len(shape) or row.shape[-1] != config.input_dim or not row.numel():
                hint = f": {abbreviate(self.feature_column_names)}" if self.feature_column_names else ""
                raise UsageError(
                    f"Expected features of shape {shape} for {self.name!r}, got {list(row.shape)} in sample {number}. "
                    f"Give the columns it was trained on{hint}."
                )
            if not row.isfinite().all():
                raise UsageError(f"Sample {number} has a number that is not finite. Fix it or leave it out.")
            rows.append(row)
            precise_rows.append(precise)
        check_precision(precise_rows, self.feature_column_names or names or (), "the samples")
        return rows

    def _batch(self, rows: Sequence[Any], numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """Collate the rows with these numbers into the encoder's arguments."""
        if self.modality == "images":
            images = [self._image(int(number), rows[number]) for number in numbers]
            processor = cast(BaseImageProcessor, self.processing_class)
            pixels = processor(images, return_tensors="pt", do_convert_rgb=False)["pixel_values"]
            batch = {"pixel_values": pixels}
        elif self.modality == "features" and self.encoder.config.mode != "time":
            batch = {"features": torch.stack([rows[number] for number in numbers])}
        else:
            name = self.encoder.main_input_name
            padding = self._tokenizer.pad_token_id or 0 if self.modality == "text" else 0
            padded = pad_sequence([rows[number] for number in numbers], batch_first=True, padding_value=padding)
            lengths = torch.tensor([len(rows[number]) for number in numbers])
            batch = {name: padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}
        return {name: values.to(self.device) for name, values in batch.items()}

    def _image(self, number: int, sample: Any) -> Any:
        path = sample.get("path") if isinstance(sample, dict) else None
        place = f"Sample {number + 1}" + ("" if path is None else f" ('{path}')")
        try:
            return decode_image(sample, "L" if getattr(self.encoder.config, "num_channels", 3) == 1 else "RGB")
        except UsageError as error:
            raise UsageError(f"{place} {error}") from None
        except Exception as error:  # PIL's decoders raise nearly any exception on damaged data
            raise UsageError(f"{place} is an image {failure_reason(error)}. Fix it or leave it out.") from None

    # ---- from batches to vectors

    def _pooled(self, batch: dict[str, torch.Tensor], pooling: Sequence[str]) -> dict[str, torch.Tensor]:
        """Encode a batch and pool it: by pooling, `[B, D]`."""
        try:
            output = self.encoder(**batch, output_hidden_states="layers" in pooling, return_dict=True)
        except UsageError:
            raise
        except ValueError as error:  # the image processor's size is not the encoder's
            raise UsageError(f"{self.name!r} cannot read its own input: {one_line(error)}") from None
        states = output.last_hidden_state
        if states.dim() != 3:
            raise UsageError(
                f"Expected representations [batch, tokens, width] of {self.name!r}, got the shape "
                f"{list(states.shape)}. Give a transformer encoder."
            )
        mask = self._pooling_mask(batch, states)[..., None]
        pooled: dict[str, torch.Tensor] = {}
        for name in pooling:
            match name:
                case "mean":
                    pooled[name] = masked_mean(states, mask, dim=1)
                case "cls":
                    self._check_cls(batch)
                    pooled[name] = states[:, 0]
                case "layers":
                    pooled[name] = masked_mean(self._mean_upper_layers(output.hidden_states), mask, dim=1)
        return pooled

    def _pooling_mask(self, batch: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """Return the mask of a mean, bool `[B, L]`: False for padding and tokens before the patches."""
        if "attention_mask" in batch:
            return batch["attention_mask"].bool()
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if self.modality == "images":
            mask[:, : states.shape[1] - self._patches(batch["pixel_values"], states.shape[1])] = False
        return mask

    def _patches(self, pixels: torch.Tensor, length: int) -> int:
        """Return the number of patches, or `length` if the encoder has no patch size."""
        size = getattr(self.encoder.config, "patch_size", None)
        if size is None:
            return length
        height, width = (size, size) if isinstance(size, int) else size
        return min(length, (pixels.shape[-2] // height) * (pixels.shape[-1] // width))

    def _check_cls(self, batch: dict[str, torch.Tensor]) -> None:
        if self.modality == "text":
            token = self._tokenizer.cls_token_id
            has_cls = token is not None and bool((batch["input_ids"][:, 0] == token).all())
        else:
            has_cls = any(name.rpartition(".")[2] == "cls_token" for name, _ in self.encoder.named_parameters())
        if not has_cls:
            raise UsageError(f"{self.name!r} puts no [CLS] token first. Choose the pooling mean or layers.")

    def _mean_upper_layers(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Average the upper half of the layers, each normalized: `[B, L, D]`."""
        # The first state is that of the embedding layer, which does not count.
        upper = hidden_states[-(len(hidden_states) // 2) :]
        if len({state.shape for state in upper}) > 1:
            raise UsageError(f"The layers of {self.name!r} differ in shape. Choose the pooling mean.")
        total = layer_norm_no_affine(upper[0])
        for state in upper[1:]:
            total = total + layer_norm_no_affine(state)
        return total / len(upper)


def _load_encoder(name: str, config: PreTrainedConfig, hub_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a plain encoder; instead of transformers' table of weights, warn in a line of those that it lacks."""
    kwargs: dict[str, Any] = {"dtype": torch.float32, **hub_kwargs}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        if hub_kwargs["trust_remote_code"]:
            kwargs["output_loading_info"] = True
            encoder, info = load_or_usage_error(name, AutoModel.from_pretrained, kwargs)
        else:
            encoder, info = load_or_usage_error(name, encoder_and_loading_info, {"config": config, **kwargs})
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    if missing:
        logger.warning("%s lacks weights, which are random now: %s", name, abbreviate(missing))
    return encoder


def _check_is_encoder(config: PreTrainedConfig, name: str) -> None:
    if isinstance(config, JepaConfig):
        return
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or (causal and type(config) not in AutoModelForMaskedLM._model_mapping):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder"
        raise UsageError(f"{name!r} is {kind} ({config.model_type}). Give an encoder.")
