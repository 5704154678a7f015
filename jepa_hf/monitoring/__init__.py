"""Monitoring: collapse metrics, health, assessment and plots of curves, plots of masks."""
