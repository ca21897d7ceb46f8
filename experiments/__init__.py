"""Studies: each folder answers one question and runs as ``python -m experiments.<name>``."""

import sys

from experiments.harness.environment import load_jax_silently, settle, started_as_module

if started_as_module(__name__, sys.argv, sys.orig_argv):
    settle()
load_jax_silently()
