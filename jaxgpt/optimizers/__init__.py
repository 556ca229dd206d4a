"""AdamW, gradient clipping and learning-rate schedules, as functions of arrays."""
