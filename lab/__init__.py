"""Evidence: the model that ships, its training, the metrics and the demo. Needs the extra ``[lab]``."""
