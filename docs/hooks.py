"""What mkdocs calls: pages made of the parsers, the recipes and the results, so that nothing is copied."""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from transformers import TrainingArguments

from jepa_hf import JepaTrainingArguments
from jepa_hf.cli.arguments import MaskArguments, ModelArguments, RunArguments
from jepa_hf.cli.llm_arguments import GenerationArguments, LlmModelArguments, LlmRunArguments, ViewArguments
from jepa_hf.cli.main import main
from jepa_hf.data.arguments import DataArguments
from jepa_hf.llm_jepa.paired_data import PairedDataArguments

REPOSITORY = Path(__file__).resolve().parents[1]

# Links that leave docs/, which a reader of the repository follows, and the pages that stand for them in the site.
_OUTSIDE = {
    "benchmarks/RESULTS.md": "results.md",
    **{
        f"benchmarks/{name}/README.md": f"results/{name}.md"
        for name in ("quality", "images", "speed", "reliability", "llm")
    },
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/."""
    for source, page in _OUTSIDE.items():
        content = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    files.append(File.generated(config, "reference/recipes.md", content=recipes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the flags, and turn links that leave docs/."""
    uri = page.file.src_uri
    folder = Path({page: source for source, page in _OUTSIDE.items()}.get(uri, f"docs/{uri}")).parent

    def redirect(link: re.Match[str]) -> str:
        target = os.path.normpath(folder / link[1])
        return f"]({os.path.relpath(_OUTSIDE[target], Path(uri).parent)}" if target in _OUTSIDE else link[0]

    markdown = re.sub(r"\]\(([^):#\s]+\.md)", redirect, markdown)
    generated = {
        "flags of train": train_flags,
        "help of the other commands": command_helps,
        "keys of a short run": keys_of_a_short_run,
    }
    return re.sub(
        rf"^<!-- ({'|'.join(generated)}) -->$", lambda match: generated[match[1]](), markdown, flags=re.MULTILINE
    )


# ---- the commands


def train_flags() -> str:
    """The flags of `jepa-hf train` by group, those of `--objective llm` last, without those of `TrainingArguments`."""
    usual = {item.name: item for item in fields(TrainingArguments)}
    own = [item for item in fields(RunArguments) if item.name not in usual]
    ours = [item for item in fields(JepaTrainingArguments) if item.name in usual]
    changed = [item for item in ours if _default(item) != _default(usual[item.name])]
    groups = [
        ("Model and objective", fields(ModelArguments)),
        ("Data", fields(DataArguments)),
        ("What is hidden", fields(MaskArguments)),
        ("EMA, health and export", own),
        ("Other defaults than those of TrainingArguments", changed),
    ]
    for title, kind in (
        ("--objective llm: the model", LlmModelArguments),
        ("--objective llm: data", PairedDataArguments),
        ("--objective llm: views", ViewArguments),
        ("--objective llm: objective", LlmRunArguments),
        ("--objective llm: answers", GenerationArguments),
    ):
        groups.append((title, [item for item in fields(kind) if item.name not in usual]))
    return "\n\n".join(f"### {title}\n\n{_list(items)}" for title, items in groups)


def _list(items: Sequence[Field]) -> str:
    lines = []
    for item in items:
        default = f", default {_default(item)}" if _default(item) else ""
        lines.append(f"- `--{item.name}`{default}: {item.metadata.get('help', '').replace('%%', '%')}")
    return "\n".join(lines)


def _default(item: Field) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    return "" if value is None else f"`{value}`"


def command_helps() -> str:
    """What every other command says of itself."""
    listed = re.findall(r"^  (\w+) ", _said("--help"), re.MULTILINE)
    parts = [f"## jepa-hf {name}\n\n```text\n{_said(name, '--help')}```" for name in listed if name != "train"]
    return "\n\n".join(parts)


def _said(*argv: str) -> str:
    """What `jepa-hf ...` prints."""
    printed = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(argv)
    return printed.getvalue()


# ---- the log


def keys_of_a_short_run() -> str:
    """Return the keys that a run of two steps on text writes to its log, as a list."""
    with tempfile.TemporaryDirectory() as folder:
        _said(
            *(
                "train",
                "--smoke_test",
                "--max_steps",
                "2",
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "2",
                "--do_eval",
            ),
            *("--logging_steps", "1", "--report_to", "none", "--use_cpu", "--output_dir", folder),
        )
        history = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))["history"]
    return "\n".join(f"- `{key}`" for key in sorted({key for entry in history for key in entry}))


# ---- the recipes


def recipes() -> str:
    """The YAML files of configs/, whole."""
    parts = ["# Recipes", "The files of `configs/`, as they stand there. Flags on the command line override them."]
    for path in sorted((REPOSITORY / "configs").glob("*.yaml")):
        parts.append(f"## {path.name}\n\n```yaml\n{path.read_text(encoding='utf-8')}```")
    return "\n\n".join(parts) + "\n"
