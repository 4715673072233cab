"""The small models that ship: networks, sampling and weights, for the nodes, the demo and the tuner.

Sampling needs the extra ``[lab]``; a model file needs safetensors.
"""
