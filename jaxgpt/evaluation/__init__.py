"""Evaluation: validation loss, multiple-choice tasks, lm-evaluation-harness."""
