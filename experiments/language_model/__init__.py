"""How well does a small transformer predict a text, and how near does it come to the best that is possible?

The transformer trains on the whole training text with AdamW, whose rate warms up and then falls as a cosine. Its bits per token
are measured on the validation text after every epoch, and on the test text once, at the end. The best possible number
is known for the generated language, because its entropy is known.

    python -m experiments.language_model                                     about 5 minutes
    python -m experiments.language_model --dataset tiny_shakespeare          about 4 minutes

The measured answer is in docs/language_model.md.
"""
