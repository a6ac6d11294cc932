"""Classifiers and translators."""
