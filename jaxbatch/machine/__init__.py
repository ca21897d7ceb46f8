"""Programs compiled and kept, their time and memory."""
