"""Compiles programs, keeps them, and measures their time and memory."""
