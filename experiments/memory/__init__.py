"""Which batch fits on which accelerator? The accelerators' compilers tell, and no accelerator is needed.

For each target the study finds the largest batch size (any integer) whose training step fits, and verifies it: that size is
compiled and fits, and the next one is compiled and does not. Only shapes are used: nothing is trained and no data set is loaded
(a task of your own loads its own data).

    python -m experiments.memory                                        about 1 minute: SimpleCNN on this machine and an H100
    python -m experiments.memory --model resnet50 --dtype bfloat16 --targets a100-40,h100,v5e       about 3 minutes
    python -m experiments.memory --model vgg19_bn --targets t4 --batch-size 8192 --num-devices 3    about 1 minute: how to fit it
    python -m experiments.memory --task my_task.py:make_task --targets h100                         a task of your own

Targets that are not here need their compilers: pip install -e '.[cuda-compiler,tpu-compiler]'. docs/memory.md says how far the
numbers were compared with real devices, and what the bound on time can say.
"""
