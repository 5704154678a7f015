"""One vector per sample from any frozen encoder: texts, images or feature vectors in, pooled representations out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
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

from ..data.image_decoding import decode_image
from ..errors import UsageError
from ..hub.loading import load_pretrained
from ..models.backbones import backbone_for, encoder_from_pretrained
from ..models.configuration_jepa import JepaConfig
from ..models.losses import layer_normalize
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass

POOLINGS = ("mean", "cls", "layers")
_MODALITIES = {"input_ids": "text", "pixel_values": "images", "features": "features"}


class Embedder:
    """A frozen encoder and what prepares its input: texts, images or feature vectors in, one vector per sample out.

    The poolings, each `[N, D]`:

    - "mean": the mean of the last hidden states over the real tokens, special tokens included, as
      sentence-transformers' mean pooling; of an image, over its patches.
    - "cls": the last hidden state of the first token, where that is a [CLS] token.
    - "layers": the mean over the same tokens of the average of the upper half of the layers, each normalised over D
      without affine part, which are the targets of data2vec (Baevski et al. 2022, section 3.3) and of this package.

    Args:
        encoder: a plain transformers model that reads `input_ids`, `pixel_values` or `features`.
        processing_class: its tokenizer or image processor; feature vectors need none.
        name: how to call it in tables; default its `name_or_path`.
        batch_size: samples that go through the encoder together.
        max_seq_length: texts are cut to so many tokens, special tokens included; default what encoder and tokenizer
            take.
        device: default the GPU if there is one, else the CPU.

    Raises:
        UsageError: a model that is no encoder, one without its tokenizer or image processor, or numbers out of range.
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
        _refuse_decoders(encoder.config, self.name)
        if encoder.main_input_name not in _MODALITIES:
            raise UsageError(
                f"{self.name!r} reads {encoder.main_input_name}; give an encoder of texts, images or feature vectors"
            )
        self.modality = _MODALITIES[encoder.main_input_name]
        # Where there is no tokenizer, AutoTokenizer makes one that knows special tokens only.
        if self.modality == "text" and (
            not isinstance(processing_class, PreTrainedTokenizerBase)
            or set(processing_class.get_vocab().values()) <= set(processing_class.all_special_ids)
        ):
            raise UsageError(f"{self.name!r} lacks its tokenizer; save it in the same directory")
        if self.modality == "images" and not isinstance(processing_class, BaseImageProcessor):
            raise UsageError(f"{self.name!r} lacks its image processor; save it in the same directory")
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.max_seq_length = self._longest(encoder.config, max_seq_length) if self.modality == "text" else None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder = encoder.to(self.device).eval()

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
        """Load an encoder and what lies beside it; the weights become float32.

        Args:
            name_or_path: directory or Hub name of any encoder that `AutoModel` loads, or of a JEPA of ours (`out/jepa`
                or a checkpoint), of which it takes the context encoder.
            batch_size, max_seq_length, device: see `Embedder`.
            hub_kwargs: where to find the files and whether to trust code: `revision`, `token`, `cache_dir`,
                `trust_remote_code`.

        Raises:
            UsageError: nothing that can be loaded lies there, or it is no encoder.
        """
        name = str(name_or_path)
        hub_kwargs = {"trust_remote_code": False, **hub_kwargs}  # None would ask on the terminal
        config = load_pretrained(name, AutoConfig.from_pretrained, hub_kwargs)
        _refuse_decoders(config, name)
        if isinstance(config, JepaConfig):
            encoder = load_pretrained(name, JepaForRepresentationPrediction.from_pretrained, hub_kwargs).get_encoder()
        elif hub_kwargs.get("trust_remote_code"):
            encoder = load_pretrained(name, AutoModel.from_pretrained, {"dtype": torch.float32, **hub_kwargs})
        else:
            kwargs = {"config": config, "dtype": torch.float32, **hub_kwargs}
            encoder = load_pretrained(name, encoder_from_pretrained, kwargs)
        loaders = {"input_ids": AutoTokenizer, "pixel_values": AutoImageProcessor}
        loader = loaders.get(encoder.main_input_name)
        beside = loader and load_pretrained(name, loader.from_pretrained, hub_kwargs)
        return cls(encoder, beside, name=name, batch_size=batch_size, max_seq_length=max_seq_length, device=device)

    @torch.inference_mode()
    def embed(
        self, samples: Sequence[Any], pooling: Sequence[str] = ("mean",), show_progress: bool = False
    ) -> dict[str, np.ndarray]:
        """One vector per sample and pooling. Batches are made of samples of like length, and do not change the result.

        Args:
            samples: strings; images (PIL, dicts of `bytes` and `path`, or uint8 arrays `[H, W]` or `[H, W, C]`); or
                feature vectors `[F]`, or series of them `[T, F]`, whatever the encoder reads.
            pooling: names out of "mean", "cls" and "layers".
            show_progress: show a bar.

        Returns:
            For each pooling float32 `[N, D]`, in the order of the samples.

        Raises:
            UsageError: no samples, an unknown pooling, "cls" of an encoder without [CLS] token, a sample that the
                encoder cannot read, or representations that are not finite.
        """
        for name in pooling:
            if name not in POOLINGS:
                raise UsageError(f"pooling must be one of {', '.join(POOLINGS)}, not {name!r}")
        if len(samples) == 0:
            raise UsageError("there are no samples to embed; give at least one")
        rows = samples if self.modality == "images" else [self._row(at, sample) for at, sample in self._read(samples)]
        lengths = [0 if self.modality == "images" else len(row) for row in rows]
        # The longest first: what does not fit into memory shows at once.
        order = np.argsort(np.negative(lengths), kind="stable")
        results: dict[str, np.ndarray] = {}
        with tqdm(total=len(rows), desc=self.name, unit=" samples", disable=not show_progress, leave=False) as bar:
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                for name, vectors in self._pooled(self._batch(rows, chosen), pooling).items():
                    values = vectors.float().cpu().numpy()
                    results.setdefault(name, np.empty((len(rows), values.shape[1]), dtype=np.float32))[chosen] = values
                bar.update(len(chosen))
        for vectors in results.values():
            if not np.isfinite(vectors).all():
                raise UsageError(f"{self.name!r} gives representations that are not finite; its weights are damaged")
        return results

    # ---- from samples to batches

    def _longest(self, config: PreTrainedConfig, max_seq_length: int | None) -> int:
        longest = self.processing_class.model_max_length
        if "max_position_embeddings" in config.to_dict():  # encoders of relative positions take any length
            longest = min(longest, backbone_for(config).max_length)
        if max_seq_length is not None and not 1 <= max_seq_length <= longest:
            raise UsageError(
                f"max_seq_length must be from 1 to {longest}, which {self.name!r} takes, not {max_seq_length}"
            )
        return max_seq_length or longest

    def _read(self, samples: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """The samples with their numbers; texts as lists of token ids."""
        if self.modality == "features":
            yield from enumerate(samples)
            return
        for at, sample in enumerate(samples):
            if not isinstance(sample, str):
                raise UsageError(f"sample {at + 1} is {type(sample).__name__}, but {self.name!r} reads texts")
        longest = self.max_seq_length if self.max_seq_length < 2**31 else None
        for begin in range(0, len(samples), 1000):
            tokens = self.processing_class(
                list(samples[begin : begin + 1000]), truncation=longest is not None, max_length=longest
            )
            yield from enumerate(tokens["input_ids"], begin)

    def _row(self, at: int, sample: Any) -> torch.Tensor:
        """A text as long `[L]`, features as float32 `[F]` or `[T, F]`."""
        if self.modality == "text":
            if not sample:
                raise UsageError(f"sample {at + 1} has no token; leave it out")
            return torch.tensor(sample)
        try:
            row = torch.from_numpy(np.array(sample, dtype=np.float32))
        except (TypeError, ValueError):
            raise UsageError(f"sample {at + 1} is no rectangle of numbers, but {self.name!r} reads features") from None
        config = self.encoder.config
        shape = ["steps", config.input_dim] if config.mode == "time" else [config.input_dim]
        if row.dim() != len(shape) or row.shape[-1] != config.input_dim or not row.numel():
            raise UsageError(
                f"sample {at + 1} has the shape {list(row.shape)}, but {self.name!r} reads {shape}; give it the "
                "columns it was trained on"
            )
        if not row.isfinite().all():
            raise UsageError(f"sample {at + 1} has a number that is not finite; mend it or leave it out")
        return row

    def _batch(self, rows: Sequence[Any], chosen: np.ndarray) -> dict[str, torch.Tensor]:
        """The encoder's arguments."""
        if self.modality == "images":
            batch = {"pixel_values": self._pixel_values([self._image(int(at), rows[at]) for at in chosen])}
        elif self.modality == "features" and self.encoder.config.mode != "time":
            batch = {"features": torch.stack([rows[at] for at in chosen])}
        else:
            name = self.encoder.main_input_name
            padding = self.processing_class.pad_token_id or 0 if self.modality == "text" else 0
            padded = pad_sequence([rows[at] for at in chosen], batch_first=True, padding_value=padding)
            lengths = torch.tensor([len(rows[at]) for at in chosen])
            batch = {name: padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}
        return {name: values.to(self.device) for name, values in batch.items()}

    def _image(self, at: int, sample: Any) -> Any:
        try:
            return decode_image(sample, "L" if getattr(self.encoder.config, "num_channels", 3) == 1 else "RGB")
        except UsageError as error:
            raise UsageError(f"sample {at + 1} {error}") from None
        except Exception:  # PIL's decoders raise nearly anything on damaged data
            raise UsageError(f"sample {at + 1} cannot be decoded as an image; mend it or leave it out") from None

    def _pixel_values(self, images: list[Any]) -> torch.Tensor:
        return self.processing_class(images, return_tensors="pt", do_convert_rgb=False)["pixel_values"]

    # ---- from batches to vectors

    def _pooled(self, batch: dict[str, torch.Tensor], pooling: Sequence[str]) -> dict[str, torch.Tensor]:
        """The vectors of a batch by pooling, `[B, D]` each."""
        try:
            output = self.encoder(**batch, output_hidden_states="layers" in pooling, return_dict=True)
        except UsageError:
            raise
        except ValueError as error:  # images of another size than the encoder's
            raise UsageError(f"{self.name!r} cannot read its own input: {' '.join(str(error).split())}") from None
        states = output.last_hidden_state
        if states.dim() != 3:
            raise UsageError(
                f"{self.name!r} gives representations of the shape {list(states.shape)}, not [batch, tokens, width]; "
                "give a transformer encoder"
            )
        mask = self._counted(batch, states)[..., None]
        pooled: dict[str, torch.Tensor] = {}
        for name in pooling:
            match name:
                case "mean":
                    pooled[name] = _masked_mean(states, mask)
                case "cls":
                    self._check_cls(batch)
                    pooled[name] = states[:, 0]
                case "layers":
                    pooled[name] = _masked_mean(self._upper_half(output.hidden_states), mask)
        return pooled

    def _counted(self, batch: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """What a mean is over, float `[B, L]`: 0 for padding and for what precedes patches, 1 for the rest."""
        if "attention_mask" in batch:
            return batch["attention_mask"].to(states.dtype)
        counted = torch.ones(states.shape[:2], dtype=states.dtype, device=states.device)
        if self.modality == "images":
            counted[:, : states.shape[1] - self._patches(batch["pixel_values"], states.shape[1])] = 0
        return counted

    def _patches(self, pixels: torch.Tensor, length: int) -> int:
        """Number of patches among so many tokens."""
        size = getattr(self.encoder.config, "patch_size", None)
        if size is None:
            return length
        height, width = (size, size) if isinstance(size, int) else size
        return min(length, (pixels.shape[-2] // height) * (pixels.shape[-1] // width))

    def _check_cls(self, batch: dict[str, torch.Tensor]) -> None:
        if self.modality == "text":
            token = self.processing_class.cls_token_id
            found = token is not None and bool((batch["input_ids"][:, 0] == token).all())
        else:
            found = any(name.rpartition(".")[2] == "cls_token" for name, _ in self.encoder.named_parameters())
        if not found:
            raise UsageError(f"{self.name!r} puts no [CLS] token first: choose the pooling mean or layers")

    def _upper_half(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """The average of the upper half of the layers, each normalised: `[B, L, D]`. The embeddings are no layer."""
        upper = hidden_states[-(len(hidden_states) // 2) :]
        if len({state.shape for state in upper}) > 1:
            raise UsageError(f"the layers of {self.name!r} differ in shape: choose the pooling mean")
        return sum(layer_normalize(state) for state in upper) / len(upper)


def _masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`[B, L, D]`, `[B, L, 1]` -> `[B, D]`."""
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def _refuse_decoders(config: PreTrainedConfig, name: str) -> None:
    if isinstance(config, JepaConfig):
        return
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or (causal and type(config) not in AutoModelForMaskedLM._model_mapping):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "a decoder"
        raise UsageError(f"{name!r} is {kind} ({config.model_type}), not an encoder; give an encoder")
