"""Scores of models on lm-eval tasks, paired tests and the quality gate."""
