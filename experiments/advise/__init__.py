"""Which batch size should I train with, and which learning rate?

The study times an update at several batch sizes and makes short runs, each at one batch size and rate, until a goal such as 95%
accuracy. It chooses the runs one after another, fits a model of the updates to all of them, and recommends the setting that
reaches the goal soonest (or with the fewest examples). Runs are judged on a sixth of the training set that is held out.
--verify also makes the full sweep (sizes × rates × seeds), and compares the cost of the advised setting with that of its best.

    python -m experiments.advise                      about a minute
    python -m experiments.advise --dataset mnist --model mlp --optimizer adamw
    python -m experiments.advise --verify             about 10 minutes
    python -m experiments.advise --within 5epochs --schedule cosine    about 2 minutes; --help with it lists its flags
    python -m experiments.advise --laws --num-parameters 124e6 --num-tokens 2.5e9 --sequence-length 1024    seconds

--command asks for a training script in any framework: --command "python train.py --batch-size {batch_size} --lr {learning_rate}
--seed {seed}" --target "val_loss<0.4". The script prints one JSON object a line now and then; docs/any_script.md shows it.

--within asks another question: the length of the run is fixed, which batch size and rate end best, and how large may the batch be?

--laws trains nothing: it shows what published rules say of a language model, and how far they disagree.

The measured answer is in docs/advice.md.
"""
