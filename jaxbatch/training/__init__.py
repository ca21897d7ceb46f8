"""Trains models on tasks: steps, epochs, whole runs, several devices, many runs at once, checkpoints."""
