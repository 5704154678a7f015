"""Components of an I-JEPA run on images: image processor, images, model, collator."""

from typing import cast

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, ViTImageProcessorPil

from ..data.arguments import DataArguments
from ..data.image_datasets import load_image_datasets
from ..data.image_decoding import leave_out_unreadable
from ..errors import UsageError
from ..hub.loading import load_or_usage_error
from ..masking.block_collator import DataCollatorForBlockJEPA
from ..models.encoder_adapters import encoder_adapter_for
from ..models.vision_adapter import VisionEncoderAdapter
from .arguments import ModelArguments, Parsed
from .encoder_loading import TrainingComponents, build_model, hub_kwargs

_MASKS = (
    "num_masks",
    "target_scale",
    "target_aspect_ratio",
    "context_scale",
    "keep_blocks_inside",
    "random_resized_crop",
    "random_flip",
)


def prepare_images(parsed: Parsed, config: PreTrainedConfig) -> TrainingComponents:
    """Prepare model, collator and images. Errors of model and masks are raised before the data is read."""
    model_args, data_args, mask_args, args = parsed
    _check_size(config)
    processor = _image_processor(model_args, data_args, config)
    collator = DataCollatorForBlockJEPA(
        processor,
        cast(tuple[int, int], _adapter(config).grid),
        num_channels=config.num_channels,
        seed=args.seed,
        **mask_args.given_for("images", _MASKS),
    )
    model = build_model(model_args, data_args, config)
    with args.main_process_first(desc="loading data"):
        train_images, eval_images = load_image_datasets(data_args, seed=args.seed, need_validation=args.do_eval)
    train_images = leave_out_unreadable(train_images, "training")
    eval_images = None if eval_images is None else leave_out_unreadable(eval_images, "validation")
    return TrainingComponents(model, collator, train_images, eval_images, processor)


def _adapter(config: PreTrainedConfig) -> VisionEncoderAdapter:
    """Return the adapter of an image encoder."""
    return cast(VisionEncoderAdapter, encoder_adapter_for(config))


def _check_size(config: PreTrainedConfig) -> None:
    encoder_adapter = _adapter(config)
    if any(side % patch for side, patch in zip(encoder_adapter.image_size, encoder_adapter.patch_size, strict=True)):
        raise UsageError(
            f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}, so the "
            "encoder would ignore the last pixels; set both in --config_overrides"
        )


def _image_processor(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> BaseImageProcessor:
    """Load the image processor and set the model's size; for a random start, create one that maps pixels to -1..1."""
    size = dict(zip(("height", "width"), _adapter(config).image_size, strict=True))
    name, argument = model_args.image_processor_name, "image_processor_name"
    if name is None:
        name, argument = model_args.model_name_or_path, "model_name_or_path"
    if name is None:
        mean = [0.5] * config.num_channels
        return ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean, do_convert_rgb=config.num_channels == 3)
    processor = load_or_usage_error(
        name, AutoImageProcessor.from_pretrained, hub_kwargs(model_args, data_args), argument
    )
    processor.size, processor.do_center_crop = size, False
    return processor
