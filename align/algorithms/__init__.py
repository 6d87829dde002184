"""Alignment algorithms, one file each.

A module holds ``Config`` (the schema of its recipes; every field whose type is a role section becomes a role of the
cast), ``prepare`` (from data to material, before any worker starts) and ``train``. Importing one loads no torch.
"""
