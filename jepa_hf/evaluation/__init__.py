"""Evaluation: embeddings, tasks, probes, retrieval and their results."""
