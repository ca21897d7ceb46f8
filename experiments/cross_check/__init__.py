"""Does this machine compute what it should? Layers, networks, gradients, updates, training, each against a float64 truth.

NumPy computes the true values on the host, without the compiler that is checked. The error must stay below a stated bound, which
is derived from the unit roundoff (the largest relative error of rounding one number) and the length of the sums. Every
backend that JAX finds is checked, in every precision, plain, jitted, inside `scan` and inside `vmap`. Exit code 0: all agree.
1: something does not agree, and its name is printed. 2: a wrong flag.

    python -m experiments.cross_check --quick                       half a minute
    python -m experiments.cross_check                               four minutes
    python -m experiments.cross_check --save here.npz               for another machine to compare with:
    python -m experiments.cross_check --against here.npz
    python -m experiments.cross_check --compile-for h100,v5e --quick    two minutes: compiles every step for devices that are not here
"""
