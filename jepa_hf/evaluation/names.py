"""Names of poolings and metrics that the evaluation, the command line and the report share."""

POOLINGS = ("mean", "cls", "layers")

# How tables, plots and pages call the metrics; others keep their names.
METRIC_LABELS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman"}
