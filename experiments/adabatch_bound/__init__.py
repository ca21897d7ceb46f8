"""How much faster can a growing batch be at most, on the machines of the published runs? A bound from data sheets; nothing is trained.

A step must do its operations, move its bytes, and, on several devices, send its gradient. The longest of these three times is a
lower bound on its time (a roofline). AdaBatch goes through the same examples with a batch that doubles four times. The ratio of the two
bounds says how much of a published speed-up the arithmetic of the hardware explains. It leaves out what usually matters most:
a small batch that leaves a device idle, kernels far from their peak, the host, and the loading of data.

    python -m experiments.adabatch_bound        about 4 minutes; needs the extra cuda-compiler

The measured and the published speed-ups are in docs/adabatch.md.
"""
