"""I-JEPA on images: image processor, images, model and collator of a run."""

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, ViTImageProcessorPil

from ..data.arguments import DataArguments
from ..data.image_datasets import load_image_datasets
from ..errors import UsageError
from ..hub.loading import load_pretrained
from ..masking.block_collator import DataCollatorForBlockJEPA
from ..models.backbones import backbone_for
from ..models.configuration_jepa import JepaConfig
from .arguments import ModelArguments, Parsed
from .encoder_loading import Prepared, build_model, hub_kwargs

_MASKS = (
    "num_masks",
    "target_scale",
    "target_aspect_ratio",
    "context_scale",
    "inside_targets",
    "random_resized_crop",
    "random_flip",
)


def prepare_images(parsed: Parsed, config: PreTrainedConfig) -> Prepared:
    """Model, collator and images. What is wrong with the model or the masks is told before the data is read."""
    model_args, data_args, mask_args, args = parsed
    JepaConfig.for_encoder(config, **model_args.jepa_kwargs())  # refuses an impossible combination
    _check_size(config)
    processor = _image_processor(model_args, data_args, config)
    collator = DataCollatorForBlockJEPA(
        processor,
        backbone_for(config).grid,
        num_channels=config.num_channels,
        seed=args.seed,
        **mask_args.chosen("images", _MASKS),
    )
    model = build_model(model_args, data_args, config)
    with args.main_process_first(desc="loading data"):
        train_images, eval_images = load_image_datasets(data_args, seed=args.seed, need_validation=args.do_eval)
    return Prepared(model, collator, train_images, eval_images, processor)


def _check_size(config: PreTrainedConfig) -> None:
    backbone = backbone_for(config)
    if any(side % patch for side, patch in zip(backbone.image_size, backbone.patch_size, strict=True)):
        raise UsageError(
            f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}, so the last pixels "
            "would never be seen; set both in --config_overrides"
        )


def _image_processor(
    model_args: ModelArguments, data_args: DataArguments, config: PreTrainedConfig
) -> BaseImageProcessor:
    """The named one or the model's own, at the model's size; for a random start, one that maps pixels to -1..1."""
    size = dict(zip(("height", "width"), backbone_for(config).image_size, strict=True))
    name, argument = model_args.image_processor_name, "image_processor_name"
    if name is None:
        name, argument = model_args.model_name_or_path, "model_name_or_path"
    if name is None:
        mean = [0.5] * config.num_channels
        return ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean, do_convert_rgb=config.num_channels == 3)
    processor = load_pretrained(name, AutoImageProcessor.from_pretrained, hub_kwargs(model_args, data_args), argument)
    processor.size, processor.do_center_crop = size, False
    return processor
