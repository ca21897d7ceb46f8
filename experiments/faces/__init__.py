"""With very many classes, what does a margin gain, what does a large batch cost, and in how much memory?

An encoder learns to distinguish identities by a softmax over all of them, with a margin (CosFace, ArcFace) or without. Identities are digits
with deformations of their own, made on the device from their numbers, so that 100,000 of them need no storage. Every loss and batch size sees
the same number of examples and has its own learning rate. Embeddings are judged by verification (do two images show the same identity?) of
identities that were not in training, made of other digits: rates are chosen on one such set, results are reported on another.

    python -m experiments.faces                          about 5 minutes: 1,000 identities, batches of 256 and 4,096
    python -m experiments.faces --huge-updates 2         also 2 updates with 65,536 examples of 100,000 identities, in bounded memory

The measured answer is in docs/contrastive.md.
"""
