"""Names of poolings and metrics that the evaluation, the command line and the report share; short names of paths."""

from collections.abc import Sequence
from pathlib import Path

POOLINGS = ("mean", "cls", "layers")

# How tables, plots and pages call the metrics; others keep their names.
METRIC_LABELS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman"}


def distinct_ends(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that tell them apart; the paths, if no shorter ends do.

    >>> distinct_ends(["/home/me/data.csv", "/home/me/data.json"]), distinct_ends(["/a/b/out", "/a/c/out"])
    (['data.csv', 'data.json'], ['b/out', 'c/out'])
    """
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=0)):
        ends = ["/".join(names[-count:]) for names in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(paths)
