"""From batches to parameters: the state, the step, optimizers, schedules, metrics, the loop. Knows no dataset."""
