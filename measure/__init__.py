"""Folders of images against a reference: metrics, features, folders and their report. Needs the extra ``[measure]``.

Nothing here knows of guidance or of the models that ship.
"""
