"""All networks of the AdaBatch study side by side: three figures and two tables for a data set, from `arrays.npz` alone.

python -m experiments.adabatch_figures --dataset cifar10      seconds, after experiments.adabatch for each network
"""
