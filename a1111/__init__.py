"""Automatic1111, Forge, reForge, Forge Neo and Forge Classic: everything behind `scripts/guidance_interval.py`.

A folder of its own because these web UIs run every file in scripts/ as a script.

settings.py  what the user asked for: controls, axes, infotext. Needs no host.
patch.py     how one denoiser call is judged and, outside the interval, cut to its conditional rows. Needs torch.
picture.py   the guided steps as a small picture. Needs no host.
evaluations.py  at which noise levels the host's samplers will evaluate the network. Imports `modules`.
generation.py  one generation in the running web UI, and what is said to its user. Imports `modules`, fastapi.
ui.py        the controls, once for dropdown and accordion. Imports gradio.
compare.py   the same seeds under three settings, in one labelled grid.
"""
