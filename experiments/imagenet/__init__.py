"""How far may the batch of ResNet-50 grow on ImageNet?

There is one arm (one way to train) for each growth. Every 30 of 90 epochs an arm multiplies its batch by its growth and its
rate by a tenth of its growth, so that rate ÷ batch falls in the same way in all arms. Growth 8 goes from 8,192 examples to
524,288. Gradients of batches that do not fit on the device are accumulated from microbatches (parts that fit). Worker
processes decode and crop images ahead, in the order of training. Memory holds a few microbatches, for any batch size.

    python -m experiments.imagenet --data-dir ... --dtype bfloat16         ImageNet prepared by TFDS, or as class folders
    python -m experiments.imagenet --data-dir ... --dataset mine --quick   a short run on any folder of the same form

`scripts/make_images.py` writes such a folder from any data set of jaxbatch.
"""
