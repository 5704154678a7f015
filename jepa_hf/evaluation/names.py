"""Names that the evaluation and the report share: columns of labels, and labels of metrics."""

# Columns taken for labels if none is named; the first one present is used.
LABEL_COLUMNS = ("label", "labels", "class", "target")
# How tables, plots and pages call the metrics; others keep their names.
METRIC_LABELS = {"linear_probe": "linear probe", "knn": "kNN", "spearman": "Spearman"}
