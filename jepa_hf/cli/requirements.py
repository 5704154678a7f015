"""Packages that flags need and that this package does not depend on."""

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..errors import UsageError

# Optimizers by a pattern: modules, each with the name to install.
_OPTIMIZERS = {
    "galore": {"galore_torch": "galore-torch"},
    "apollo": {"apollo_torch": "apollo-torch"},
    "lomo": {"lomo_optim": "lomo-optim"},
    "grokadamw": {"grokadamw": "grokadamw"},
    "schedule_free": {"schedulefree": "schedulefree"},
    "stable_adamw": {"optimi": "torch-optimi"},
    "adamw_torch_[48]bit": {"torchao": "torchao"},
    "anyprecision": {"torchdistx": "torchdistx"},
    "npu": {"torch_npu": "torch-npu"},
    "xla": {"torch_xla": "torch-xla"},
    "(?<!torch_)8bit|paged|bnb|ademamix|lion": {"bitsandbytes": "bitsandbytes"},
}
_TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
# Modules and names to install that differ from the tracker's.
_MODULES = {"azure_ml": "azureml", "flyte": "flytekit"}
_INSTALLED_AS = {"azureml": "azureml-core", "comet_ml": "comet-ml"}
# Flags and commands that need packages whenever they are given.
_FLAGS = {
    "use_liger_kernel": {"liger_kernel": "liger-kernel"},
    "deepspeed": {"deepspeed": "deepspeed"},
    "use_peft": {"peft": "'jepa_hf[peft]'"},
    "probe_task": {"sklearn": "'jepa_hf[evaluate]'"},
    "evaluate": {"sentence_transformers": "'jepa_hf[evaluate]'", "sklearn": "'jepa_hf[evaluate]'"},
}
_UNSET = (None, False, "", "no", "none", "false", "False")


def check_packages(values: Mapping[str, Any]) -> None:
    """Refuse flags whose packages are not installed, with the command that installs them."""
    for flag, module, package in _needed(values):
        if find_spec(module) is None:
            raise UsageError(
                f"{flag} needs the package {module}, which is not installed. Install it with: pip install {package}"
            )


def _needed(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield a flag with its value, a module that it needs, and the name to install."""
    optimizer = str(values.get("optim"))
    for pattern, modules in _OPTIMIZERS.items():
        for module, package in modules.items() if re.search(pattern, optimizer) else ():
            yield f"optim {optimizer}", module, package
    trackers = values.get("report_to") or ()
    for tracker in (trackers,) if isinstance(trackers, str) else trackers:
        module = _MODULES.get(tracker, tracker)
        if tracker in _TRACKERS:
            yield f"report_to {tracker}", module, _INSTALLED_AS.get(module, module)
    attention = str(values.get("attn_implementation"))
    if attention.startswith("flash_attention") and find_spec("kernels") is None:  # kernels loads them from the Hub
        module = "flash_attn_interface" if attention.endswith("3") else "flash_attn"
        yield f"attn_implementation {attention}", module, "flash-attn --no-build-isolation"
    elif "/" in attention:
        yield f"attn_implementation {attention}", "kernels", "kernels"
    for flag, modules in _FLAGS.items():
        for module, package in modules.items() if values.get(flag) not in _UNSET else ():
            yield flag, module, package
