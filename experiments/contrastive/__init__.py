"""Does a contrastive loss itself want a large batch, or is it the optimizer that minds?

The loss (NT-Xent) asks which two views in the batch show the same image; the views of other images are the negatives. So a larger
batch has more negatives, but fewer updates for the same number of examples. A control separates the two effects: the same batches,
with negatives from groups of 64 examples only. Every batch size, with and without groups, sees the same number of examples and has
its own learning rate, chosen on a held-out part with other seeds. Representations are judged on the test set by their 20 nearest
neighbours and by a linear probe. Batches above a microbatch go through jaxbatch.coupled_gradient, whose time and memory are
compared with those of the batch in one piece.

    python -m experiments.contrastive                                  about 5 minutes
    python -m experiments.contrastive --dataset mnist --passes 20      hours; --batch-sizes 64 1024 takes fewer

The measured answer is in docs/contrastive.md.
"""
