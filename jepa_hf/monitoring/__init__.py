"""Monitoring: collapse metrics, health, the assessment of curves, and pictures of curves and masks."""
