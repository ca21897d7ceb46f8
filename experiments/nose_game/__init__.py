"""Why does a small batch zigzag and a large one walk straight, and which asks fewer questions?

A blindfolded child pins a nose on a picture. Helpers, who each see it from another angle, call out corrections. At every step
the child asks one helper at random, asks two and takes the mean, or asks everyone. A helper stands for an example, its call
for a gradient, and the child's place for two parameters. Gradients, groups and SGD are those of jaxbatch.

    python -m experiments.nose_game      about 10 seconds
"""
