"""Automatic1111, Forge and reForge: everything behind `scripts/guidance_interval.py`.

A folder of its own because these web UIs run every file in scripts/ as a script.

settings.py  what the user asked for: controls, axes, infotext. Needs no host.
patch.py     how one denoiser call is judged and, outside the interval, cut to its conditional rows. Needs torch.
picture.py   the guided steps as a small picture. Needs no host.
host.py      what is read from the running web UI. Imports `modules`.
ui.py        the controls, once for dropdown and accordion. Imports gradio.
compare.py   the same seeds under three settings, in one labelled grid.
"""
