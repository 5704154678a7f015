"""Configurations, models, encoder adapters, predictors and losses.

An export copies these files, so they import each other with one dot only.
"""
