"""`jepa-hf train --help`: the flags that most runs need. `--help_all` lists all of them."""

import textwrap

# Title of a group, and its flags: name, placeholder of the value, effect.
_Groups = dict[str, tuple[tuple[str, str, str], ...]]

_START = (
    ("model_name_or_path", "NAME", "pretrained start: directory or Hub name"),
    ("model_type", "TYPE", "random start instead: bert, modernbert, vit, ijepa, feature_encoder, llama, ..."),
    ("config_overrides", "A=1,B=2", "sizes of a random start, such as hidden_size=128,num_hidden_layers=4"),
)
_RUN = (
    ("output_dir", "DIR", "directory for the result; an unfinished run in it is resumed"),
    ("max_steps", "N", "number of optimizer steps"),
    ("num_train_epochs", "N", "number of passes over the data, without max_steps; default 3"),
    ("per_device_train_batch_size", "N", "samples per step and device; default 8"),
    ("learning_rate", "X", "peak learning rate; default 5e-5"),
    ("bf16", "", "compute in bfloat16"),
    ("do_eval", "", "evaluate on validation_file, or else on 5 % of the training rows"),
    ("push_to_hub", "", "push checkpoints and the result to the Hub"),
    ("smoke_test", "", "20 steps of a tiny model on built-in data"),
)
_ENCODER: _Groups = {
    "start": _START,
    "data": (
        ("train_file", "FILES", "texts, tables, images or arrays: path, glob, several with commas; folders of images"),
        ("dataset_name", "NAME", "data set on the Hub instead"),
        ("max_seq_length", "N", "maximum number of tokens per row; longer texts are cut"),
        ("packed", "", "several short texts share a row"),
    ),
    "objective": (
        ("mask_ratio", "X", "fraction to mask; default 0.3"),
        ("masked_tokens", "MODE", "mask_token: replace masked positions; drop: leave them out"),
        ("contrastive_weight", "X", "weight of the contrastive loss between samples; default 1 for text"),
        ("mlm_weight", "X", "weight of the masked-language-model loss; default 0"),
    ),
    "run": _RUN,
}
_LLM: _Groups = {
    "start": _START,
    "data": (
        ("train_file", "FILES", "rows with messages, or with two columns of texts"),
        ("dataset_name", "NAME", "data set on the Hub instead"),
        ("max_seq_length", "N", "maximum number of tokens per row"),
        ("use_peft", "", "train LoRA adapters instead of all weights"),
    ),
    "objective": (
        ("jepa_weight", "X", "weight of the distance between the views; default 1"),
        ("pair_loss", "NAME", "distance between the views: cosine, l2, mse or infonce"),
        ("num_predictor_tokens", "N", "number of predictor tokens; default 1"),
        ("generation_samples", "N", "rows to answer and score at each evaluation; default 0"),
    ),
    "run": _RUN,
}
_DESCRIPTIONS = {
    False: "Pretrain an encoder with JEPA. Flags override the values of CONFIG.yaml. The modality follows from the "
    "model or the data; `--objective llm --help` shows the flags for language models.",
    True: "Fine-tune a language model with LLM-JEPA: next-token loss, and a loss between two views of each row. Flags "
    "override the values of CONFIG.yaml.",
}


def usage(command: str) -> str:
    """Return the first line of the help."""
    return f"usage: {command} [CONFIG.yaml] [--flag value ...]"


def short_help(command: str, objective: str | None) -> str:
    """Return the help on the most frequent flags of an objective."""
    is_llm = objective == "llm"
    lines = [usage(command), "", *textwrap.wrap(_DESCRIPTIONS[is_llm], 100)]
    for title, flags in (_LLM if is_llm else _ENCODER).items():
        lines += ["", f"{title}:"]
        lines += [f"  {f'--{name} {value}'.rstrip():<33} {effect}" for name, value, effect in flags]
    lines += ["", "more:", f"  {'--help_all':<33} list all flags"]
    if command == "jepa-hf train":
        lines.append(f"  {'--accelerate_config FILE':<33} start several processes, as `accelerate launch` does")
    return "\n".join(lines)
