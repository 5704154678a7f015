"""Names of metrics that the evaluation and the report share."""

# How tables, plots and pages call the metrics; others keep their names.
METRIC_LABELS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman"}
