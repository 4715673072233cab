"""The models that ship: their data, training, sampling, demo, sweep and results. Needs the extra ``[lab]``."""
