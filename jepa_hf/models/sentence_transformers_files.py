"""Settings of a `SentenceTransformer`: maximum length, pooling, normalization, prompts."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, has_file, logging

logger = logging.get_logger(__name__)

# Modules without other weights than the encoder's.
_KEPT_MODULES = ("Transformer", "Pooling", "Normalize")


def read_sentence_transformers_files(name_or_path: str, **hub_kwargs: Any) -> dict[str, Any] | None:
    """Read the JSON files that make a checkpoint a `SentenceTransformer`.

    Modules with weights of their own (Dense) are left out with a warning, because they belong to
    the encoder before the training.

    Args:
        name_or_path: directory or Hub name of the encoder.
        hub_kwargs: `revision`, `token`, `cache_dir` and `local_files_only`; others are not used.

    Returns:
        The contents by file name; None if the checkpoint is a plain encoder.
    """
    names = ("revision", "token", "cache_dir", "local_files_only")
    hub_kwargs = {name: hub_kwargs[name] for name in names if name in hub_kwargs}

    def read(file_name: str) -> Any:
        if not has_file(name_or_path, file_name, **hub_kwargs):
            return None
        path = str(cached_file(name_or_path, file_name, **hub_kwargs))
        return json.loads(Path(path).read_text(encoding="utf-8"))

    modules = read("modules.json")
    if modules is None:
        return None
    kept = [module for module in modules if _class_name(module) in _KEPT_MODULES]
    if lost := [_class_name(module) for module in modules if module not in kept]:
        logger.warning(f"{name_or_path}: the export will not have its sentence-transformers modules {', '.join(lost)}.")
    files = ["sentence_bert_config.json", "config_sentence_transformers.json"]
    files += [f"{module['path']}/config.json" for module in kept if module["path"]]
    contents = {name: read(name) for name in files}
    return {"modules.json": kept, **{name: content for name, content in contents.items() if content is not None}}


def sentence_transformers_files(start: dict[str, Any] | None, hidden_size: int, max_length: int) -> dict[str, Any]:
    """Return the JSON files that make a plain encoder a `SentenceTransformer`.

    Args:
        start: files of the pretrained start (`read_sentence_transformers_files`); None for mean
            pooling over at most `max_length` tokens.
        hidden_size: width of the encoder.
        max_length: maximum number of tokens of encoder and tokenizer.
    """
    files: dict[str, Any] = start or {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    settings = {"do_lower_case": False, **files.get("sentence_bert_config.json", {})}
    settings["max_seq_length"] = min(settings.get("max_seq_length") or max_length, max_length)
    return {**files, "sentence_bert_config.json": settings}


def _class_name(module: dict[str, Any]) -> str:
    """Return the class name of an entry of modules.json."""
    return module["type"].rpartition(".")[2]
