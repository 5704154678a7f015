"""Settings of all tests, restored after each."""

import gc
import logging
import os
from collections.abc import Iterator

# Before torch is loaded, and for all processes that tests start: pytest's workers share the cores already, and threads
# that wait for each other's core cost more than they save (the tutorial's training: 242 CPU seconds, not 35).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# What imports torch and transformers is imported where it is needed: pytest's first process only passes on tests.


def pytest_collectstart() -> None:
    """Before the first test module is imported, and in the processes that run tests only.

    While all is imported, there is no garbage to look for.
    """
    gc.disable()
    from helpers.pictures import render_nothing
    from jepa_hf.training import health_batches

    render_nothing()
    # Of 128 samples, 32 passes in batches of 4 take longer than the steps of a test's run.
    health_batches._HEALTH_SAMPLES = 16
    # Files of tests need not survive a power failure.
    os.fsync = os.fstat


def pytest_collection_finish() -> None:
    """`Trainer` collects garbage after each run: half a second over all that is imported, unless that is set aside."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def rendered_pictures() -> Iterator[None]:
    """Figures are drawn and rendered into their files."""
    from helpers.pictures import rendered

    with rendered():
        yield


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves and maps of a report, which take seconds, are drawn but not rendered."""
    monkeypatch.setattr("jepa_hf.report.figures._svg", lambda figure: "<svg></svg>")


@pytest.fixture
def full_health_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is measured on as many samples as in real runs."""
    monkeypatch.setattr("jepa_hf.training.health_batches._HEALTH_SAMPLES", 128)


@pytest.fixture(scope="session", autouse=True)
def _library_settings() -> tuple[int, int, int, int]:
    """Before the first fixture of a module runs a command."""
    import datasets
    import transformers

    levels = [logging.getLogger(name).level for name in ("jepa_hf", "huggingface_hub")]
    return transformers.logging.get_verbosity(), datasets.logging.get_verbosity(), *levels


@pytest.fixture(autouse=True)
def _restore_library_settings(_library_settings: tuple[int, int, int, int]) -> Iterator[None]:
    """The command line quiets the libraries for its process, which here is that of all tests."""
    import datasets
    import transformers

    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    yield
    transformers.logging.set_verbosity(_library_settings[0])
    transformers.logging.enable_progress_bar()
    datasets.logging.set_verbosity(_library_settings[1])
    for name, level in zip(("jepa_hf", "huggingface_hub"), _library_settings[2:], strict=True):
        logging.getLogger(name).setLevel(level)
    if parallelism is None:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
