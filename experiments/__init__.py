"""Studies: each file answers one question and runs as ``python -m experiments.<name>``."""

import sys

from experiments.environment import settle, started_as_module

if started_as_module(__name__, sys.argv, sys.orig_argv):
    settle()
