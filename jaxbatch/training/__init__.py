"""From a task to a trained model: steps, epochs, whole runs, several devices, many runs at once, checkpoints."""
