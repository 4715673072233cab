"""The experiments on the models that ship: training, demo, sweep and results. Needs the extra ``[lab]``."""

from ..toy import model  # noqa: F401 (version 0.1 had it here)
