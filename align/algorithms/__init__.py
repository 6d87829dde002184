"""Alignment algorithms, one file each.

A module holds ``Config`` (the schema of its recipes; each field whose type is a role schema becomes a role),
``load_data`` (training data, before any worker starts) and ``train``. Importing one loads no torch.
"""
